"""Benchmarks that are stored as parquet files, in a folder or on the Hugging Face Hub: which files, which rows, which cells."""

import importlib
import re
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from .base import Sample, Task, accuracy_of, spread
from .rows import Row


class DatasetUnavailable(RuntimeError):
    """The Hub did not give the data; the message says what was tried and what to do."""


class ParquetTask(Task):
    """A benchmark whose samples are the rows of parquet files."""

    score_name = "accuracy, %"
    until = ("\n\n",)  # what lmms-eval takes where a task names nothing
    repo_id: ClassVar[str]
    split: ClassVar[str] = "test"
    config: ClassVar[str] = ""  # the folder of a set of data, where a repository has several; or its only file
    columns: ClassVar[tuple[str, ...]]  # what `sample` reads
    kind_columns: ClassVar[tuple[str, ...]] = ()  # a limit takes as many rows of each combination of their values

    @cached_property
    def row_files(self) -> Sequence[Path]:
        """The files whose rows are the questions. Raises as `dataset_files`."""
        return dataset_files(self.repo_id, self.split, self.data_dir, self.config)

    @property
    def files(self) -> Sequence[Path]:
        return self.row_files

    def num_rows(self) -> int:
        """From the metadata of the files: no row is read. Raises ValueError for files without rows."""
        total = sum(num_rows(file) for file in self.row_files)
        if not total:
            raise ValueError(f"{self.row_files[0]} holds no rows: {self.name} has no sample; fetch the data again")
        return total

    def num_samples(self, limit: int | None = None) -> int:
        total = self.num_rows()
        return total if limit is None else min(limit, total)

    def samples(self, limit: int | None = None) -> Iterator[Sample]:
        self.num_rows()
        return map(self.sample, self.read(self.columns, self.positions(limit)))

    def positions(self, limit: int | None) -> Collection[int] | None:
        """The rows that a run with this limit takes; None is every row."""
        if limit is None:
            return None
        if not self.kind_columns:
            return spread([()] * self.num_rows(), limit)
        return spread([tuple(map(row.key, self.kind_columns)) for row in self.read(self.kind_columns)], limit)

    @abstractmethod
    def sample(self, row: Row) -> Sample:
        """The sample of a row with the values of `columns`. Raises ValueError with the place of a cell of another kind."""

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """`score`: the mean of what `correct` gives, in percent; and the same of each kind."""
        return accuracy_of(records, self.name)

    def sample_ids(self) -> list[str]:
        """One id a row, in the order of the data; no two are alike. By default the row's number, as lmms-eval's doc_id."""
        return [str(number) for number in range(self.num_rows())]

    def read(self, columns: Sequence[str], positions: Collection[int] | None = None) -> Iterator[Row]:
        """The rows at these positions (None: all of them) with the ids of their samples."""
        ids = self.sample_ids()
        wanted = ids if positions is None else [ids[position] for position in sorted(set(positions))]
        for sample_id, row in zip(wanted, read_rows(self.row_files, columns, positions), strict=True):
            yield row.named(sample_id)


