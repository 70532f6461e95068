"""A run's folder: one run at a time writes to it, and all its answers are made with the same settings."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..loading.zoo import VisionLanguageModel
from ..models.config import read_json_object
from ..models.parallel import ALONE, Processes
from ..tasks import Task
from .batches import BatchSize
from .fingerprints import data_fingerprint, held_fingerprint, method_fingerprint, model_fingerprint
from .plans import Plan
from .records import read_records

LOCK, SETTINGS = "run.lock", "settings.json"
OPTIONAL = ("data of ", "method ", "batch size of ")  # settings of a task or a method, which an earlier run may not have had


@contextmanager
def claimed(output: Path, processes: Processes = ALONE) -> Iterator[None]:
    """In here no other run may write to the folder, which is made. Of several processes the first holds the lock for all.

    The kernel releases the lock when the process ends, however it ends. Raises ValueError where another run holds it.
    """
    if not processes.is_first:
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    with open(output / LOCK, "r+b", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_CREAT)) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                advice = f"{error.strerror}: choose an --output on a disk that has locks"
                raise OSError(error.errno, advice, file.name) from error
            holder = file.read(20).decode(errors="replace").strip() or "unknown"
            raise ValueError(
                f"another run (process {holder}) is writing to {output}: wait until it ends, or choose another --output"
            ) from error
        file.truncate(0)
        with suppress(OSError):  # the number is for the message alone; a full disk shows at the first answer
            file.write(f"{os.getpid()}\n".encode())
        yield


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: whoever reads it finds the old content or the new one, whatever interrupts this."""
    aside = path.with_name(f"{path.name}.part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def run_settings(vlm: VisionLanguageModel, task: Task, plans: Sequence[Plan], size: BatchSize) -> dict[str, str]:
    """What answers depend on, by name."""
    methods = {plan.method: plan.kind for plan in plans if plan.kind is not None}
    return {
        "weights": held_fingerprint(vlm.model.state_dict()) if vlm.folder is None else model_fingerprint(vlm.folder),
        "dtype": vlm.precision.noted,
        "template": vlm.template,
        "image_processor": repr(vlm.image_processor),
        "sampling": repr(vlm.sampling),
        f"data of {task.name}": data_fingerprint(task.files) if task.files else "drawn",
        batch_size_of(task): str(size),
        **{f"method {name}": method_fingerprint(method) for name, method in methods.items()},
    }


def batch_size_of(task: Task) -> str:
    """The name of a setting."""
    return f"batch size of {task.name}"


def batch_size_before(task: Task, output: Path) -> BatchSize | None:
    """The size of batches that is noted for this task; None where none is, and where the folder holds no answers.

    A run may be interrupted after its settings are noted and before the task's first answer.
    """
    if not read_records(output):
        return None
    noted = settings_before(output / SETTINGS).get(batch_size_of(task))
    return None if noted is None else BatchSize.parse(noted)


def check_same_settings(settings: dict[str, str], output: Path, answered: bool | None = None) -> None:
    """Note in `output`/settings.json what makes the answers.

    `answered`: whether answers lie there; by default, samples.jsonl tells. Raises ValueError where they were made otherwise,
    with both values, and where nothing tells how they were made.
    """
    path = output / SETTINGS
    answered = bool(read_records(output)) if answered is None else answered
    before = settings_before(path) if answered else {}
    changed = [
        f"{name} {before.get(name, 'not noted')}, not {value}"
        for name, value in settings.items()
        if before and before.get(name, None if name.startswith(OPTIONAL) else "not noted") not in (None, value)
    ]
    if changed:
        raise ValueError(f"{output} holds answers made with {'; '.join(changed)}; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**before, **settings}, indent=1) + "\n")


def settings_before(path: Path) -> dict[str, str]:
    """What the answers beside this file were made with; raises ValueError where it does not tell."""
    remedy = f"nothing tells how the answers in {path.parent} were made, so choose another --output"
    if not path.is_file():
        raise ValueError(f"there is no {path}: {remedy}")
    try:
        found = read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if not found:
        raise ValueError(f"{path} notes nothing: {remedy}")
    return found
