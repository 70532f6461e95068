"""Checkpoints from the Hugging Face Hub: files in its cache are used as they are, the others are downloaded and checked.

The Hub is the one that huggingface_hub is set to (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN). Importing this file takes
a second, so that only a model which is not in this repository does it.
"""

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import get_session

from ..models.config import VLMConfig, read_json_object
from .files import CheckpointError, check_folder, has_tokenizer, weight_files
from .specs import MODELS, ModelSpec, WeightsUnavailable

SETTINGS_FILES = ("*.json", "*.jinja", "tokenizer.model")
WEIGHT_FILES = ("*.safetensors",)  # only these: a repository may hold the same weights as pickles too
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "tokenizer.model")
TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds that the Hub may say nothing; 10, or what the environment says
WORKERS = 8  # files at a time, as many as huggingface_hub
SHA256_LENGTH = 64  # hexadecimal digits


class DamagedDownload(OSError):
    """A file arrived with other contents than the Hub announced."""


def download(spec: ModelSpec, read_config: Callable[[Path], object] = VLMConfig.from_folder) -> Path:
    """The folder of a model in the Hub's cache, downloaded where it is not complete there; nothing is asked if it is.

    An interrupted download continues with the next file. The settings come first, so that a model of an unknown family is
    refused before its weights are fetched: `read_config` reads them from a folder, and raises ValueError.
    Raises WeightsUnavailable where the Hub does not give them, CheckpointError for a checkpoint that could not be loaded.
    """
    try:
        return cached(spec) or fetched(spec, read_config)
    except CheckpointError:
        raise
    except Exception as error:  # the library's HTTP client, and so its errors, changed from release to release
        raise unavailable(spec, error) from error


def cached(spec: ModelSpec) -> Path | None:
    """The model's folder in the cache, where all its files are there."""
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                str(spec.repository),
                revision=spec.revision,
                allow_patterns=[*SETTINGS_FILES, *WEIGHT_FILES],
                ignore_patterns=["*/*"],
                local_files_only=True,
            )
        )
        weight_files(folder)
    except (errors.LocalEntryNotFoundError, FileNotFoundError, CheckpointError):
        return None
    config = folder / "config.json"
    if not config.is_file():
        return None
    elsewhere = "lm_tokenizer" in read_json_object(config)  # nanoVLM's comes from another repository
    return folder if elsewhere or has_tokenizer(folder) else None


def download_tokenizer(repository: str) -> Path:
    """The folder of a tokenizer in the Hub's cache, downloaded where it is not there.

    Raises WeightsUnavailable where the Hub does not give it.
    """
    try:
        with suppress(errors.LocalEntryNotFoundError):
            folder = Path(
                huggingface_hub.snapshot_download(repository, allow_patterns=[*TOKENIZER_FILES], local_files_only=True)
            )
            if has_tokenizer(folder):
                return folder
        with bounded_requests():
            info = huggingface_hub.HfApi().model_info(repository, timeout=TIMEOUT)
            names = wanted([file.rfilename for file in info.siblings or () if "/" not in file.rfilename], TOKENIZER_FILES)
            fetch_all(repository, str(info.sha), names)
            return Path(huggingface_hub.snapshot_download(repository, allow_patterns=names))
    except Exception as error:  # as in `download`
        reason = failure(ModelSpec("the model's tokenizer", "", repository), error)
        raise WeightsUnavailable(f"{reason}; copy tokenizer.json of {repository} into the folder of the model") from error


def fetched(spec: ModelSpec, read_config: Callable[[Path], object]) -> Path:
    """Download what the cache lacks; raises what huggingface_hub raises, DamagedDownload, and as `download`."""
    repository = str(spec.repository)
    with bounded_requests():
        info = huggingface_hub.HfApi().model_info(repository, revision=spec.revision, timeout=TIMEOUT)
        names = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
        settings, weights = (wanted(names, patterns) for patterns in (SETTINGS_FILES, WEIGHT_FILES))
        files = fetch_all(repository, str(info.sha), settings)
        check_settings(files, read_config)
        fetch_all(repository, str(info.sha), weights)
        # Everything is there now; this notes in the cache which files the revision has.
        patterns = [*settings, *weights]
        return Path(huggingface_hub.snapshot_download(repository, revision=spec.revision, allow_patterns=patterns))


def check_settings(files: Sequence[Path], read_config: Callable[[Path], object]) -> None:
    """Raise CheckpointError where the small files of a checkpoint show that it cannot be loaded."""
    for folder in {file.parent for file in files}:
        check_folder(folder)
        try:
            read_config(folder)
        except (ValueError, FileNotFoundError) as error:
            raise CheckpointError(str(error)) from error


def wanted(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))


