"""Dropping on texts: every kind of text is answered with every method, batch by batch, and ends with its table."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.fingerprints import model_fingerprint
from ..evaluation.output import check_same_settings, claimed, write_whole
from ..loading.text_model import TextModel, load_decoder
from ..models.parallel import ALONE
from ..research.text import (
    TIMED,
    TextAnswer,
    TextRun,
    answers,
    prefill_seconds,
    read_answers,
    summarise_text,
    text_table,
    write_answers,
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
        write_answers(file, batch)
        own += batch
        print(f"{texts}: {batch[-1].method}, {len(own)} answers", flush=True)
    print(text_table(summarise_text(own)), flush=True)
    return [*(record for record in records if (record.texts, record.retain) != (texts, run.retain)), *own]


def finish(model: TextModel, arguments: argparse.Namespace, records: list[TextAnswer], output: Path) -> dict[str, Any]:
    """Write the tables and the object that ends the run."""
    rows = summarise_text(records)
    seconds = [{"retain": run.retain, **prefill_seconds(model, run.methods, run.retain)} for run in runs_of(arguments)]
    print(time_table(seconds))
    measured = {"model": model.name, "dtype": str(model.precision), "results": rows, "prefill_seconds": seconds}
    run = {**measured, **provenance(model, arguments, ALONE)}
    write_whole(output / "summary.json", json.dumps(run, indent=1) + "\n")
    write_whole(output / "text.md", text_table(rows) + "\n" + time_table(seconds))
    print(f"tables: {output / 'text.md'}")
    return run


def time_table(seconds: Sequence[Mapping[str, float]]) -> str:
    """Seconds of the decoder's prefill, and their share of dense's where it was timed."""
    lines = [f"| retain | method | seconds of a prefill of {TIMED} tokens | of dense % |", "| --- | --- | --- | --- |"]
    for row in seconds:
        for method, time in list(row.items())[1:]:
            share = f"{100 * time / row['dense']:.0f}" if "dense" in row else "-"
            lines.append(f"| {row['retain']:.4g} | {method} | {time:.3f} | {share} |")
    return "\n".join(lines) + "\n"
