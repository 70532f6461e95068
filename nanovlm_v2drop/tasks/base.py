"""What every benchmark offers, and how its data is read: parquet files from a folder or from the Hugging Face Hub."""

import importlib
import io
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import ExifTags, Image, ImageOps

from ..processing.prompts import Request
from ..processing.video import VideoSource

SHORT_ANSWER_PROMPT = "\nAnswer the question using a single word or phrase."


class DatasetUnavailable(RuntimeError):
    """The Hub did not give the data; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Sample:
    """One question about pictures or a video (a file, or its frames).

    `kind` is the category that a breakdown is made by, `group` the picture that paired metrics join by, `answer` the
    ground truth.
    """

    sample_id: str
    text: str
    images: tuple[Image.Image, ...]
    answer: str
    kind: str
    group: str = ""
    video: VideoSource | None = None

    @property
    def request(self) -> Request:
        return Request(text=self.text, images=self.images, video=self.video)


class Task(ABC):
    """A benchmark: its questions and its scoring. Made from the folder that holds its data, or None for the Hub."""

    name: str
    max_new_tokens: int
    default_samples: int | None = None  # what a run without a limit takes; None is everything

    def __init__(self, data_dir: Path | None = None) -> None:
        self.data_dir = data_dir

    def first_sample(self) -> Sample:
        """One sample, to see how large a prompt is."""
        return next(self.samples(2))  # MME's smallest limit: its questions come in pairs

    @abstractmethod
    def samples(self, limit: int | None = None) -> Iterator[Sample]:
        """Give the samples one by one, in the order of the data; a limit takes a balanced spread over all of it."""

    @abstractmethod
    def correct(self, answer: str, sample: Sample) -> float:
        """Score one answer of a model, 0 to 1. Confidence intervals and paired comparisons are made of these."""

    @abstractmethod
    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Compute the benchmark's numbers: "score" is the headline, the others are the official sub-metrics.

        Args:
            records: one per sample, with keys sample_id, kind, group, answer (ground truth), text (the model's answer)
                and correct. No record at all is a ValueError.
        """


