"""The tables of a run on screen. Every text is printed as it is: names from users are never read as markup."""

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..evaluation.plans import DENSE
from ..evaluation.position_bias import BINS
from ..tasks import TASKS
from .rows import Row, at_budget, budget_of, by_place, leaves_out_zero, met_budget, standing, timed_note

Cell = Callable[[Row], str]
Columns = Mapping[str, Cell]

WIDTH = 78  # of the first screen: fits a terminal of 80 columns
NAME_ROOM = 29  # for method and budget; a longer name is cut on screen, the report and results.csv have it whole
GAP = 2  # between two columns
PIPED_WIDTH = 140  # of the other tables where stdout is no terminal


def console_for(wide: bool) -> Console:
    """stdout without markup; `wide`: as wide as the terminal, else WIDTH."""
    width = (None if sys.stdout.isatty() else PIPED_WIDTH) if wide else WIDTH
    return Console(width=width, markup=False, emoji=False, highlight=False)


def printable(text: str) -> str:
    """Text without control characters, which could move the cursor or change colours."""
    return "".join(one if one.isprintable() or one == "\n" else "\N{REPLACEMENT CHARACTER}" for one in text)


def print_scores(rows: Sequence[Row], console: Console) -> None:
    """The first screen: for every task the scores, the numbers that its papers report, and notes on single rows."""
    for task in dict.fromkeys(row["task"] for row in rows):
        own = by_budget([row for row in rows if row["task"] == task])
        title = f"{task}: {own[0]['samples']:,} questions, {own[0]['vision_tokens']:g} vision tokens a prompt"
        print_table(title, own, score_columns(own), console, bold=best_rows(own))
        if task in TASKS and TASKS[task].score_name:
            console.print(f"score: {TASKS[task].score_name}")
        print_key_metrics(task, own, console)
        console.print(timed_note(own))
        for note in dict.fromkeys(row["note"] for row in own if row["note"]):
            noted = [f"{label(row)} {asked(row)}".removesuffix(" -") for row in own if row["note"] == note]
            console.print(f"{', '.join(noted)}: {note}")


def by_budget(rows: Sequence[Row]) -> list[Row]:
    """Dense, then published settings, then the budgets from large to small; rows of one budget stay in their order."""
    return sorted(rows, key=lambda row: (row["method"] != DENSE, -(row["asked_tokens"] or float("inf"))))


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """At every budget the best of the rows that met it; none where only one did, or where it is level with all."""
    best: list[Row] = []
    for budget in dict.fromkeys(budget_of(row) for row in rows if row["asked_tokens"] is not None):
        ranked = [row for row in at_budget(rows, budget) if met_budget(row)]
        highest = [row for row in ranked if standing(row)[0] == max(standing(other)[0] for other in ranked)]
        best += highest if len(highest) < len(ranked) else []
    return best


def score_columns(rows: Sequence[Row]) -> Columns:
    dense = next((row for row in rows if row["method"] == DENSE), None)
    return {
        "mean\ntokens": number("mean_vision_tokens", ".1f"),
        "score": lambda row: plus_minus(row["score"], row["score_interval"]),
        "% of\ndense": lambda row: plus_minus(row["relative_score"], row["relative_interval"]),
        "prefill\nms": number("prefill_ms", ".1f"),
        "speed-\nup": lambda row: times(dense, row, "prefill_ms"),
    }


def plus_minus(value: float | None, bounds: Sequence[float] | None) -> str:
    """A value and half the width of its 95 % interval."""
    if value is None or bounds is None:
        return "-"
    digits = ".0f" if abs(value) >= 1000 else ".1f"
    return f"{value:{digits}} ± {(bounds[1] - bounds[0]) / 2:{digits}}"


def print_key_metrics(task: str, rows: Sequence[Row], console: Console) -> None:
    """The numbers that papers report of this task, and under them those of dense models in the papers."""
    kind = TASKS.get(task)
    if kind is None or not kind.key_metrics:
        return
    papers = [
        {"label": f"{model}, papers", "asked_tokens": None, "metrics": numbers} for model, numbers in kind.reported.items()
    ]
    columns = {textwrap.fill(name.replace("_", " "), 8, break_long_words=False): key_metric(name) for name in kind.key_metrics}
    print_table(f"{task}: as papers report it", [*rows, *papers], columns, console)


