"""A run's folder: one run at a time, one set of settings, and nothing half written."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_records import record

from nanovlm_v2drop.evaluation.output import check_same_settings, claimed, write_whole
from nanovlm_v2drop.evaluation.records import append_records
from nanovlm_v2drop.models.parallel import Processes

SETTINGS = {"weights": "sha256:1", "dtype": "torch.float32", "data of demo": "drawn", "method v2drop": "sha256:2"}
HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom nanovlm_v2drop.evaluation.output import claimed\n"
    "with claimed(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"
)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_is_held_by_one_run_until_it_ends_however_it_ends(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    expected = rf"another run \(process {holder.pid}\) is writing to {tmp_path}: wait until it ends, or choose another --output"
    for _ in range(2):
        with pytest.raises(ValueError, match=expected), claimed(tmp_path):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for _ in range(2):
        with claimed(tmp_path):
            assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"


def test_the_first_of_several_processes_holds_the_folder_for_all(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with claimed(tmp_path, Processes(rank=1, world_size=2)):
        pass
    with pytest.raises(ValueError, match="another run"), claimed(tmp_path, Processes(rank=0, world_size=2)):
        pass


def test_settings_are_noted_and_those_of_more_tasks_and_methods_are_added(tmp_path: Path) -> None:
    check_same_settings(SETTINGS, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "settings.json").read_text()) == SETTINGS
    append_records(tmp_path / "new" / "samples.jsonl", [record("0")])
    other = {**SETTINGS, "data of pope": "sha256:3", "method fastv": "sha256:4"}
    del other["method v2drop"]
    check_same_settings(other, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "settings.json").read_text()) == {**SETTINGS, **other}


@pytest.mark.parametrize("name", SETTINGS)
def test_answers_made_otherwise_are_refused_with_both_values(name: str, tmp_path: Path) -> None:
    check_same_settings(SETTINGS, tmp_path)
    append_records(tmp_path / "samples.jsonl", [record("0")])
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(ValueError, match=f"holds answers made with {name} {SETTINGS[name]}, not other; choose another"):
        check_same_settings({**SETTINGS, name: "other"}, tmp_path)
    assert (tmp_path / "settings.json").read_bytes() == before


def test_settings_without_an_answer_bind_nobody(tmp_path: Path) -> None:
    check_same_settings(SETTINGS, tmp_path)
    check_same_settings({**SETTINGS, "dtype": "torch.bfloat16"}, tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["dtype"] == "torch.bfloat16"


@pytest.mark.parametrize("content", [b"", b'{"weights": "sha', b"[1]", b"\xff\xfe", b"{}", None, b"[" * 200_000])
def test_settings_that_do_not_tell_are_replaced_without_answers_and_refused_beside_answers(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_bytes(content)
    check_same_settings(SETTINGS, tmp_path)
    assert json.loads(path.read_text()) == SETTINGS
    append_records(tmp_path / "samples.jsonl", [record("0")])
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}.*nothing tells how the answers in {tmp_path} were made"):
        check_same_settings(SETTINGS, tmp_path)


def test_settings_of_an_older_release_are_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"weights": "/a/folder", "dtype": "torch.float32"}')
    append_records(tmp_path / "samples.jsonl", [record("0")])
    with pytest.raises(ValueError, match="made with weights /a/folder, not sha256:1; choose"):
        check_same_settings(SETTINGS, tmp_path)


def write_without_room(path: Path) -> None:
    """Every write fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        write_whole(path, "new" * 10)
    except OSError as error:
        sys.exit(0 if str(path) in str(error) else 3)


@pytest.mark.parametrize("old", [None, "old"])
def test_a_write_that_fails_leaves_the_old_file_and_names_it(old: str | None, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    if old is not None:
        path.write_text(old)
    process = multiprocessing.get_context("fork").Process(target=write_without_room, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (path.read_text() if path.exists() else None) == old
    assert [file for file in tmp_path.iterdir() if file != path] == []
