"""Dropping on texts: every kind of text is answered with every method, batch by batch, and ends with its table."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.fingerprints import model_fingerprint
from ..evaluation.output import check_same_settings, claimed, write_whole
from ..evaluation.records import append_records, remove_cut_line
from ..loading.text_model import TextModel, load_decoder
from ..models.parallel import ALONE
from ..report.rows import Row
from ..report.tables import Columns, console_for, number, print_table
from ..research.text import (
    COLUMNS,
    REPEATS,
    TIMED,
    TextAnswer,
    TextRun,
    answers,
    by_kind_of_text,
    markdown,
    prefill_seconds,
    read_answers,
    summarise_text,
    text_table,
)
from .planning import output_folder
from .results import provenance

RETAIN, LIMIT = 1 / 3, 200
ANSWERS = "text.jsonl"


def run_text(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer all questions; returns the object that ends the run.

    Raises ValueError for an output folder with answers, unless they are continued with --resume and the same model.
    """
    output = output_folder(arguments)
    if (output / ANSWERS).is_file() and not arguments.resume:
        raise ValueError(f"{output} holds answers of an earlier run; continue it with --resume, or choose another --output")
    model = load_decoder(
        arguments.weights or arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        attention=arguments.attention,
        kv_cache_dtype=arguments.kv_cache_dtype,
    )
    print(f"{model.name} in {model.precision}\noutput: {output}", flush=True)
    with claimed(output):
        remove_cut_line(output / ANSWERS)
        records = read_answers(output / ANSWERS)
        settings = {"weights": model_fingerprint(model.folder), "dtype": model.precision.noted}
        check_same_settings(settings, output, answered=bool(records))
        for texts in arguments.texts:
            for run in runs_of(arguments):
                records = answer_texts(model, run, texts, records, output / ANSWERS)
        return finish(model, arguments, records, output)


def runs_of(arguments: argparse.Namespace) -> list[TextRun]:
    """One for each budget."""
    size = arguments.limit or LIMIT, arguments.batch_size
    return [TextRun(arguments.text, retain, *size) for retain in arguments.retain or (RETAIN,)]


def answer_texts(model: TextModel, run: TextRun, texts: str, records: list[TextAnswer], file: Path) -> list[TextAnswer]:
    """All answers so far with those of one kind of text, whose table is printed."""
    own = [record for record in records if (record.texts, record.retain) == (texts, run.retain)]
    for batch in answers(model, run, texts, {(record.method, record.number) for record in own}):
        append_records(file, batch)
        own += batch
        print(f"{texts}: {batch[-1].method}, {len(own)} answers", flush=True)
    print_tables(by_kind_of_text(summarise_text(own)), COLUMNS)
    return [*(record for record in records if (record.texts, record.retain) != (texts, run.retain)), *own]


def finish(model: TextModel, arguments: argparse.Namespace, records: list[TextAnswer], output: Path) -> dict[str, Any]:
    """Write the tables and the object that ends the run."""
    rows = summarise_text(records)
    seconds = [{"retain": run.retain, **prefill_seconds(model, run.methods, run.retain)} for run in runs_of(arguments)]
    times = time_rows(seconds)
    title = f"seconds of a prefill of {TIMED:,} tokens, the shortest of {REPEATS}"
    print_tables([(title, times)], TIME_COLUMNS)
    measured = {"model": model.name, "dtype": str(model.precision), "results": rows, "prefill_seconds": seconds}
    run = {**measured, **provenance(model, arguments, ALONE)}
    write_whole(output / "summary.json", json.dumps(run, indent=1) + "\n")
    write_whole(output / "text.md", f"{text_table(rows)}\n{title}\n\n{markdown(times, TIME_COLUMNS)}")
    print(f"tables: {output / 'text.md'}")
    return run


def print_tables(tables: Iterable[tuple[str, Sequence[Row]]], columns: Columns) -> None:
    """One table for each title, behind the names of the methods; in a narrow terminal its columns stand in several tables."""
    console = console_for(wide=True)
    for title, rows in tables:
        named = [{"label": row["method"], "asked_tokens": None, **row} for row in rows]
        print_table(title, named, columns, console)


def time_rows(seconds: Sequence[Mapping[str, float]]) -> list[Row]:
    """Seconds of the decoder's prefill, and their share of dense's where it was timed."""
    return [
        {"method": method, "retain": row["retain"], "seconds": time, "dense": row.get("dense")}
        for row in seconds
        for method, time in row.items()
        if method != "retain"
    ]


TIME_COLUMNS: Columns = {
    "retain": number("retain", ".4g"),
    "seconds": number("seconds", ".3f"),
    "of dense %": lambda row: "-" if row["dense"] is None else f"{100 * row['seconds'] / row['dense']:.0f}",
}