def print_details(rows: Sequence[Row], bias: Sequence[Row], console: Console) -> None:
    """Every other table of a run, task by task; intervals are 95 %."""
    for task in dict.fromkeys(row["task"] for row in rows):
        own = by_budget([row for row in rows if row["task"] == task])
        placed = sorted((row for row in own if row["asked_tokens"] is not None), key=by_place)
        title = f"{task}: by where tokens leave (before the decoder or in it); * the interval leaves out zero"
        print_table(title, placed, DIFFERENCES, console)
        print_table(f"{task}: intervals and costs", own, INTERVALS, console)
        published = [row for row in own if row["paper"]]
        benchmarks = {name: paper(name) for row in published for name in row["paper"]}
        print_table("the paper's numbers for these rows, LLaVA-1.5-7B", published, benchmarks, console)
        print_table(f"{task}: by kind", own, kind_columns(own), console)
        print_table(f"{task}: time and memory", own, efficiency_columns(own), console)
        biased = [entry for entry in bias if entry["task"] == task]
        print_table(f"{task}: kept at the first drop point, by tenth of the vision tokens, %", biased, BIAS, console)
        videos = [entry for entry in biased if len(entry["frames"]) > 1]
        print_table(f"{task}: kept at the first drop point, by frame, %", videos, frame_columns(videos), console)


def print_table(title: str, rows: Sequence[Row], columns: Columns, console: Console, bold: Sequence[Row] = ()) -> None:
    """One line a row behind its method and budget; columns that do not fit go into a second table. Nothing without rows."""
    if not rows or not columns:
        return
    console.print(title, style="italic")
    budgets: Columns = {"asked": asked} if any(row["asked_tokens"] is not None for row in rows) else {}
    longest = NAME_ROOM - sum(GAP + width_of(name, cell, rows) for name, cell in budgets.items())
    named = {"method": label, **budgets}
    room = console.width - min(NAME_ROOM, sum(GAP + width_of(name, cell, rows) for name, cell in named.items()) - GAP)
    for part in fitting_parts(rows, columns, room):
        console.print(drawn(rows, {**named, **part}, ("method",), {"method": longest}, bold))
        console.print()


def print_parts(rows: Sequence[Mapping[str, str]], named: Sequence[str], left: Sequence[str], console: Console) -> None:
    """Texts by the names of their columns, of which `named` begin every line and those in `left` are aligned to the left.

    Columns that do not fit go into further tables. A text of `named` that is longer than NAME_ROOM is cut.
    """
    cells: Columns = {name: itemgetter(name) for name in rows[0]}
    widths = {name: min(width_of(name, cells[name], rows), NAME_ROOM) for name in named}
    room = console.width - sum(GAP + width for width in widths.values()) + GAP
    others = {name: cell for name, cell in cells.items() if name not in named}
    for number, part in enumerate(fitting_parts(rows, others, room)):
        if number:
            console.print()
        console.print(drawn(rows, {**{name: cells[name] for name in named}, **part}, left, widths))


def drawn(
    rows: Sequence[Row], columns: Columns, left: Sequence[str], widths: Mapping[str, int], bold: Sequence[Row] = ()
) -> Table:
    """One line a row. Columns in `left` are aligned to the left, and those in `widths` are at most so wide."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True, max_width=widths.get(name))
    for row in rows:
        cells = [Text(printable(cell(row))) for cell in columns.values()]
        table.add_row(*cells, style="bold" if row in bold else None)
    return table


def fitting_parts(rows: Sequence[Row], columns: Columns, room: int) -> list[Columns]:
    """The columns in their order, cut into parts of at most `room` characters with one column at least."""
    parts: list[dict[str, Cell]] = [{}]
    left = room
    for name, cell in columns.items():
        width = GAP + width_of(name, cell, rows)
        if width > left and parts[-1]:
            parts.append({})
            left = room
        parts[-1][name] = cell
        left -= width
    return list(parts)


def width_of(name: str, cell: Cell, rows: Sequence[Row]) -> int:
    return max(cell_len(text) for text in [*name.split("\n"), *map(cell, rows)])


def label(row: Row) -> str:
    seeds = f" x{len(row['seeds'])}" if len(row.get("seeds", ())) > 1 else ""
    return row["label"] + seeds


def asked(row: Row) -> str:
    return "-" if row["asked_tokens"] is None else f"{row['asked_tokens']:g}"


def number(name: str, form: str) -> Cell:
    """A cell that shows the row's field of that name; "-" where it was not measured."""
    return lambda row: "-" if row[name] is None else format(row[name], form)


