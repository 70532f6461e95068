"""The figures of the report page, as the dictionaries that Plotly draws.

Colours are written in CSS, so that light and dark share one figure: the page's script looks them up when it draws. The legend
is the page's own and is the same for all figures: it switches traces by their `meta`, the method, and shapes by their `name`.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from typing import Any, NamedTuple

from markupsafe import escape

from ..dropping import V2Drop
from ..evaluation.plans import DENSE
from .rows import PUBLISHED, Row, at_budget, budget_of, label_of, met_budget

Figure = dict[str, Any]

SIDEWAYS = 0.35  # share of the distance between two budgets over which the lines are spread
NAME_WIDTH = 26  # characters of a line of a name beside a figure, which has a third of the page
FOLDS = 2  # maps show ratios from a quarter of the average to four times the average, which is 2 ** FOLDS


class Style(NamedTuple):
    """How a method looks everywhere: its colours on a light and on a dark ground, and Plotly's name of its marker."""

    light: str
    dark: str
    symbol: str

    @property
    def colour(self) -> str:
        return f"light-dark({self.light}, {self.dark})"


STYLES = {
    "dense": Style("#2b2f34", "#d7d9db", "square"),
    "v2drop": Style("#d63c00", "#ff7f4d", "circle"),
    "v2drop-plus": Style("#b8860b", "#ffc940", "octagon"),
    "fastv": Style("#1470e8", "#4a8fe0", "triangle-up"),
    "pdrop": Style("#2f9e6e", "#85c297", "diamond"),
    "sparsevlm": Style("#ab8c47", "#f2c832", "triangle-down"),
    "sparsevlm-plus": Style("#654580", "#be56ea", "star-diamond"),
    "dart": Style("#5d1774", "#9a5cf7", "star"),
    "dycoke": Style("#076369", "#3adcf5", "hexagon"),
    "visionzip": Style("#e43fb8", "#ed89d0", "pentagon"),
    "tome": Style("#82310e", "#a8782a", "bowtie"),
    "cdpruner": Style("#3d2edb", "#a0a3fc", "triangle-left"),
    "clse": Style("#538518", "#b8d777", "triangle-right"),
    "divprune": Style("#c0392b", "#ff8a80", "hexagram"),
    "fastvid": Style("#164423", "#2fb457", "hourglass"),
    "holov": Style("#00838f", "#4dd0c8", "star-square"),
    "transprune": Style("#8e3b6f", "#d98cba", "diamond-tall"),
    "vidcom2": Style("#455a9e", "#8fa8f0", "diamond-wide"),
    "random": Style("#868c93", "#868c93", "x"),
    "random-grid": Style("#868c93", "#868c93", "cross"),
}
SPARE_STYLES = (
    Style("#7a5230", "#c99d74", "triangle-ne"),
    Style("#1b7a5a", "#5fd1a8", "triangle-sw"),
    Style("#a01860", "#f06aa8", "star-triangle-up"),
    Style("#5b6b00", "#c6d64a", "star-triangle-down"),
)


def method_styles(methods: Sequence[str]) -> dict[str, Style]:
    """A style for each method, in the order of the legend: dense, V2Drop, the others, random last."""
    spare = cycle([*SPARE_STYLES, *(style for method, style in STYLES.items() if method not in methods)])
    styles = {method: STYLES[method] if method in STYLES else next(spare) for method in dict.fromkeys(methods)}
    first = [DENSE, V2Drop.name]
    rank = {method: first.index(method) if method in first else 2 + method.startswith("random") for method in styles}
    return {method: styles[method] for method in sorted(styles, key=rank.__getitem__)}


def number(value: float | None, digits: str = ".1f") -> str:
    return "–" if value is None else f"{value:{digits}}"


def with_interval(value: float, bounds: Sequence[float], unit: str = "") -> str:
    return f"{value:.1f}{unit} [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def colour(name: str) -> str:
    """A colour of the page's style sheet."""
    return f"var(--{name})"