@contextmanager
def bounded_requests() -> Iterator[None]:
    """Give a time limit to the library's requests that have none, since it waits for ever for a Hub that says nothing."""

    def bound(request: Any) -> None:
        limits = request.extensions.get("timeout") or {}
        steps = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {step: TIMEOUT if limits.get(step) is None else limits[step] for step in steps}

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "request": [*hooks.get("request", ()), bound]}
    try:
        yield
    finally:
        session.event_hooks = hooks


def fetch_all(repository: str, commit: str, names: Sequence[str]) -> list[Path]:
    """Fetch files a few at a time; raises the first error.

    The threads are daemons: Ctrl-C ends the program at once, where a pool of threads would wait for files of gigabytes.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[Path | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()
    for name in names:
        waiting.put(name)

    def work() -> None:
        while not stopped.is_set() and not waiting.empty():
            try:
                done.put(fetch(repository, commit, waiting.get_nowait()))
            except queue.Empty:
                return
            except BaseException as error:
                done.put(error)

    for _ in range(min(WORKERS, len(names))):
        threading.Thread(target=work, daemon=True).start()
    try:
        return [raise_or_return(done.get()) for _ in names]
    finally:
        stopped.set()


def raise_or_return(outcome: Path | BaseException) -> Path:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def fetch(repository: str, commit: str, name: str) -> Path:
    """One file, from the cache or the Hub; a new one is compared with the checksum that the Hub announced."""
    known = huggingface_hub.try_to_load_from_cache(repository, name, revision=commit)
    file = Path(huggingface_hub.hf_hub_download(repository, name, revision=commit))
    if not isinstance(known, str):
        check_download(file)
    return file


def check_download(file: Path) -> None:
    """Compare a file of the cache with the SHA-256 in the name of its blob, and remove it where it differs.

    Only large files have one. On a file system without links the name of the blob is not kept, and nothing is compared.
    Raises DamagedDownload.
    """
    if not file.is_symlink():
        return
    blob = file.parent / file.readlink()
    if len(blob.name) != SHA256_LENGTH or blob.is_symlink():  # a linked blob is Xet's, which has compared it
        return
    with blob.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != blob.name:
        file.unlink()
        blob.unlink()
        raise DamagedDownload(f"{file.name} arrived damaged: its SHA-256 is {found}, not {blob.name}")


def unavailable(spec: ModelSpec, error: Exception) -> WeightsUnavailable:
    """What was tried, and what to do about it, in one line."""
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    return WeightsUnavailable(f"{failure(spec, error)}; {advice(spec, cause if isinstance(cause, Exception) else error)}")


def failure(spec: ModelSpec, error: Exception) -> str:
    """What was tried, with the library's whole message."""
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    reasons = [f"{type(each).__name__}: {' '.join(str(each).split())}" for each in (error, cause) if each is not None]
    revision = "" if spec.revision is None else f"@{spec.revision}"
    return f"{spec.name}: cannot get {spec.repository}{revision} from {constants.ENDPOINT} ({'; '.join(reasons)})"


def advice(spec: ModelSpec, error: Exception) -> str:
    """What helps against an error of the Hub."""
    page = f"{constants.ENDPOINT}/{spec.repository}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    target = os.path.relpath(spec.folder) if spec.name in MODELS else spec.name
    revision = "" if spec.revision is None else f" --revision {spec.revision}"
    elsewhere = (
        "give a local copy with --weights DIR, or fetch it where there is a network: "
        f"hf download {spec.repository}{revision} --local-dir {target}"
    )
    by_kind: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, f"accept the conditions of the model at {page}, then {login}"),
        (errors.DisabledRepoError, "its owner or the Hub has closed this repository; use another checkpoint"),
        (errors.RevisionNotFoundError, f"check the revision behind the @; {page}/tree/main lists branches, tags and commits"),
        (errors.EntryNotFoundError, f"the repository lacks this file; look at {page}/tree/main, or try again"),
        (errors.OfflineModeIsEnabled, f"unset HF_HUB_OFFLINE to download it, or {elsewhere}"),
        (DamagedDownload, "the file was removed; run the command again to fetch it anew"),
        (PermissionError, "make the Hub's cache writable, or set HF_HOME to another folder"),
    )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and huggingface_hub.get_token() is not None and not isinstance(error, errors.GatedRepoError):
        return f"the Hub does not accept your token, or it may not read this repository; make a new one and {login}"
    for kind, text in by_kind:
        if isinstance(error, kind):
            return text
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return f"check the spelling of {spec.repository}; if the repository is private, {login}. There is no such folder here"
    return by_status(status, error) or elsewhere


def by_status(status: int | None, error: Any) -> str | None:
    """Advice for an HTTP status; None for one that says nothing about the way out."""
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} s" if wait else "later"
        return f"the Hub takes no more requests from you now; try again {when}. Fetched files are kept"
    if status == 403:
        return "your token may not read this repository: give it that permission, or use another one with HF_TOKEN"
    if status == 401:
        return "log in with `hf auth login`, or set HF_TOKEN"
    if status is not None and status >= 500:
        return "the Hub is out of order; try again later. Fetched files are kept"
    return None
