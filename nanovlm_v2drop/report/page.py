"""The report page of a run: figures, table, position bias and pictures of what was kept. It needs no network.

    python -m nanovlm_v2drop.report.page results/RUN                 write results/RUN/report.html again
    python -m nanovlm_v2drop.report.page results/RUN --standalone    as one file that can be sent to somebody

Plotly's script is 4.7 MB. The runs in a folder called `results` share one copy of it, results/plotly-VERSION.min.js, and their
pages refer to it. The page of a run elsewhere holds the script itself, because nothing is written outside the run's folder.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from ..evaluation.plans import DENSE
from ..models.config import read_json_object
from .averages import cells
from .figures import (
    Style,
    accuracy_figure,
    bias_figure,
    cost_figures,
    map_figure,
    method_styles,
    number,
    panel_figure,
    ranking_figure,
    with_interval,
)
from .rows import PUBLISHED, Row, at_budget, budget_of, label_of, met_budget, standing, timed_note, title_of

RESULTS = Path("results")  # where runs go by default
TIMES = {"prefill_ms": "prefill of a prompt, ms", "total_ms": "whole answer, ms"}
MEMORIES = {
    "kv_cache_mb": "key/value cache of a prompt, MB",
    "peak_memory_mb": "peak memory, MB",
    "prefill_tflops": "prefill of a prompt, TFLOPs",
}


class Column(NamedTuple):
    """A column of numbers in the table; `interval` names the field that holds its bounds."""

    field: str
    title: str
    digits: str
    explanation: str
    interval: str = ""


Reported = tuple[Row, Sequence[Row]]  # a run's summary and its galleries

COLUMNS = (
    Column("asked_tokens", "asked", "g", "mean vision tokens a layer that were asked for"),
    Column("score", "score", ".1f", "with its 95 % interval", "score_interval"),
    Column("relative_score", "% of dense", ".1f", "with its 95 % interval, paired by question", "relative_interval"),
    Column("difference", "minus V2Drop", "+.1f", "score minus V2Drop's, paired by question", "difference_interval"),
    Column("mean_vision_tokens", "mean tokens", ".1f", "vision tokens entering a layer, averaged over the layers"),
    Column("final_vision_tokens", "last layer", ".1f", "vision tokens entering the last layer"),
    Column("prefill_ms", "prefill ms", ".1f", "one prompt through the decoder"),
    Column("decode_ms_per_token", "ms a token", ".2f", "one decoding step"),
    Column("total_ms", "total ms", ".1f", "one whole answer"),
    Column("vision_ms", "vision ms", ".1f", "reading the picture, vision tower and projector"),
    Column("items_per_s", "answers a second", ".2f", "whole answers"),
    Column("prefill_tflops", "TFLOPs", ".3g", "prefill of one prompt, by formula"),
    Column("kv_cache_mb", "KV MB", ".2f", "key/value cache of one prompt"),
    Column("peak_memory_mb", "peak MB", ".0f", "most memory allocated"),
    Column("samples", "samples", "d", "questions answered"),
)


def write_page(output: Path, standalone: bool = False) -> Path:
    """Write `output`/report.html from the summary.json and galleries.json in the same folder; returns its path.

    `standalone`: the page holds Plotly's script even where the runs beside it share one.
    """
    run, galleries = read_run(output)
    if one_method(run["results"]):
        name_by_setting([*run["results"], *run["position_bias"], *(row for gallery in galleries for row in gallery["rows"])])
    path = output / "report.html"
    shares = output.absolute().parent.name == RESULTS.name and not standalone
    script = shared_script(output.absolute().parent) if shares else None
    path.write_text(render_page([(run, galleries)], script), encoding="utf-8")
    return path


def write_common_page(outputs: Sequence[Path], compared: Sequence[Sequence[str]], path: Path) -> Path:
    """Write one page with several runs, which holds Plotly's script; returns `path`.

    `compared`: a table of the runs side by side; its first row has the names of the columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page([read_run(output) for output in outputs], compared=compared), encoding="utf-8")
    return path


def read_run(output: Path) -> Reported:
    """The run's summary and galleries. Raises OSError for a missing file, and ValueError for a damaged or older one."""
    run, path = read_json_object(output / "summary.json"), output / "galleries.json"
    if any(not {"acts", "timed"} <= set(row) for row in run["results"]):
        raise ValueError(f"{output / 'summary.json'} lacks fields: an older version wrote it; write it again with --resume")
    try:
        return run, json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); write it again with --resume") from error


