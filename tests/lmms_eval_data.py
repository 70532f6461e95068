"""Data of the local tasks in tests/lmms_eval_tasks: parquet files made of the demo's own samples, for the real lmms-eval."""

import io
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numbered_clips import write_clip
from PIL import Image

from nanovlm_v2drop.tasks import Sample, load_task

YAML = Path(__file__).parent / "lmms_eval_tasks"
IMAGES, CLIPS = 24, 16  # documents
POOL = 120  # samples whose answers are the options of multiple choice
PICTURES = {"images": {"feature": {"_type": "Image"}, "_type": "List"}}


def write_tasks(folder: Path) -> Path:
    """The tasks with their data, for `--include_path`."""
    shutil.copytree(YAML, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    pool, clips = list(load_task("demo").samples(POOL)), list(load_task("demo-video").samples(CLIPS))
    samples = pool[:IMAGES]
    write_table(folder / "images.parquet", map(picture_row, samples))
    write_table(folder / "choices.parquet", ({**picture_row(each), "choices": options(each, pool)} for each in samples))
    write_table(folder / "several.parquet", several_rows(samples, "{question}"))
    write_table(folder / "marked.parquet", several_rows(samples, "The first: <image>\nThe others: {marks}{question}"))
    write_table(folder / "words.parquet", ({"question": f"{each.text} <image>", "answer": each.answer} for each in samples))
    write_table(folder / "video.parquet", (video_row(each, folder) for each in clips))
    return folder


def picture_row(sample: Sample) -> dict[str, Any]:
    return {"question": sample.text, "answer": sample.answer, "images": list(map(stored, sample.images))}


def stored(picture: Image.Image) -> dict[str, Any]:
    """A picture as data sets store it. The path must not be null: a column of nulls is no longer read as pictures."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return {"bytes": data.getvalue(), "path": "picture.png"}


def options(sample: Sample, samples: Sequence[Sample]) -> list[str]:
    """The answers that occur among samples of this kind; some have several tokens."""
    return sorted({other.answer for other in samples if other.kind == sample.kind})


def several_rows(samples: Sequence[Sample], form: str) -> Iterable[dict[str, Any]]:
    """One to three pictures a document."""
    for number, sample in enumerate(samples):
        others = [other.images[0] for other in samples[number + 1 : number + 1 + number % 3]]
        marks = "<image>" * len(others)
        pictures = list(map(stored, [*sample.images, *others]))
        yield {"question": form.format(question=sample.text, marks=marks), "answer": sample.answer, "images": pictures}


def video_row(sample: Sample, folder: Path) -> dict[str, Any]:
    """A clip as a file of a codec without loss, so that its frames are those of the sample."""
    path = folder / f"{sample.sample_id}.mkv"
    write_clip(path, sample.video, fps=8, codec="ffv1", pix_fmt="bgr0")
    return {"question": sample.text, "answer": sample.answer, "video": str(path)}


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(list(rows))
    if "images" in table.column_names:
        features = {name: PICTURES[name] if name in PICTURES else feature_of(table, name) for name in table.column_names}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def feature_of(table: pa.Table, name: str) -> dict[str, Any]:
    text = {"dtype": "string", "_type": "Value"}
    return {"feature": text, "_type": "List"} if pa.types.is_list(table.schema.field(name).type) else text
