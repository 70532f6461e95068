"""Benchmarks that are stored as parquet files, in a folder or on the Hugging Face Hub: which files, which rows, which cells."""

import importlib
import re
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from PIL import Image

from .base import Task, decode_picture, shown


class DatasetUnavailable(RuntimeError):
    """The Hub did not give the data; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Row:
    """One row: its values by column, its file and its number in that file (from 0), and the id of its sample once known.

    The methods read one cell each. They raise ValueError with the file, the row and the sample for a cell of another kind.
    """

    values: dict[str, Any]
    file: Path
    number: int
    sample_id: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.number}" + (f", sample {self.sample_id}" if self.sample_id else "")

    def named(self, sample_id: str) -> "Row":
        return replace(self, sample_id=sample_id)

    def text(self, column: str) -> str:
        value = self.values[column]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.place}: the {column} is {shown(value)}, not a text")
        return value

    def key(self, column: str) -> str:
        """A text, or a whole number as a text: data sets write their ids in either way."""
        value = self.values[column]
        return str(value) if type(value) is int else self.text(column)

    def yes_or_no(self, column: str, dataset: str) -> str:
        """A ground truth as "yes" or "no", whatever its case."""
        label = self.text(column).strip().lower().removesuffix(".")
        if label not in ("yes", "no"):
            value = shown(self.values[column])
            raise ValueError(f"{self.place}: the ground truth is {value}, not yes or no; is this {dataset}?")
        return label

    def picture(self, column: str) -> Image.Image:
        """The picture in a cell; see `decode_picture`."""
        return decode_picture(self.values[column], f"{self.place}, column {column}")


class ParquetTask(Task):
    """A benchmark whose samples are the rows of parquet files."""

    repo_id: ClassVar[str]
    split: ClassVar[str] = "test"
    id_columns: ClassVar[tuple[str, ...]]  # what `sample_ids` reads

    @cached_property
    def files(self) -> Sequence[Path]:
        """Raises as `dataset_files`."""
        return dataset_files(self.repo_id, self.split, self.data_dir)

    def num_samples(self, limit: int | None = None) -> int:
        """From the metadata of the files: no row is read. Raises ValueError for files without rows."""
        total = sum(num_rows(file) for file in self.files)
        if not total:
            raise ValueError(f"{self.files[0]} holds no rows: {self.name} has no sample; fetch the data again")
        return total if limit is None else min(limit, total)

    @abstractmethod
    def sample_ids(self) -> list[str]:
        """One id a row, in the order of the data; no two are alike."""

    def read(self, columns: Sequence[str], positions: Collection[int] | None = None) -> Iterator[Row]:
        """The rows at these positions (None: all of them) with the ids of their samples."""
        ids = self.sample_ids()
        wanted = ids if positions is None else [ids[position] for position in sorted(set(positions))]
        for sample_id, row in zip(wanted, read_rows(self.files, columns, positions), strict=True):
            yield row.named(sample_id)


def unique_ids(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The names that the data give their rows, each with the file and the row where several rows share it."""
    times = Counter(names)
    pairs = zip(names, rows, strict=True)
    return [name if times[name] == 1 else f"{name}@{row.file.name}:{row.number}" for name, row in pairs]


