"""Downloads from a Hub of our own: what is asked of it, what is kept, what is checked, and what a person is told."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from fake_hub import COMMIT, FakeHub, Refusal, serve
from huggingface_hub.utils import get_session
from safetensors.torch import save_file
from test_checkpoint import write_shards
from torch import Tensor

from nanovlm_v2drop.loading import hub as hub_module
from nanovlm_v2drop.loading.specs import MODELS, find_spec
from nanovlm_v2drop.loading.zoo import load

ROOT = Path(__file__).parents[2]
REPO, OTHER = "llava-hf/llava-1.5-7b-hf", "somebody/fine-tuned"
SHARD = "model-00003-of-00003.safetensors"
NOT_FETCHED = {"pytorch_model.bin", "README.md", "extra.safetensors"}
# Downloads each model that is named on the command line; torch is not needed for that.
SCRIPT = """
import json, sys
from nanovlm_v2drop.loading import hub, specs
specs.WEIGHTS_FOLDER = specs.Path("weights")
for name in sys.argv[1:]:
    try:
        print(json.dumps(str(hub.download(specs.find_spec(name)))), flush=True)
    except (specs.WeightsUnavailable, ValueError) as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
"""


def environment(endpoint: str, cache: Path, settings: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    cache.mkdir(exist_ok=True)
    ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "no_proxy": "*"}
    return kept | ours | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "30"} | settings


def run_download(names: Sequence[str], endpoint: str, cache: Path, **settings: str) -> list[Any]:
    """What each download gives in a fresh process: a folder, or the kind and message of an error."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env=environment(endpoint, cache, settings),
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def hub_folder(copy_without_weights: Callable[..., Path], tiny_hub_tensors: dict[str, Tensor]) -> Path:
    """What llava-hf's repository holds, and files that nobody should fetch."""
    folder = copy_without_weights("served")
    write_shards(folder, tiny_hub_tensors)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "README.md").write_text("model card")
    (folder / "original").mkdir()
    save_file({"w": torch.zeros(1)}, folder / "original" / "extra.safetensors")
    return folder


@pytest.fixture
def hub(hub_folder: Path) -> Iterator[FakeHub]:
    with serve({REPO: hub_folder, OTHER: hub_folder}) as running:
        yield running


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.rglob("*") if file.is_file()}


def test_a_model_is_downloaded_once_and_then_nothing_is_asked(hub: FakeHub, hub_folder: Path, tmp_path: Path) -> None:
    (folder,) = run_download([f"{REPO}@main"], hub.endpoint, tmp_path / "cache")
    assert names_in(Path(folder)) == names_in(hub_folder) - NOT_FETCHED == set(hub.downloads)
    assert len(hub.downloads) == len(set(hub.downloads))
    assert all((Path(folder) / name).read_bytes() == (hub_folder / name).read_bytes() for name in hub.downloads)

    hub.requests.clear()
    assert run_download([f"{REPO}@main"], hub.endpoint, tmp_path / "cache") == [folder]
    assert hub.requests == []
    assert run_download([f"{REPO}@main"], hub.endpoint, tmp_path / "cache", HF_HUB_OFFLINE="1") == [folder]

    expected = load(hub_folder_without_index(hub_folder, tmp_path)).model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(folder).model.state_dict().items())


def hub_folder_without_index(hub_folder: Path, tmp_path: Path) -> Path:
    """The served folder without what is not fetched."""
    return Path(shutil.copytree(hub_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("original", "*.bin", "*.jinja")))


@pytest.mark.slow
def test_an_interrupted_download_continues_with_the_next_file(hub: FakeHub, hub_folder: Path, tmp_path: Path) -> None:
    hub.refusals = {f"contents of {SHARD}": Refusal(503)}
    ((kind, message),) = run_download([OTHER], hub.endpoint, tmp_path)
    assert kind == "WeightsUnavailable"
    assert "503" in message
    assert message.endswith("the Hub is out of order; try again later. Fetched files are kept")
    complete = {file.name for file in (tmp_path / "hub").rglob("snapshots/*/*")}
    assert "config.json" in complete
    assert SHARD not in complete

    hub.refusals, hub.cut, hub.downloads = {}, {SHARD: 5000}, []
    (folder,) = run_download([OTHER], hub.endpoint, tmp_path)
    assert not set(hub.downloads) & complete
    assert hub.downloads.count(SHARD) == 2  # the connection was lost once, and the rest was asked for
    assert (Path(folder) / SHARD).read_bytes() == (hub_folder / SHARD).read_bytes()


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: FakeHub, tmp_path: Path) -> None:
    hub.revisions.add("v1.5")
    tag, commit, unknown = run_download([f"{OTHER}@v1.5", f"{OTHER}@{COMMIT}", f"{OTHER}@v9"], hub.endpoint, tmp_path)
    assert tag == commit
    assert Path(tag).name == COMMIT
    kind, message = unknown
    assert kind == "WeightsUnavailable"
    assert "cannot get somebody/fine-tuned@v9 from" in message
    assert "); check the revision behind the @; http://127.0.0.1" in message


LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
REFUSALS: dict[str, tuple[Refusal | None, list[str]]] = {
    "gated/model": (
        Refusal(401, "GatedRepo", "Access to model gated/model is restricted. You must be authenticated. Please log in."),
        ["GatedRepoError", "is restricted. You must be authenticated", "accept the conditions of the model at", LOGIN],
    ),
    "refused/model": (
        Refusal(403, "GatedRepo", "Access to model refused/model is restricted and you are not in the authorized list."),
        ["you are not in the authorized list", "accept the conditions of the model at"],
    ),
    "forbidden/model": (
        Refusal(403, "", "Forbidden: your token has no read scope"),
        ["403 Forbidden", "your token has no read scope", "your token may not read this repository: give it that permission"],
    ),
    "busy/model": (
        Refusal(429, "", "We had to rate limit you", {"Retry-After": "120"}),
        ["429 Too Many Requests", "We had to rate limit you", "try again in 120 s. Fetched files are kept"],
    ),
    "disabled/model": (
        Refusal(403, "", "Access to this resource is disabled."),
        ["DisabledRepoError", "Access to this resource is disabled.", "use another checkpoint"],
    ),
    "broken/model": (Refusal(500, "", "lost the database"), ["500", "lost the database", "the Hub is out of order; try"]),
    "hotel/network": (Refusal(200), ["JSONDecodeError", "give a local copy with --weights DIR"]),
    "nobody/absent": (None, ["RepositoryNotFoundError", "check the spelling of nobody/absent", "There is no such folder here"]),
}  # fmt: skip


def test_a_refusal_is_told_with_the_hubs_whole_message_and_the_way_out(hub: FakeHub, hub_folder: Path, tmp_path: Path) -> None:
    hub.refusals = {name: refusal for name, (refusal, _) in REFUSALS.items() if refusal is not None}
    hub.repositories |= dict.fromkeys(hub.refusals, hub_folder)
    answers = dict(zip(REFUSALS, run_download([*REFUSALS], hub.endpoint, tmp_path), strict=True))
    for name, (kind, message) in answers.items():
        parts = REFUSALS[name][1]
        assert kind == "WeightsUnavailable", message
        assert message.startswith(f"{name.rpartition('/')[2]}: cannot get {name} from {hub.endpoint} (")
        assert "\n" not in message, message
        assert not [part for part in parts if part not in message], message


def test_a_token_that_is_not_accepted_is_told_as_such(hub: FakeHub, tmp_path: Path) -> None:
    hub.refused_token = Refusal(401, "", "Invalid credentials in Authorization header")
    ((_, message),) = run_download([OTHER], hub.endpoint, tmp_path, HF_TOKEN="hf_expired")
    assert "Invalid credentials in Authorization header" in message
    assert "; the Hub does not accept your token" in message
    assert "hf_expired" not in message


def test_a_file_that_the_repository_lost_is_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.refusals = {SHARD: Refusal(404, "EntryNotFound", "Entry not found")}
    ((_, message),) = run_download([OTHER], hub.endpoint, tmp_path)
    assert SHARD in message
    assert "the repository lacks this file" in message


@pytest.mark.slow
def test_a_large_file_with_another_checksum_is_removed_and_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.damaged = {SHARD}
    ((_, message),) = run_download([OTHER], hub.endpoint, tmp_path)
    assert f"DamagedDownload: {SHARD} arrived damaged: its SHA-256 is" in message
    assert message.endswith("the file was removed; run the command again to fetch it anew")
    assert SHARD not in names_in(tmp_path / "hub")
    hub.damaged = set()
    (folder,) = run_download([OTHER], hub.endpoint, tmp_path)
    assert load(folder).name == COMMIT