def base_layout(x_title: str, y_title: str) -> Figure:
    axis = {"gridcolor": colour("line"), "linecolor": colour("line"), "zeroline": False, "automargin": True}
    return {
        "xaxis": {**axis, "title": {"text": x_title}},
        "yaxis": {**axis, "title": {"text": y_title}},
        "margin": {"l": 52, "r": 12, "t": 12, "b": 46},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": colour("ink")},
        "hoverlabel": {"bgcolor": colour("card"), "bordercolor": colour("quiet"), "font": {"color": colour("ink")}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
    }


def hover_text(row: Row) -> str:
    lines = [f"<b>{escape(label_of(row))}</b>", f"score {with_interval(row['score'], row['score_interval'])}"]
    if row["relative_score"] is not None:
        lines.append(with_interval(row["relative_score"], row["relative_interval"], " %") + " of dense")
    lines += [
        f"{number(row['mean_vision_tokens'])} mean vision tokens",
        f"prefill {number(row['prefill_ms'])} ms, whole answer {number(row['total_ms'])} ms",
        f"key/value cache {number(row['kv_cache_mb'], '.2f')} MB",
    ]
    return "<br>".join(lines + ([str(escape(row["note"]))] if row["note"] else []))


def method_trace(rows: Sequence[Row], styles: Mapping[str, Style], x: Sequence[Any], y: Sequence[Any]) -> Figure:
    """The marks of one method's rows. Published settings have open marks."""
    method, style = rows[0]["method"], styles[rows[0]["method"]]
    opened = method != DENSE and budget_of(rows[0]) == PUBLISHED
    return {
        "type": "scatter",
        "name": label_of(rows[0]),
        "meta": method,
        "x": x,
        "y": y,
        "mode": "markers",
        "marker": {
            "symbol": style.symbol + ("-open" if opened else ""),
            "size": 9,
            "color": style.colour,
            "line": {"width": 2 * opened, "color": style.colour},
        },
        "line": {"color": style.colour, "width": 3.5 if method == V2Drop.name else 1.5},
        "hoverinfo": "text",
        "hovertext": [hover_text(row) for row in rows],
    }


def error_bars(rows: Sequence[Row], style: Style) -> Figure:
    return {
        "type": "data",
        "symmetric": False,
        "array": [row["score_interval"][1] - row["score"] for row in rows],
        "arrayminus": [row["score"] - row["score_interval"][0] for row in rows],
        "color": style.colour,
        "thickness": 1.3,
        "width": 0,
    }


def dense_shapes(rows: Sequence[Row], axis: str) -> list[Figure]:
    """Dense's score as a line across the figure, and its interval as a band; `axis` is the axis of the scores."""
    other = "x" if axis == "y" else "y"
    whole = {"name": DENSE, f"{other}ref": "paper", f"{other}0": 0, f"{other}1": 1}
    shapes = []
    for row in rows:
        if row["method"] == DENSE:
            low, high = row["score_interval"]
            band = {f"{axis}0": low, f"{axis}1": high, "fillcolor": colour("band"), "line": {"width": 0}}
            middle = {f"{axis}0": row["score"], f"{axis}1": row["score"]}
            line = {"width": 1.2, "dash": "dash", "color": colour("ink")}
            shapes += [
                {**whole, **band, "type": "rect", "layer": "below"},
                {**whole, **middle, "type": "line", "layer": "above", "line": line},
            ]
    return shapes


def lines_of(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that belong on one line: a method's setting at its budgets, from few tokens to many."""
    lines: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["label"], budget_of(row) == PUBLISHED), []).append(row)
    return [sorted(line, key=lambda row: row["mean_vision_tokens"]) for line in lines.values()]


def sideways_step(rows: Sequence[Row], lines: int) -> float:
    """The distance between neighbouring lines, as a logarithm of tokens, so that their intervals do not cover each other."""
    asked = sorted({row["asked_tokens"] for row in rows})
    gap = min((math.log(high / low) for low, high in pairwise(asked)), default=math.log(2))
    return SIDEWAYS * gap / lines