def dataset_files(repo_id: str, split: str, local_dir: Path | None) -> list[Path]:
    """Find the parquet files of one split, in order: in a folder, or on the Hub, from which missing files are downloaded.

    A folder holds `data/SPLIT-*.parquet`, as a clone of the dataset does, or `*SPLIT*.parquet` anywhere below it. It
    may also hold several datasets, each in a subfolder with its own name (POPE, MME).
    The Hub is the one that huggingface_hub is set to (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE). Later runs use its cache.

    Raises:
        FileNotFoundError: the folder or its files are not there, or a shard is missing.
        DatasetUnavailable: the Hub cannot be reached or does not give the dataset.
    """
    if local_dir is None:
        return files_in(download(repo_id, split), split)
    folder = Path(local_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the one that holds data/{split}-*.parquet of {repo_id}")
    dataset_name = repo_id.split("/")[-1].lower()
    named = [child for child in sorted(folder.iterdir()) if child.is_dir() and child.name.lower() == dataset_name]
    return files_in(named[0] if named else folder, split)


def read_rows(files: Sequence[Path], columns: Sequence[str], positions: Collection[int] | None = None) -> Iterator[Row]:
    """Stream rows of parquet files with the columns asked for, 64 rows in memory at a time.

    Args:
        files: read one after the other.
        columns: a missing one is a ValueError naming the file.
        positions: row numbers to give, counted through all files; None gives every row.

    Raises ValueError for a file that cannot be read, with its name and, where a single value is damaged, the row.
    """
    wanted = None if positions is None else frozenset(positions)
    before = 0
    for file in files:
        start = 0
        for batch in batches(file, columns):
            for number in range(batch.num_rows):
                if wanted is None or before + start + number in wanted:
                    with naming(f"{file}, row {start + number}"):
                        values = batch.slice(number, 1).to_pylist()[0]
                    yield Row(values, file, start + number)
            start += batch.num_rows
        before += start


def batches(file: Path, columns: Sequence[str]) -> Iterator[Any]:
    with open_parquet(file) as reader:
        present = reader.schema_arrow.names
        if missing := [column for column in columns if column not in present]:
            raise ValueError(f"{file} has no column {', '.join(missing)}; it has: {', '.join(present)}")
        found = reader.iter_batches(batch_size=64, columns=list(columns))
        while True:
            with naming(str(file)):
                batch = next(found, None)
            if batch is None:
                return
            yield batch


def num_rows(file: Path) -> int:
    with open_parquet(file) as reader:
        return reader.metadata.num_rows


def open_parquet(file: Path) -> Any:
    parquet = imported("pyarrow.parquet")
    try:
        return parquet.ParquetFile(file)
    except (FileNotFoundError, PermissionError):
        raise
    except (ValueError, OSError) as error:  # pyarrow's own errors, which do not name the file
        size = file.stat().st_size
        raise ValueError(f"{file} ({size} bytes) is no parquet file; a Git LFS pointer? run git lfs pull") from error


@contextmanager
def naming(place: str) -> Iterator[None]:
    """In here an error of pyarrow becomes a ValueError of one line that names the place."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{place} cannot be read: {reason}; fetch the file again") from error


def files_in(folder: Path, split: str) -> list[Path]:
    files = sorted(folder.glob(f"data/{split}-*.parquet")) or sorted(folder.rglob(f"*{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no data/{split}-*.parquet and no other *{split}*.parquet")
    require_all_shards(files)
    return files


def require_all_shards(files: Sequence[Path]) -> None:
    """Raise FileNotFoundError for an interrupted download, which would be scored as a smaller benchmark."""
    shards: dict[tuple[Path, int], int] = defaultdict(int)
    for file in files:
        if match := re.search(r"-\d{5}-of-(\d{5})", file.name):
            shards[file.parent, int(match[1])] += 1
    for (folder, expected), found in shards.items():
        if found != expected:
            raise FileNotFoundError(f"{folder} holds {found} of {expected} parquet shards; finish the download first")


def download(repo_id: str, split: str) -> Path:
    """The folder of a split in the Hub's cache. The network is asked only where the cache does not hold all shards."""
    hub = imported("huggingface_hub")
    options = {"repo_type": "dataset", "allow_patterns": [f"{split}-*.parquet", f"*/{split}-*.parquet"]}
    try:
        folder = Path(hub.snapshot_download(repo_id, local_files_only=True, **options))
        files_in(folder, split)
        return folder
    except (FileNotFoundError, ValueError):  # the library's LocalEntryNotFoundError is a FileNotFoundError
        pass
    try:
        return Path(hub.snapshot_download(repo_id, **options))
    except Exception as error:  # the library's HTTP client, and so its errors, changed from release to release
        reason = str(error).strip().partition("\n")[0]
        raise DatasetUnavailable(
            f"dataset {repo_id} is not available from {hub.constants.ENDPOINT}: {type(error).__name__}: {reason}\n"
            f"fetch it where there is a network (hf download {repo_id} --repo-type dataset --local-dir DIR), "
            "then pass --data DIR; or set HF_ENDPOINT to a mirror"
        ) from error


def imported(module: str) -> ModuleType:
    """A library that is imported late: most runs need no benchmark files, and importing it takes half a second."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ImportError(f"{package} is needed for this data: pip install {package}") from error