def unique_ids(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The names that the data give their rows, each with the file and the row where several rows share it."""
    times = Counter(names)
    pairs = zip(names, rows, strict=True)
    return [name if times[name] == 1 else f"{name}@{row.file.name}:{row.number}" for name, row in pairs]


def dataset_files(repo_id: str, split: str, local_dir: Path | None, config: str = "") -> list[Path]:
    """Find the parquet files of one split, in order: in a folder, or on the Hub, from which missing files are downloaded.

    A folder holds `data/SPLIT-*.parquet`, as a clone of the dataset does, or `*SPLIT*.parquet` anywhere below it; with a
    `config` it holds `CONFIG/SPLIT-*.parquet`. It may also hold several datasets, each in a subfolder with its own name
    (POPE, MME).
    The Hub is the one that huggingface_hub is set to (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE). Later runs use its cache.

    Raises:
        FileNotFoundError: the folder or its files are not there, or a shard is missing.
        DatasetUnavailable: the Hub cannot be reached or does not give the dataset.
    """
    if local_dir is None:
        files_of = partial(files_in, repo_id=repo_id, split=split, config=config)
        return files_from_hub(repo_id, patterns_of(split, config), files_of)
    return files_in(dataset_folder(repo_id, split, local_dir, config), repo_id, split, config)


def dataset_folder(repo_id: str, split: str, local_dir: Path, config: str = "") -> Path:
    """The folder itself, or its subfolder with the dataset's own name. Raises FileNotFoundError for what is no folder."""
    folder = Path(local_dir)
    if not folder.is_dir():
        held = f"{config or 'data'}/{split}-*.parquet"
        raise FileNotFoundError(f"{folder} is no folder; give the one that holds {held} of {repo_id}")
    dataset_name = repo_id.split("/")[-1].lower()
    named = [child for child in sorted(folder.iterdir()) if child.is_dir() and child.name.lower() == dataset_name]
    return named[0] if named else folder


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


def files_in(folder: Path, repo_id: str, split: str, config: str = "") -> list[Path]:
    """The files of a split of a dataset; `config` is the folder that holds it, or the file (MMStar).

    Raises FileNotFoundError where there are none, or a shard is missing.
    """
    if is_file(config) and (folder / config).is_file():
        return [folder / config]
    if config and not is_file(config):
        files = sorted(folder.glob(f"{config}/{split}-*.parquet"))
        wanted = f"no {config}/{split}-*.parquet"
    else:
        files = sorted(folder.glob(f"data/{split}-*.parquet")) or sorted(folder.rglob(f"*{split}*.parquet"))
        wanted = f"no data/{split}-*.parquet and no other *{split}*.parquet"
    if not files:
        fetching = f"hf download {repo_id} --repo-type dataset --local-dir DIR"
        raise FileNotFoundError(f"{folder} holds {wanted} of {repo_id}; fetch it ({fetching}), then pass --data DIR")
    require_all_shards(files)
    return files


def is_file(config: str) -> bool:
    """Whether a set of data is named by its file and not by its folder."""
    return config.endswith(".parquet")


def require_all_shards(files: Sequence[Path]) -> None:
    """Raise FileNotFoundError for an interrupted download, which would be scored as a smaller benchmark."""
    shards: dict[tuple[Path, int], int] = defaultdict(int)
    for file in files:
        if match := re.search(r"-\d{5}-of-(\d{5})", file.name):
            shards[file.parent, int(match[1])] += 1
    for (folder, expected), found in shards.items():
        if found != expected:
            raise FileNotFoundError(f"{folder} holds {found} of {expected} parquet shards; finish the download first")


def patterns_of(split: str, config: str = "") -> list[str]:
    """What the files of a split are called on the Hub."""
    anywhere = [f"{split}-*.parquet", f"*/{split}-*.parquet"]
    return anywhere if not config else [*anywhere, config] if is_file(config) else [f"{config}/{split}-*.parquet"]


def files_from_hub(
    repo_id: str, patterns: Sequence[str], files_of: Callable[[Path], list[Path]], revision: str = "main"
) -> list[Path]:
    """What `files_of` finds in the data set's folder in the Hub's cache. It raises FileNotFoundError for a missing file.

    The network is asked only where the cache does not hold all of them. Raises DatasetUnavailable.
    """
    hub = imported("huggingface_hub")
    options = {"repo_type": "dataset", "revision": revision, "allow_patterns": list(patterns)}
    try:
        return files_of(Path(hub.snapshot_download(repo_id, local_files_only=True, **options)))
    except (FileNotFoundError, ValueError):  # the library's LocalEntryNotFoundError is a FileNotFoundError
        return files_of(fetch(repo_id, patterns, revision))


def fetch(repo_id: str, patterns: Sequence[str], revision: str = "main") -> Path:
    """Fetch the files of a data set that match; returns its folder in the Hub's cache. Raises DatasetUnavailable."""
    hub = imported("huggingface_hub")
    with told_as_unavailable(repo_id):
        return Path(hub.snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=list(patterns)))


def fetch_file(repo_id: str, name: str, revision: str = "main") -> None:
    """Fetch one file of a data set into the Hub's cache; none where the data set has no such file.

    Raises DatasetUnavailable.
    """
    hub = imported("huggingface_hub")
    with told_as_unavailable(repo_id), suppress(hub.errors.EntryNotFoundError):
        hub.hf_hub_download(repo_id, name, repo_type="dataset", revision=revision)


@contextmanager
def told_as_unavailable(repo_id: str) -> Iterator[None]:
    """In here any error becomes a DatasetUnavailable that says what to do."""
    try:
        yield
    except Exception as error:  # the library's HTTP client, and so its errors, changed from release to release
        endpoint, reason = imported("huggingface_hub").constants.ENDPOINT, str(error).strip().partition("\n")[0]
        raise DatasetUnavailable(
            f"dataset {repo_id} is not available from {endpoint}: {type(error).__name__}: {reason}; "
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