def accuracy_figure(rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """Score against mean vision tokens: a line for every method, a mark for every published setting."""
    published = at_budget(rows, PUBLISHED)
    asked = [row for row in rows if row["asked_tokens"] is not None]
    traces = [accuracy_trace(line, styles, 0.0) for line in lines_of(published)]
    lines = lines_of(asked)
    for place, line in enumerate(lines):
        shift = ((len(lines) - 1) / 2 - place) * sideways_step(asked, len(lines))  # V2Drop is moved to the side of more tokens
        traces.append(accuracy_trace(line, styles, shift))
    layout = {**base_layout("mean vision tokens a layer", "score"), "shapes": dense_shapes(rows, "y")}
    layout["xaxis"] |= {"type": "log", "tickvals": token_ticks(rows)}
    return {"data": traces[::-1], "layout": layout}  # Plotly draws the last trace on top


def token_ticks(rows: Sequence[Row]) -> list[float]:
    """The budgets and the tokens of a whole prompt; without budgets the halves, quarters, ... of the whole prompt."""
    whole = max(row["vision_tokens"] for row in rows)
    asked = {row["asked_tokens"] for row in rows if row["asked_tokens"] is not None}
    return sorted({whole, *(asked or (whole / 2**halving for halving in range(1, 6)))})


def accuracy_trace(line: Sequence[Row], styles: Mapping[str, Style], shift: float) -> Figure:
    tokens = [row["mean_vision_tokens"] * math.exp(shift) for row in line]
    trace = method_trace(line, styles, tokens, [row["score"] for row in line])
    return {**trace, "mode": "lines+markers", "error_y": error_bars(line, styles[line[0]["method"]])}


def ranking_figure(rows: Sequence[Row], budget: str, styles: Mapping[str, Style]) -> Figure:
    """The methods at one budget below each other, the best on top. A method that did not meet the budget shows its tokens."""
    shown = {}
    for row in sorted(at_budget(rows, budget), key=lambda row: row["score"]):
        tokens = "" if budget != PUBLISHED and met_budget(row) else f" ({number(row['mean_vision_tokens'])})"
        shown[label_of(row) + tokens] = row
    return bar_figure(shown, rows, styles)


def panel_figure(rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """The rows of one ablation below each other, the best on top; `rows` holds dense too."""
    own = sorted((row for row in rows if row["method"] != DENSE), key=lambda row: row["score"])
    return bar_figure({label_of(row): row for row in own}, rows, styles)


def bar_figure(shown: Mapping[str, Row], rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """A mark and an interval for each row of `shown`, from bottom to top, and dense's score from `rows`."""
    traces = []
    for name, row in shown.items():
        trace = method_trace([row], styles, [row["score"]], ["<br>".join(map(escape, textwrap.wrap(name, NAME_WIDTH)))])
        traces.append({**trace, "error_x": error_bars([row], styles[row["method"]])})
    layout = {**base_layout("score", ""), "shapes": dense_shapes(rows, "x"), "height": 70 + 25 * len(shown)}
    layout["yaxis"] |= {"type": "category", "showgrid": False}
    return {"data": traces, "layout": layout}


def cost_figures(rows: Sequence[Row], costs: Mapping[str, str], styles: Mapping[str, Style]) -> dict[str, Figure]:
    """Score against each cost, by the cost's title; costs that were not measured are left out."""
    measured = {field: [row for row in rows if row[field] is not None] for field in costs}
    return {costs[field]: cost_figure(own, field, costs[field], styles) for field, own in measured.items() if own}


def cost_figure(rows: Sequence[Row], field: str, title: str, styles: Mapping[str, Style]) -> Figure:
    """Score against one cost. A larger mark keeps more vision tokens."""
    most = max([row["mean_vision_tokens"] for row in rows if row["method"] != DENSE], default=math.inf)
    traces = []
    for line in lines_of(rows):
        trace = method_trace(line, styles, [row[field] for row in line], [row["score"] for row in line])
        trace["marker"]["opacity"] = 1
        trace["marker"]["size"] = [6 + 8 * min(1.0, row["mean_vision_tokens"] / most) for row in line]
        traces.append({**trace, "mode": "lines+markers", "line": {**trace["line"], "width": 1}})
    return {"data": traces[::-1], "layout": base_layout(title, "score")}


def bias_figure(entries: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """How often each tenth of the sequence is kept, divided by the method's own average."""
    dashed = {"width": 1.5, "dash": "dash", "color": colour("ink")}
    even = {"type": "scatter", "mode": "lines", "x": [0, 100], "y": [1, 1], "line": dashed, "hoverinfo": "skip"}
    layout = base_layout("place in the sequence, %", "kept, times the average")
    layout["yaxis"] |= {"rangemode": "tozero"}
    return {"data": [even, *(bias_trace(entry, styles[entry["method"]]) for entry in reversed(entries))], "layout": layout}


def bias_trace(entry: Row, style: Style) -> Figure:
    ratios = [times_average(share, entry) for share in entry["bins"]]
    return {
        "type": "scatter",
        "name": label_of(entry),
        "meta": entry["method"],
        "mode": "lines+markers",
        "x": [10 * tenth + 5 for tenth in range(len(entry["bins"]))],
        "y": ratios,
        "marker": {"symbol": style.symbol, "size": 8, "color": style.colour},
        "line": {"color": style.colour, "width": 3.5 if entry["method"] == V2Drop.name else 1.5},
        "hoverinfo": "text",
        "hovertext": [
            f"<b>{escape(label_of(entry))}</b><br>{10 * tenth} to {10 * tenth + 10} % of the sequence<br>"
            f"kept with probability {number(share, '.3f')}, {number(ratio, '.2f')} times the average"
            for tenth, (share, ratio) in enumerate(zip(entry["bins"], ratios, strict=True))
        ],
    }


def times_average(share: float | None, entry: Row) -> float | None:
    """A probability of being kept, divided by the method's average; None for a place without tokens."""
    return None if share is None else share / entry["kept_share"]


def fold(ratio: float | None) -> float | None:
    """The logarithm of a ratio to base 2, limited to the ends of the scale."""
    return None if ratio is None else math.log2(min(max(ratio, 2**-FOLDS), 2**FOLDS))


def map_figure(entry: Row) -> Figure:
    """How often each place of the picture is kept, divided by the average; at the edges means of rows and columns."""
    picture = {
        "type": "heatmap",
        "z": [[fold(times_average(share, entry)) for share in row] for row in entry["map"]],
        "zmin": -FOLDS,
        "zmax": FOLDS,
        "colorscale": [[0, colour("less")], [0.5, colour("even")], [1, colour("more")]],
        "showscale": False,
        "customdata": entry["map"],
        "hovertemplate": "row %{y}, column %{x}<br>kept with probability %{customdata:.3f}<extra></extra>",
    }
    layout = {**base_layout("", ""), "margin": {"l": 0, "r": 0, "t": 0, "b": 0}}
    hidden = {"visible": False, "domain": [0, 0.82]}
    layout |= {"xaxis": hidden, "yaxis": {**hidden, "domain": [0.18, 1], "autorange": "reversed"}}
    edge = {"visible": False, "rangemode": "tozero"}
    layout |= {"xaxis2": {**edge, "domain": [0.85, 1]}, "yaxis2": {**edge, "domain": [0, 0.15], "autorange": "reversed"}}
    rows = edge_trace(entry["rows"], "row") | {"xaxis": "x2", "orientation": "h"}
    columns = edge_trace(entry["columns"], "column") | {"yaxis": "y2"}
    rows["x"], columns["y"] = entry["rows"], entry["columns"]
    return {"data": [picture, rows, columns], "layout": layout}


def edge_trace(shares: Sequence[float | None], name: str) -> Figure:
    """Bars of the mean probability of every row or column of the picture."""
    return {
        "type": "bar",
        "marker": {"color": colour("soft")},
        "hoverinfo": "text",
        "hovertext": [f"{name} {index}: kept with probability {number(share, '.3f')}" for index, share in enumerate(shares)],
    }