def shared_script(folder: Path) -> str:
    """The name of Plotly's script in a folder of runs; the script is written if it is missing."""
    path = folder / f"plotly-{get_plotlyjs_version()}.min.js"
    if not path.is_file():
        whole = path.with_suffix(".whole")
        whole.write_text(get_plotlyjs(), encoding="utf-8")
        whole.replace(path)  # at once, since several runs may end at the same time
    return path.name


def one_method(rows: Sequence[Row]) -> bool:
    """Whether a run compares several settings of a single method."""
    return len({row["method"] for row in rows} - {DENSE}) == 1


def name_by_setting(rows: Sequence[dict[str, Any]]) -> None:
    """Treat every setting as a method, so that each has a mark of its own."""
    for row in rows:
        row["method"] = row["label"]


def render_page(
    reported: Sequence[Reported], script: str | None = None, compared: Sequence[Sequence[str]] = ()
) -> str:
    """The text of the page. `script`: name of Plotly's script in the folder above; None puts the script into the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (number, with_interval, title_of, label_of, budget_title, standing_text, dropped_path, verdict):
        environment.filters[function.__name__] = function
    environment.filters["zip"] = zip
    runs = [run for run, _ in reported]
    styles = method_styles([row["method"] for run in runs for row in run["results"]])
    return environment.get_template("page.html").render(
        runs=[{"claims": [], "averages": [], **run} for run in runs],
        average_cells=cells,
        models=listed(list(dict.fromkeys(run["model"] for run in runs))),
        devices=listed(list(dict.fromkeys(f"{run['device']}, {run['dtype']}" for run in runs))),
        styles=styles,
        tasks=task_reports(reported, styles),
        columns=COLUMNS,
        plotly=Markup("") if script else Markup(get_plotlyjs()),
        script=script,
        compared=compared,
    )


def task_reports(reported: Sequence[Reported], styles: Mapping[str, Style]) -> list[dict[str, Any]]:
    """The tasks of all runs, with titles that name the run where there are several."""
    reports: list[dict[str, Any]] = []
    for run_number, (run, galleries) in enumerate(reported, 1):
        suffix = f", run {run_number}" if len(reported) > 1 else ""
        for name in dict.fromkeys(row["task"] for row in run["results"]):
            report = task_report(name, len(reports) + 1, run, galleries, styles)
            reports.append({**report, "run": run, "title": name + suffix})
    return reports


def task_report(
    name: str, task_number: int, run: Row, galleries: Sequence[Row], styles: Mapping[str, Style]
) -> dict[str, Any]:
    """Everything that the template shows of one task."""
    rows, bias = (in_order(run[part], name, styles) for part in ("results", "position_bias"))
    own_galleries = [gallery for gallery in galleries if gallery["task"] == name]
    panels = run.get("panels", {})
    ranked = [row for row in rows if not any(row["label"] in labels for labels in panels.values())]
    comparisons = [compare(ranked, budget) for budget in budgets_of(ranked) if budget != PUBLISHED]
    return {
        "name": name,
        "number": task_number,
        "rows": table_order(rows),
        "dense": [row for row in rows if row["method"] == DENSE],
        "comparisons": comparisons,
        "headline": headline(comparisons),
        "accuracy": accuracy_figure(rows, styles),
        "rankings": {budget: ranking_figure(ranked, budget, styles) for budget in budgets_of(ranked)},
        "costs": [cost_figures(rows, costs, styles) for costs in (TIMES, MEMORIES)],
        "ablations": ablation_reports(rows, panels, styles),
        "paper": any(row["paper"] for row in rows),
        "notes": list(dict.fromkeys(row["note"] for row in rows if row["note"])),
        "timed": timed_note(rows),
        "kinds": list(dict.fromkeys(kind for row in rows for kind in row["metrics"] if kind != "score")),
        "bias": {budget: bias_report(bias, budget, styles) for budget in budgets_of(bias)},
        "galleries": [gallery_report(gallery, styles) for gallery in own_galleries],
        "gallery_budgets": budgets_of([row for gallery in own_galleries for row in gallery["rows"]]),
    }


def ablation_reports(
    rows: Sequence[Row], panels: Mapping[str, Sequence[str]], styles: Mapping[str, Style]
) -> dict[str, dict[str, Any]]:
    """For each ablation its rows, best first, a figure of their scores, and the benchmarks that the paper reports."""
    reports = {}
    for name, labels in panels.items():
        own = sorted((row for row in rows if row["label"] in labels), key=lambda row: -row["score"])
        if own:
            benchmarks = list(dict.fromkeys(benchmark for row in own for benchmark in row["paper"]))
            dense = [row for row in rows if row["method"] == DENSE]
            reports[name] = {"rows": own, "figure": panel_figure([*dense, *own], styles), "benchmarks": benchmarks}
    return reports


def in_order(rows: Sequence[Row], task: str, styles: Mapping[str, Style]) -> list[Row]:
    """The rows of a task, methods in the order of the legend."""
    order = list(styles)
    return sorted((row for row in rows if row["task"] == task), key=lambda row: order.index(row["method"]))


def budgets_of(rows: Sequence[Row]) -> list[str]:
    """The budgets that were asked for, from large to small, and last the published settings, which follow no budget."""
    dropping = [row for row in rows if row["method"] != DENSE]
    return list(dict.fromkeys(budget_of(row) for row in sorted(dropping, key=lambda row: -(row["asked_tokens"] or 0))))


def table_order(rows: Sequence[Row]) -> list[Row]:
    """Dense, then budget by budget; there the methods by where tokens leave, and the best score first."""
    order = budgets_of(rows)
    place = {id(row): -1 if row["method"] == DENSE else order.index(budget_of(row)) for row in rows}
    return sorted(rows, key=lambda row: (place[id(row)], row["acts"], -row["score"]))


def budget_title(budget: str) -> str:
    return "published settings" if budget == PUBLISHED else f"{budget} tokens"


def compare(rows: Sequence[Row], budget: str) -> dict[str, Any]:
    """The best of the methods that met a budget (several if level), the next one, and whether their intervals overlap."""
    own = sorted(at_budget(rows, budget), key=lambda row: -standing(row)[0])
    ranked = [row for row in own if met_budget(row)]
    best = [row for row in ranked if standing(row)[0] == standing(ranked[0])[0]]
    following = ranked[len(best) :]
    return {
        "budget": budget,
        "best": best,
        "next": following[:1],
        "overlap": bool(following) and standing(best[0])[1][0] <= standing(following[0])[1][1],
        "random": [row for row in following[1:] if row["method"] == "random"],
        "left_out": [row for row in own if not met_budget(row)],
    }


def headline(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: which method is best at which budgets, and where its interval overlaps the next one's."""
    contested = [comparison for comparison in comparisons if comparison["next"]]
    if not contested:
        return ""
    budgets: dict[str, list[str]] = {}
    for comparison in contested:
        budgets.setdefault(listed([label_of(row) for row in comparison["best"]]), []).append(comparison["budget"])
    best = ", ".join(f"{label} at {listed(own)} tokens" for label, own in budgets.items())
    overlapping = [comparison["budget"] for comparison in contested if comparison["overlap"]]
    if not overlapping:
        return f"Best: {best}. The next method's interval lies below it every time."
    where = "every time" if len(overlapping) == len(contested) else f"at {listed(overlapping)} tokens"
    return f"Best: {best}. The next method's interval overlaps {where}, so the order may be chance."


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def standing_text(row: Row) -> str:
    return with_interval(*standing(row), "" if row["relative_score"] is None else " %")