def dataset_files(repo_id: str, split: str, local_dir: Path | None) -> list[Path]:
    """Find the parquet files of one split, in order: in a folder, or on the Hub, downloading what is not there yet.

    A folder holds `data/SPLIT-*.parquet`, as a clone of the dataset does, or `*SPLIT*.parquet` anywhere below it. It
    may also hold several datasets, each in a subfolder with its own name (POPE, MME).
    The Hub is the one huggingface_hub is set to (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE); its cache serves later runs.

    Raises:
        FileNotFoundError: the folder or its files are not there, or a shard is missing.
        DatasetUnavailable: the Hub cannot be reached or does not give the dataset.
    """
    if local_dir is None:
        return _files_in(_download(repo_id, split), split)
    folder = Path(local_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the one that holds data/{split}-*.parquet of {repo_id}")
    dataset_name = repo_id.split("/")[-1].lower()
    named = [child for child in sorted(folder.iterdir()) if child.is_dir() and child.name.lower() == dataset_name]
    return _files_in(named[0] if named else folder, split)


def read_parquet_rows(
    files: Sequence[Path], columns: Sequence[str], positions: Collection[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Stream rows of parquet files as dicts of the columns asked for, 64 rows in memory at a time.

    Args:
        files: read one after the other.
        columns: a missing one is a ValueError naming the file.
        positions: row numbers to give, counted through all files; None gives every row.
    """
    wanted = None if positions is None else frozenset(positions)
    start = 0
    for file in files:
        for batch in _batches(file, columns):
            rows = [row for row in range(batch.num_rows) if wanted is None or start + row in wanted]
            start += batch.num_rows
            if rows:
                yield from batch.take(rows).to_pylist()


def decode_picture(cell: dict[str, Any] | bytes | None, sample_id: str) -> Image.Image:
    """Open an image cell, turned upright by its EXIF orientation as datasets.Image does, in RGB.

    A cell is {"bytes", "path"}, as the datasets library stores a picture, or the bytes alone.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not data:
        raise ValueError(f"sample {sample_id}: the image cell has no bytes; use parquet files with embedded pictures")
    try:
        image = Image.open(io.BytesIO(data))
        turned = image.getexif().get(ExifTags.Base.Orientation) is not None
        return (ImageOps.exif_transpose(image) if turned else image).convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError on a broken PNG
        raise ValueError(f"sample {sample_id}: no picture in {len(data)} bytes ({error}); fetch it again") from error


def spread(strata: Sequence[tuple[str, ...]], limit: int) -> list[int]:
    """Choose `limit` positions, the same number from every stratum and evenly spaced within it, in ascending order.

    A stratum that is too small gives all it has, and the others share the rest. When the limit does not divide, the
    strata that sort first give one more.
    """
    if limit < 1:
        raise ValueError(f"a limit of {limit} leaves nothing to evaluate; it must be 1 or more (None takes everything)")
    members: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for position, stratum in enumerate(strata):
        members[stratum].append(position)
    ordered = [members[stratum] for stratum in sorted(members)]
    quotas = _equal_shares([len(stratum) for stratum in ordered], limit)
    return sorted(
        stratum[index * len(stratum) // quota]
        for stratum, quota in zip(ordered, quotas, strict=True)
        for index in range(quota)
    )


def yes_or_no(answer: str, sample_id: str, dataset: str) -> str:
    """Return a ground truth as "yes" or "no", whatever its case."""
    label = answer.strip().lower().removesuffix(".")
    if label not in ("yes", "no"):
        raise ValueError(f"sample {sample_id}: the ground truth is {answer!r}, not yes or no; is this {dataset}?")
    return label


def _equal_shares(sizes: Sequence[int], total: int) -> list[int]:
    shares = [0] * len(sizes)
    remaining = min(total, sum(sizes))
    while remaining:
        open_strata = [index for index, size in enumerate(sizes) if shares[index] < size]
        for index in open_strata[:remaining]:
            shares[index] += 1
        remaining -= min(remaining, len(open_strata))
    return shares


def _files_in(folder: Path, split: str) -> list[Path]:
    files = sorted(folder.glob(f"data/{split}-*.parquet")) or sorted(folder.rglob(f"*{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no data/{split}-*.parquet and no other *{split}*.parquet")
    _require_all_shards(files)
    return files


def _require_all_shards(files: Sequence[Path]) -> None:
    # An interrupted download would otherwise be scored as a smaller benchmark, without a word.
    shards: dict[tuple[Path, int], int] = defaultdict(int)
    for file in files:
        if match := re.search(r"-\d{5}-of-(\d{5})", file.name):
            shards[file.parent, int(match[1])] += 1
    for (folder, expected), found in shards.items():
        if found != expected:
            raise FileNotFoundError(f"{folder} holds {found} of {expected} parquet shards; finish the download first")


def _download(repo_id: str, split: str) -> Path:
    hub = _import("huggingface_hub")
    patterns = [f"{split}-*.parquet", f"*/{split}-*.parquet"]
    try:
        return Path(hub.snapshot_download(repo_id, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the library's HTTP client, and so its errors, changed from release to release
        reason = str(error).strip().partition("\n")[0]
        raise DatasetUnavailable(
            f"dataset {repo_id} is not available from {hub.constants.ENDPOINT}: {type(error).__name__}: {reason}\n"
            f"fetch it where there is a network (hf download {repo_id} --repo-type dataset --local-dir DIR), "
            "then pass --data DIR; or set HF_ENDPOINT to a mirror"
        ) from error


def _batches(file: Path, columns: Sequence[str]) -> Iterator[Any]:
    parquet = _import("pyarrow.parquet")
    try:
        reader = parquet.ParquetFile(file)
    except ValueError as error:  # pyarrow.ArrowInvalid, which does not name the file
        size = file.stat().st_size
        raise ValueError(f"{file} ({size} bytes) is no parquet file; a Git LFS pointer? run git lfs pull") from error
    with reader:
        present = reader.schema_arrow.names
        if missing := [column for column in columns if column not in present]:
            raise ValueError(f"{file} has no column {', '.join(missing)}; it has: {', '.join(present)}")
        yield from reader.iter_batches(batch_size=64, columns=list(columns))


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is needed for this data: pip install "nanovlm-v2drop[benchmarks]"') from error