def times(row: Row | None, other: Row, name: str) -> str:
    """How many times the field of another row is in that of `row`."""
    if row is None or row[name] is None or other[name] is None:
        return "-"
    return f"{row[name] / other[name]:.2f}x"


def with_interval(value: float | None, bounds: Sequence[float] | None) -> str:
    return "-" if value is None or bounds is None else f"{value:.1f} [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def signed(value: float | None, bounds: Sequence[float] | None) -> str:
    """A difference and its 95 % interval; a star where the interval leaves out zero."""
    if value is None or bounds is None:
        return "-"
    return f"{value:+.1f} [{bounds[0]:+.1f}, {bounds[1]:+.1f}]{'*' if leaves_out_zero(bounds) else ' '}"


def percent(name: str, index: int) -> Cell:
    """Probability of being kept in one tenth of the sequence, or in one frame; "-" where no token stands."""
    return lambda entry: "-" if entry[name][index] is None else f"{100 * entry[name][index]:.0f}"


def frame_columns(entries: Sequence[Row]) -> Columns:
    """One column a frame; of long videos every second, third, ... frame, so that there are at most sixteen columns."""
    frames = min((len(entry["frames"]) for entry in entries), default=0)
    shown = range(0, frames, -(-frames // 16) or 1)
    return {"layer": number("layer", "d"), **{str(frame + 1): percent("frames", frame) for frame in shown}}


DIFFERENCES: Columns = {
    "tokens leave": lambda row: row["acts"].replace(" the decoder", ""),
    "score": lambda row: with_interval(row["score"], row["score_interval"]),
    "score - V2Drop's": lambda row: signed(row["difference"], row["difference_interval"]),
}
INTERVALS: Columns = {
    "final": number("final_vision_tokens", "g"),
    "score": lambda row: with_interval(row["score"], row["score_interval"]),
    "% of dense": lambda row: with_interval(row["relative_score"], row["relative_interval"]),
    "GFLOPs": lambda row: f"{1000 * row['prefill_tflops']:.4g}",
    "KV MB": number("kv_cache_mb", ".2f"),
}
TIMES: Columns = {
    "vision ms": number("vision_ms", ".1f"),
    "prefill ms": number("prefill_ms", ".1f"),
    "decode ms": number("decode_ms", ".1f"),
    "total ms": number("total_ms", ".1f"),
    "items/s": number("items_per_s", ".1f"),
    "peak MB": number("peak_memory_mb", ".0f"),
}
BIAS: Columns = {
    "layer": number("layer", "d"),
    "kept": lambda entry: f"{100 * entry['kept_share']:.0f}",
    **{str(index + 1): percent("bins", index) for index in range(BINS)},
    "KL bits": number("kl_bits", ".4f"),
    "chi-square": number("chi_square", ".0f"),
}


def kind_columns(rows: Sequence[Row]) -> Columns:
    """The task's own numbers beside the headline: question kinds, sub-metrics."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"] if name != "score")
    return {name: metric(name) for name in names}


def metric(name: str) -> Cell:
    """Shares (0 to 1) with three digits, points with one."""

    def shown(row: Row) -> str:
        value = row["metrics"].get(name)
        return "-" if value is None else f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"

    return shown


def key_metric(name: str) -> Cell:
    """The same with half the width of the 95 % interval, where the row has one."""

    def shown(row: Row) -> str:
        value, bounds = row["metrics"].get(name), row.get("metric_intervals", {}).get(name)
        if value is None or bounds is None:
            return metric(name)(row)
        digits = ".3f" if abs(value) <= 1 else ".1f"
        return f"{value:{digits}} ± {(bounds[1] - bounds[0]) / 2:{digits}}"

    return shown


def paper(name: str) -> Cell:
    return lambda row: f"{row['paper'][name]:g}" if name in row["paper"] else "-"


def efficiency_columns(rows: Sequence[Row]) -> Columns:
    """As the paper's efficiency table: times a sample, throughput, and memory; beside dense where it ran."""
    dense = next((row for row in rows if row["method"] == DENSE), None)
    if dense is None:
        return TIMES
    return {**TIMES, "items/s beside dense": lambda row: times(row, dense, "items_per_s")}
