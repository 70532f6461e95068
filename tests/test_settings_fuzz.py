"""Whatever the settings files of a checkpoint hold, loading it and asking it ends in an answer or in one clear line."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from nanovlm import config as nanovlm_config
from nanovlm import random_tensors, write_nanovlm_folder
from onevision import onevision_names, onevision_reference, onevision_tokenizer, write_onevision_folder
from PIL import Image
from qwen2_5_vl import qwen2_5_vl_reference, write_qwen2_5_vl_folder
from qwen2vl import qwen2vl_reference, qwen2vl_tokenizer, write_qwen2vl_folder
from qwen3_vl import qwen3_vl_reference, write_qwen3_vl_folder
from smolvlm import smollm2_tokenizer, smolvlm_reference, write_smolvlm_folder

from nanovlm_v2drop import Request, generate, load

REPORTED = (ValueError, OSError, ImportError)  # what the command line shows as one line
CPU_SECONDS = 2.0  # of one case; the clock on the wall would also count other programs
FAMILIES = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "nanovlm")
INDEX = "model.safetensors.index.json"
Folder = dict[str, Any]  # the parsed settings files of one checkpoint, by name

# Values that have broken programs before: kinds of zero, limits of number types, what other languages write for nothing.
ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, 1.5, 1e-30, 1e30, 1e400),
    *(float("nan"), float("-inf"), "", "0", "1", "NaN", "null", "</s>", "\ud800", "x" * 5000, [], {}, [[]], [None], {"": None}),
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.sampled_from(ODD) | st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@pytest.fixture(scope="module")
def folders(tiny_llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny checkpoint a family, each with every settings file that is read."""
    place = tmp_path_factory.mktemp("fuzzed")
    tokenizer = onevision_tokenizer()
    onevision = onevision_reference(tokenizer)
    tensors = onevision_names(onevision.state_dict())
    made = {
        "llava": copied(tiny_llava_folder, place / "llava"),
        "llava_onevision": write_onevision_folder(make(place / "ov"), onevision, tensors, tokenizer),
        "qwen2_vl": write_qwen2vl_folder(place / "qwen", qwen2vl_reference(qwen2vl_tokenizer()), qwen2vl_tokenizer()),
    }
    qwen2_5_vl = qwen2_5_vl_reference(qwen2vl_tokenizer())
    made["qwen2_5_vl"] = write_qwen2_5_vl_folder(place / "qwen2.5", qwen2_5_vl, qwen2vl_tokenizer())
    qwen3_vl = qwen3_vl_reference(qwen2vl_tokenizer())
    made["qwen3_vl"] = write_qwen3_vl_folder(place / "qwen3", qwen3_vl, qwen2vl_tokenizer())
    made["smolvlm"] = write_smolvlm_folder(place / "smolvlm", smolvlm_reference(smollm2_tokenizer()), smollm2_tokenizer())
    tokenizer = smollm2_tokenizer(())
    flat = nanovlm_config(tokenizer)
    made["nanovlm"] = write_nanovlm_folder(place / "nanovlm", flat, random_tensors(flat), tokenizer)
    for folder in made.values():
        complete(folder)
    return made


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def copied(source: Path, target: Path) -> Path:
    make(target)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def complete(folder: Path) -> None:
    """Add the settings files that this folder lacks, with what they hold in official checkpoints."""
    weights = folder / "model.safetensors"
    names = json.loads(weights.read_bytes()[8 : 8 + int.from_bytes(weights.read_bytes()[:8], "little")])
    shard = weights.rename(folder / "model-00001-of-00001.safetensors").name
    pictures, named, config = (
        json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        for name in ("preprocessor_config.json", "tokenizer_config.json", "config.json")
    )
    index = {"metadata": {"total_size": 1}, "weight_map": {name: shard for name in names if name != "__metadata__"}}
    extra = {
        INDEX: index,
        "generation_config.json": {"eos_token_id": [1, 2]},
        "special_tokens_map.json": {name: {"content": named[name]} for name in ("bos_token", "eos_token") if named.get(name)},
        "processor_config.json": {"image_processor": pictures, "patch_size": 14},
        "video_preprocessor_config.json": pictures if config.get("model_type", "").startswith("qwen2") else {},
    }
    for name, content in extra.items():
        if not (folder / name).is_file():
            (folder / name).write_text(json.dumps(content))


