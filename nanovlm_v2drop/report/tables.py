"""The tables of a run on screen."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..evaluation.position_bias import BINS
from ..research.findings import Finding

Row = dict[str, Any]
Cell = Callable[[Row], str]
Columns = Mapping[str, Cell]


def print_run(rows: Sequence[Row], bias: Sequence[Row], console: Console) -> None:
    """Every table of a run, task by task; intervals are 95 %."""
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        print_scores(own, console)
        print_table(f"{task}: by kind", own, kind_columns(own), console)
        print_table(f"{task}: time and memory", own, efficiency_columns(own), console)
        biased = [entry for entry in bias if entry["task"] == task]
        print_table(f"{task}: kept at the first drop point, by tenth of the vision tokens, %", biased, BIAS, console)
        videos = [entry for entry in biased if len(entry["frames"]) > 1]
        print_table(f"{task}: kept at the first drop point, by frame, %", videos, frame_columns(videos), console)


def print_scores(rows: Sequence[Row], console: Console) -> None:
    """The headline table, and under it what must be known of some rows."""
    title = f"{rows[0]['task']}: {rows[0]['samples']} samples, {rows[0]['vision_tokens']:g} vision tokens a prompt"
    print_table(title, rows, SCORES, console)
    for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
        noted = [f"{row['label']} {asked(row)}".removesuffix(" -") for row in rows if row["note"] == note]
        console.print(f"{', '.join(noted)}: {note}")
    published = [row for row in rows if row["paper"]]
    names = dict.fromkeys(name for row in published for name in row["paper"])
    print_table("the paper's numbers for these rows, LLaVA-1.5-7B", published, {name: paper(name) for name in names}, console)


def print_table(title: str, rows: Sequence[Row], columns: Columns, console: Console) -> None:
    """One line a row behind its method and budget; nothing where there are no rows."""
    if not rows:
        return
    table = Table(title=title)
    for name in (shown := {"method": label, "asked": asked, **columns}):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*(cell(row) for cell in shown.values()))
    console.print(table)


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """The ledger of claims."""
    table = Table("claim", "paper", "measured here", "verdict", "decided by", title="The paper's claims", show_lines=True)
    for finding in findings:
        table.add_row(finding.claim, finding.paper, finding.measured, finding.verdict, finding.decides)
    console.print(table)


def label(row: Row) -> str:
    seeds = f" x{len(row['seeds'])}" if len(row.get("seeds", ())) > 1 else ""
    return row["label"] + seeds


def asked(row: Row) -> str:
    return "-" if row["asked_tokens"] is None else f"{row['asked_tokens']:g}"


def number(name: str, form: str) -> Cell:
    """A cell that shows the row's field of that name."""
    return lambda row: format(row[name], form)


def with_interval(value: float | None, bounds: Sequence[float] | None) -> str:
    return "-" if value is None or bounds is None else f"{value:.1f} [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def percent(name: str, index: int) -> Cell:
    """Probability of being kept in one tenth of the sequence, or one frame; prompts of few vision tokens leave some empty."""
    return lambda entry: "-" if entry[name][index] is None else f"{100 * entry[name][index]:.0f}"


def frame_columns(entries: Sequence[Row]) -> Columns:
    """One a frame, or one of every few where there are many: a table has room for sixteen."""
    frames = min((len(entry["frames"]) for entry in entries), default=0)
    shown = range(0, frames, -(-frames // 16) or 1)
    return {"layer": number("layer", "d"), **{str(frame + 1): percent("frames", frame) for frame in shown}}


SCORES: Columns = {
    "mean tokens": number("mean_vision_tokens", ".1f"),
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
    return lambda row: f"{row['metrics'][name]:.4g}" if name in row["metrics"] else "-"


def paper(name: str) -> Cell:
    return lambda row: f"{row['paper'][name]:g}" if name in row["paper"] else "-"


def efficiency_columns(rows: Sequence[Row]) -> Columns:
    """As the paper's efficiency table: times a sample, throughput, and memory; beside dense where it ran."""
    dense = next((row for row in rows if row["method"] == "dense"), None)
    if dense is None:
        return TIMES
    return {**TIMES, "items/s beside dense": lambda row: f"{row['items_per_s'] / dense['items_per_s']:.2f}x"}