def bias_report(entries: Sequence[Row], budget: str, styles: Mapping[str, Style]) -> dict[str, Any]:
    """The curves of all methods, and a map of each. A method that kept nothing is left out."""
    own = [entry for entry in at_budget(entries, budget) if entry["kept_share"] > 0]
    return {"curves": bias_figure(own, styles), "maps": [(entry, map_figure(entry)) for entry in own]}


def gallery_report(gallery: Row, styles: Mapping[str, Style]) -> dict[str, Any]:
    """A picture and its answers: that of dense, and the others by budget."""
    order = list(styles)
    rows = sorted(gallery["rows"], key=lambda row: order.index(row["method"]))
    return {
        **gallery,
        "dense": [row for row in rows if row["method"] == DENSE],
        "answers": {budget: at_budget(rows, budget) for budget in budgets_of(rows)},
    }


def verdict(correct: float) -> str:
    return {0.0: "wrong", 1.0: "right"}.get(correct, f"partly right, {correct:.2g}")


def dropped_path(kept: Sequence[int], grid: Sequence[int]) -> str:
    """An SVG path over the dropped patches of a picture, in units of patches; neighbours in one row form one rectangle."""
    rows, columns = grid
    staying = set(kept)
    path = ""
    for row in range(rows):
        edges = [-1, *(column for column in range(columns) if row * columns + column in staying), columns]
        for left, right in pairwise(edges):
            width = right - left - 1
            path += f"M{left + 1} {row}h{width}v1h-{width}z" if width else ""
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the report page of a run again.")
    parser.add_argument("output", type=Path, help="the run's folder, with summary.json and galleries.json")
    parser.add_argument("--standalone", action="store_true", help="one file that can be sent to somebody, 4.7 MB larger")
    arguments = parser.parse_args(argv)
    try:
        print(write_page(arguments.output, arguments.standalone))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