def settings_of(folder: Path) -> Folder:
    """Every settings file; tokenizer.json is not one, it is read by the library that wrote it."""
    return {file.name: json.loads(file.read_text()) for file in folder.glob("*.json") if file.name != "tokenizer.json"}


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every object or list, with each key or index in it."""
    keys = list(content) if isinstance(content, dict) else list(range(len(content))) if isinstance(content, list) else []
    return [(content, key) for key in keys] + [place for key in keys for place in places(content[key])]


CHANGES: dict[str, Callable[[Any, st.DataObject], Any]] = {
    "replaced": lambda value, data: copy.deepcopy(data.draw(values)),  # so that no later change reaches into ODD
    "in a list": lambda value, data: [value],
    "as a text": lambda value, data: str(value),
    "negative": lambda value, data: -value if type(value) in (int, float) else None,
    "scaled": lambda value, data: value * data.draw(st.sampled_from([2, 10, 0.5, 10**6])) if type(value) in (int, float) else 0,
    "repeated": lambda value, data: value * 2 if isinstance(value, list | str) else [value, value],
    "as a fraction": lambda value, data: float(value) if type(value) is int else value,
}


def change_a_value(content: Any, data: st.DataObject) -> None:
    """One entry somewhere in a file becomes another, or is gone."""
    found = places(content)
    if not found:
        return
    holder, key = data.draw(st.sampled_from(found)) if len(found) < 200 else found[data.draw(st.integers(0, len(found) - 1))]
    kind = data.draw(st.sampled_from([*CHANGES, "removed"]))
    if kind == "removed":
        del holder[key]
    else:
        holder[key] = CHANGES[kind](holder[key], data)


def damaged(text: bytes, data: st.DataObject) -> bytes:
    """A file as bytes, with some of them lost, changed or added."""
    start = data.draw(st.integers(0, len(text)))
    match data.draw(st.sampled_from(["cut", "lost", "noise", "mark", "nested", "twice"])):
        case "cut":
            return text[:start]
        case "lost":
            return text[:start] + text[start + data.draw(st.integers(1, 20)) :]
        case "noise":
            return text[:start] + data.draw(st.binary(max_size=8)) + text[start:]
        case "mark":
            return b"\xef\xbb\xbf" + text
        case "nested":
            return b'{"a":' * data.draw(st.sampled_from([10, 500, 100_000])) + text
        case _:
            return text.rstrip()[:-1] + b"," + text.lstrip()[1:]


def lay_out(source: Path, place: Path, contents: dict[str, bytes]) -> None:
    """The checkpoint `source` again, with these settings files and no others."""
    for file in place.iterdir():
        file.unlink()
    for name, content in contents.items():
        (place / name).write_bytes(content)
    for file in source.iterdir():
        if file.suffix != ".json" or file.name == "tokenizer.json":
            (place / file.name).hardlink_to(file)  # no symbolic link: one that leaves the folder is refused


def ask(folder: Path) -> bool:
    """Load and answer; only what the command line shows as one line may be raised, within the time of one case.

    Returns whether there was an answer.
    """
    started, answered = time.process_time(), False
    try:
        vlm = load(folder)
        requests = [Request(text="What?", images=[Image.new("RGB", (40, 30), (90, 20, 200))]), Request(text="digit?")]
        generate(vlm, requests, None, max_new_tokens=2)
        answered = True
    except REPORTED as error:
        message = str(error)
        assert message
        assert len(message) < 2000
    assert time.process_time() - started < CPU_SECONDS
    return answered


def fuzz_one_case(folders: dict[str, Path], place: Path, data: st.DataObject) -> None:
    """Change one to three settings, or the bytes of one file, and ask."""
    source = folders[data.draw(st.sampled_from(FAMILIES))]
    files = settings_of(source)
    name = data.draw(st.sampled_from(sorted(files)))
    if name in ("preprocessor_config.json", "video_preprocessor_config.json") and data.draw(st.booleans()):
        del files[name]  # so that processor_config.json is read
        name = "processor_config.json"
    contents = {file: json.dumps(content).encode() for file, content in files.items()}
    if data.draw(st.integers(0, 9)) == 0:
        contents[name] = damaged(contents[name], data)
    else:
        changed = copy.deepcopy(files[name])
        for _ in range(data.draw(st.integers(1, 3))):
            change_a_value(changed, data)
        contents[name] = json.dumps(changed).encode()
    lay_out(source, place, contents)
    event("answered" if ask(place) else "refused")


def fuzzed(max_examples: int) -> Callable[[Any], Any]:
    """A property test of this many cases."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=max_examples, deadline=None, suppress_health_check=checks, print_blob=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folders_that_are_changed_answer_unchanged(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    contents = {name: json.dumps(content).encode() for name, content in settings_of(folders[family]).items()}
    lay_out(folders[family], tmp_path, contents)
    assert ask(tmp_path)


@fuzzed(25)
@given(data=st.data())
def test_changed_settings_end_in_an_answer_or_in_a_clear_error(
    data: st.DataObject, folders: dict[str, Path], tmp_path: Path
) -> None:
    fuzz_one_case(folders, tmp_path, data)


@pytest.mark.slow
@fuzzed(5000)
@given(data=st.data())
def test_5000_changed_settings_end_in_an_answer_or_in_a_clear_error(
    data: st.DataObject, folders: dict[str, Path], tmp_path: Path
) -> None:
    fuzz_one_case(folders, tmp_path, data)