def test_a_model_of_an_unknown_family_or_with_quantised_weights_is_refused_before_its_weights_are_fetched(
    hub: FakeHub, hub_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((hub_folder / "config.json").read_text())
    for name, change in {
        "unknown": {"model_type": "bert"},
        "quantised": {"quantization_config": {"quant_method": "awq"}},
    }.items():
        folder = hub.repositories[f"somebody/{name}"] = tmp_path / name
        shutil.copytree(hub_folder, folder)
        (folder / "config.json").write_text(json.dumps({**config, **change}))
    unknown, quantised = run_download(["somebody/unknown", "somebody/quantised"], hub.endpoint, tmp_path / "cache")
    assert unknown[0] == quantised[0] == "CheckpointError"
    assert "bert" in unknown[1]
    assert "config.json names the quantisation awq" in quantised[1]
    assert not [name for name in hub.downloads if name.endswith(".safetensors")]


def test_an_unreachable_hub_is_told_in_one_line(tmp_path: Path) -> None:
    ((_, unreachable),) = run_download(["llava-1.5-13b"], "http://127.0.0.1:9", tmp_path)
    first, second = unreachable.split("); ")
    assert first.startswith("llava-1.5-13b: cannot get llava-hf/llava-1.5-13b-hf from http://127.0.0.1:9 (")
    assert "refused" in first
    assert second == (
        "give a local copy with --weights DIR, or fetch it where there is a network: "
        "hf download llava-hf/llava-1.5-13b-hf --local-dir weights/llava-1.5-13b"
    )
    ((_, offline),) = run_download(["llava-1.5-13b"], "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert "); unset HF_HUB_OFFLINE to download it, or give a local copy" in offline


def test_a_hub_that_says_nothing_is_given_up_after_a_bounded_time(hub: FakeHub, tmp_path: Path) -> None:
    hub.silent = {"/api/models"}
    start = time.monotonic()
    ((_, message),) = run_download([OTHER], hub.endpoint, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert time.monotonic() - start < 30  # without a bound the library waits for ever
    assert "Timeout" in message
    assert "give a local copy with --weights DIR" in message


def test_requests_without_a_time_limit_get_one_and_later_ones_are_as_before() -> None:
    session = get_session()
    before, limited = session.event_hooks["request"], {"read": 3.0, "connect": None}
    requests = [SimpleNamespace(extensions={}), SimpleNamespace(extensions={"timeout": limited})]
    with hub_module.bounded_requests():
        (hook,) = session.event_hooks["request"][len(before) :]
        for request in requests:
            hook(request)
    every = dict.fromkeys(("connect", "read", "write", "pool"), hub_module.TIMEOUT)
    assert [request.extensions["timeout"] for request in requests] == [every, {**every, "read": 3.0}]
    assert session.event_hooks["request"] == before


def test_a_model_is_in_the_cache_only_where_all_its_files_are(
    tiny_llava_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_llava_folder, tmp_path / "copy"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert hub_module.cached(find_spec(OTHER)) == folder
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert hub_module.cached(find_spec(OTHER)) is None
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "lm_tokenizer": "owner/name"}))
    assert hub_module.cached(find_spec(OTHER)) == folder  # a nanoVLM, whose tokenizer is elsewhere
    for name in ("config.json", "model.safetensors"):
        kept = (folder / name).rename(tmp_path / name)
        assert hub_module.cached(find_spec(OTHER)) is None
        kept.rename(folder / name)


@pytest.mark.slow
def test_a_hub_that_falls_silent_during_a_file_is_given_up_too(hub: FakeHub, tmp_path: Path) -> None:
    hub.silent = {"/storage/"}
    ((_, message),) = run_download([OTHER], hub.endpoint, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
    assert "Timeout" in message


def test_a_network_that_drops_packets_is_given_up_after_a_bounded_time(tmp_path: Path) -> None:
    with socket.socket() as full:  # its queue is full, so that the system drops what asks for a connection
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        start = time.monotonic()
        endpoint = f"http://127.0.0.1:{full.getsockname()[1]}"
        ((_, message),) = run_download([OTHER], endpoint, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")
        assert time.monotonic() - start < 30
        assert "Timeout" in message
        for each in waiting:
            each.close()


def test_an_interrupt_ends_a_download_at_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.silent = {"/storage/"}
    running = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, OTHER],
        env=environment(hub.endpoint, tmp_path, {"HF_HUB_DOWNLOAD_TIMEOUT": "100"}),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 60
        while not any("/storage/" in request for request in hub.requests) and time.monotonic() < deadline:
            time.sleep(0.05)
        while running.poll() is None and time.monotonic() < deadline + 20:  # far below the time limit of the request
            running.send_signal(signal.SIGINT)  # again and again: Python loses one that falls into a destructor
            time.sleep(2)
    finally:
        running.kill()
    assert running.returncode != 0


def test_a_named_model_at_a_revision_comes_from_the_hub_and_without_one_from_weights(
    tiny_llava_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovlm_v2drop.loading.specs.WEIGHTS_FOLDER", tmp_path)
    (tmp_path / "llava-1.5-7b").symlink_to(tiny_llava_folder)
    (tmp_path / "fine-tuned").symlink_to(tiny_llava_folder)
    assert find_spec("llava-1.5-7b").has_local_copy
    assert find_spec(REPO) == MODELS["llava-1.5-7b"]
    assert not find_spec("llava-1.5-7b@main").has_local_copy
    assert not find_spec("somebody/fine-tuned").has_local_copy  # another model than the one of this name


BAD_NAMES = {
    "llava-9": "unknown model 'llava-9'; choose one of: demo, .* or an id of the Hugging Face Hub as OWNER/NAME",
    "a/b/c": "unknown model 'a/b/c'",
    "../secret": r"unknown model '\.\./secret'",
    "https://huggingface.co/a/b": "unknown model 'https://huggingface.co/a/b'",
    "owner/na me": "unknown model 'owner/na me'",
    "llava-1.5-7b@": "'llava-1.5-7b@' has no usable revision behind the @; give a branch, tag or commit",
    "llava-1.5-7b@../x": "has no usable revision",
    "llava-1.5-7b@x/../../y": "has no usable revision",
    "owner/name@a b": "has no usable revision",
    "demo@main": "'demo@main' has no usable revision",
    "": "unknown model ''",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_can_be_no_model_is_refused_before_anything_is_asked(name: str) -> None:
    with pytest.raises(ValueError, match=BAD_NAMES[name]):
        find_spec(name)
