"""Quantised copies: what is written is what is read, everything else is refused, and no file stays mapped."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import logits_of

from nanovlm_v2drop import Request, load, save_quantised
from nanovlm_v2drop.benchmark.loading import write_checkpoint
from nanovlm_v2drop.loading import quantised, saving, zoo
from nanovlm_v2drop.loading.files import CheckpointError
from nanovlm_v2drop.loading.precision import Precision
from nanovlm_v2drop.loading.saving import new_folder
from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.models.config import TextConfig
from nanovlm_v2drop.models.linear import QuantisedLinear
from nanovlm_v2drop.models.linear_int4 import int4_obstacle

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(int4_obstacle(CPU) is not None, reason=f"int4: {int4_obstacle(CPU)}")
NAMES = ("int8", "int4")
FIRST = "quantised-00001.safetensors"


def logits(vlm: VisionLanguageModel) -> torch.Tensor:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (42, 42, 3), dtype=np.uint8))
    return logits_of(vlm.model, vlm.prepare([Request(text="What?", images=[picture])]))


@pytest.fixture(scope="module", params=NAMES)
def original(request: pytest.FixtureRequest) -> VisionLanguageModel:
    return load("demo", dtype=request.param)


@pytest.fixture
def copy(original: VisionLanguageModel, tmp_path: Path) -> Path:
    save_quantised(original, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_copy_computes_exactly_what_the_original_does(original: VisionLanguageModel, copy: Path) -> None:
    vlm = load(copy)
    assert torch.equal(logits(vlm), logits(original))
    assert str(vlm.precision) == f"{original.precision} (auto: the folder holds {original.precision} weights)"
    assert {type(module) for module in vlm.model.modules()} == {type(module) for module in original.model.modules()}


def test_a_copy_in_several_files_is_the_same(
    original: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "FILE_BYTES", 1_000_000)
    save_quantised(original, tmp_path)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 1_000_000 + 20_000  # with its header
    assert torch.equal(logits(load(tmp_path)), logits(original))


HEAD = "language_model.lm_head"


def tied_folder(folder: Path, head: float | None = None) -> Path:
    """demo-video, a decoder of Qwen2, with tied embeddings; if asked for, the head is stored too, with `head` added."""
    shutil.copytree(load("demo-video").folder, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{HEAD}.weight"]
    stored = {} if head is None else {f"{HEAD}.weight": tensors["language_model.model.embed_tokens.weight"] + head}
    save_file({**tensors, **stored}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_biases_and_a_tied_head_are_in_the_copy(name: str, tmp_path: Path) -> None:
    original = load(tied_folder(tmp_path / "model"), dtype=name)
    save_quantised(original, tmp_path / "copy")
    stored = load_file(tmp_path / "copy" / FIRST)
    biases = [name for name in stored if name.endswith("q_proj.bias") and "language" in name]
    assert len(biases) == original.config.text_config.num_hidden_layers
    assert f"{HEAD}.q" in stored
    copied = load(tmp_path / "copy")
    for name, tensor in copied.model.state_dict().items():
        assert torch.equal(tensor, original.model.state_dict()[name]), name
    assert torch.equal(logits(copied), logits(original))


@pytest.mark.parametrize("name", NAMES)
def test_a_tied_head_that_is_stored_must_equal_the_embeddings(name: str, tmp_path: Path) -> None:
    heads = [load(tied_folder(tmp_path / str(head), head), dtype=name).model.language_model.lm_head for head in (None, 0)]
    assert torch.equal(heads[0].q, heads[1].q)
    with pytest.raises(CheckpointError, match=r"ties lm_head to embed_tokens .* but the stored two differ"):
        load(tied_folder(tmp_path / "other", 1), dtype=name)


def test_a_copy_is_smaller_by_what_the_widths_say(original: VisionLanguageModel, copy: Path) -> None:
    sizes = {file.suffix: file.stat().st_size for file in copy.iterdir() if file.suffix == ".safetensors"}
    matrices = [module for module in original.model.modules() if isinstance(module, QuantisedLinear)]
    others = sum(tensor.nbytes for tensor in original.model.state_dict().values())
    assert sizes[".safetensors"] < 1.15 * (sum(module.read_bytes for module in matrices) + others)


def test_other_dtypes_of_a_copy_are_refused(original: VisionLanguageModel, copy: Path) -> None:
    with pytest.raises(ValueError, match=f"holds {original.precision} weights, not bfloat16; leave the dtype out"):
        load(copy, dtype="bfloat16")
    assert load(copy, dtype=original.precision.name).precision == original.precision
    with pytest.raises(ValueError, match=r"holds int\d weights, which cannot run: it is for CPUs, not meta; load the original"):
        load(copy, device="meta")


def test_processes_cannot_share_a_copy(original: VisionLanguageModel, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "find_place", lambda *_: (CPU, object()))
    with pytest.raises(ValueError, match=f"tensor_parallel with {original.precision.name} weights is not possible; use bfl"):
        load(copy)


def test_transformers_finds_no_weights_in_a_copy(copy: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForImageTextToText.from_pretrained(copy)


def test_only_quantised_models_from_a_folder_can_be_written_and_only_into_a_new_one(
    original: VisionLanguageModel, copy: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is loaded with float32 weights; load it with dtype int8 or int4 first"):
        save_quantised(load("demo"), tmp_path / "float")
    with pytest.raises(FileExistsError, match="is not empty; give a new folder"):
        save_quantised(original, copy)


def test_the_files_of_a_copy_follow_the_umask(original: VisionLanguageModel, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_quantised(original, tmp_path / "copy")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "copy").iterdir()} == {"0o640"}


def test_a_place_that_can_be_no_folder_is_told_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for target in (file, file / "deep" / "copy"):
        with pytest.raises(FileExistsError, match=rf"^{target} cannot be a folder: {file} is a file; give a new folder$"):
            new_folder(target)
    assert new_folder(tmp_path / "new" / "copy").is_dir()
    monkeypatch.setattr(saving.os, "access", lambda *_: False)
    with pytest.raises(
        PermissionError, match=f"^{tmp_path / 'new' / 'copy'} cannot be written to: no permission; give another"
    ):
        new_folder(tmp_path / "new" / "copy")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=f"^{tmp_path / 'other'} cannot be written to: Permission denied; give another"):
        new_folder(tmp_path / "other")


def test_a_bad_folder_ends_the_command_before_the_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(saving, "load", lambda *_, **__: pytest.fail("the model is read"))
    monkeypatch.setattr(sys, "argv", ["saving", "demo", str(tmp_path / "file"), "--dtype", "int8"])
    with pytest.raises(SystemExit) as stop:
        saving.main()
    assert stop.value.code == 2


def test_the_folder_of_the_command_may_be_in_the_home_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["saving", "demo", "~/copy", "--dtype", "int8"])
    saving.main()
    assert capsys.readouterr().out == f"wrote 0.01 GB to {tmp_path / 'copy'}\n"


FULL = """
import resource, signal, sys
from nanovlm_v2drop.loading import saving
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = ["saving", "demo", sys.argv[1], "--dtype", "int8"]
saving.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it needs a limit to the size of files")
def test_a_file_that_cannot_be_written_ends_the_command_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "copy")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"error: {tmp_path / 'copy' / FIRST} cannot be written: " in line
    assert line.endswith("; remove its folder and make room, or give another folder")


def test_a_tensor_in_two_files_of_a_copy_is_refused(copy: Path) -> None:
    index = copy / "quantised.safetensors.index.json"
    save_file({f"{HEAD}.scale": load_file(copy / FIRST)[f"{HEAD}.scale"]}, copy / "quantised-00002.safetensors")
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**places, f"{HEAD}.scale": "quantised-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"no place for: language_model\.lm_head\.scale .*language_model\.lm_head\.scale"):
        load(copy)


def test_the_index_of_the_original_shards_is_not_in_the_copy(original: VisionLanguageModel, tmp_path: Path) -> None:
    sharded = Path(shutil.copytree(original.folder, tmp_path / "sharded"))
    (sharded / "model.safetensors").rename(sharded / "a.safetensors")
    places = dict.fromkeys(load_file(sharded / "a.safetensors"), "a.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    vlm = load(sharded, dtype=original.precision.name)
    save_quantised(vlm, tmp_path / "copy")
    assert not (tmp_path / "copy" / "model.safetensors.index.json").exists()
    assert torch.equal(logits(load(tmp_path / "copy")), logits(vlm))


def test_a_link_out_of_the_folder_is_not_copied(original: VisionLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.txt").write_text("of another folder")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link to"):
        save_quantised(replace(original, folder=tmp_path / "model"), tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


def test_a_matrix_that_the_4_bit_kernel_does_not_take_is_refused_before_it_is_read(original: VisionLanguageModel) -> None:
    linears = {"language_model.layers.0.mlp.up_proj": torch.nn.Linear(64, 70, device="meta")}
    with pytest.raises(ValueError, match="not 70 x 64; use int8"):
        quantised.expected_forms(original.model, linears, Precision("int4", torch.float32))


def change_config(copy: Path, **settings: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= settings
    (copy / "config.json").write_text(json.dumps(config))


def test_a_copy_with_an_unknown_dtype_or_layout_is_refused(copy: Path) -> None:
    change_config(copy, layout="AVX2")
    with pytest.raises(CheckpointError, match="was written for the kernels of AVX2"):
        load(copy)
    change_config(copy, dtype="int3")
    with pytest.raises(CheckpointError, match="unknown dtype 'int3'"):
        load(copy)


def test_the_integers_of_the_other_dtype_are_refused(copy: Path, original: VisionLanguageModel) -> None:
    other = "int4" if original.precision.name == "int8" else "int8"
    change_config(copy, dtype=other, layout=quantised.layout_of(other))
    with pytest.raises(CheckpointError, match="lacks tensors of the quantised copy"):
        load(copy)


Tensors = dict[str, torch.Tensor]
DAMAGES: dict[str, Callable[[Tensors], object]] = {
    "lacks tensors of the quantised copy: language_model.lm_head.scale": lambda tensors: tensors.pop(f"{HEAD}.scale"),
    "no place for: more": lambda tensors: tensors.update(more=torch.zeros(1)),
    r"disagree: language_model.lm_head.q .* is \(3, 64\) in I8": lambda t: t.update({f"{HEAD}.q": torch.zeros(3, 64).char()}),
    r"disagree: language_model.lm_head.scale .* in F16": lambda t: t.update({f"{HEAD}.scale": t[f"{HEAD}.scale"].half()}),
    "1 of .* values that are not finite": lambda tensors: tensors[f"{HEAD}.scale"][:1].fill_(float("nan")),
    "negative scales": lambda tensors: tensors[f"{HEAD}.scale"][:1].fill_(-1),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_copy_is_refused_by_name(message: str, copy: Path) -> None:
    tensors = load_file(copy / FIRST)
    DAMAGES[message](tensors)
    save_file(tensors, copy / FIRST)
    index = copy / "quantised.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, FIRST)}))
    with pytest.raises(CheckpointError, match=message):
        load(copy)


@pytest.mark.parametrize("multiple", [0, 19])
def test_multiples_that_would_not_fit_into_int8_are_refused(multiple: int, tmp_path: Path) -> None:
    save_quantised(load("demo", dtype="int4"), tmp_path)
    tensors = load_file(tmp_path / FIRST)
    next(tensor for name, tensor in tensors.items() if name.endswith(".multiples"))[0, 0] = multiple
    save_file(tensors, tmp_path / FIRST)
    with pytest.raises(CheckpointError, match=r"has values beyond 1 \.\.\. 18"):
        load(tmp_path)


MAPPED = """
import sys
from nanovlm_v2drop import load
vlm = load(sys.argv[1], dtype=sys.argv[2])
assert vlm.precision.is_quantised
print([line.split()[-1] for line in open("/proc/self/maps") if ".safetensors" in line])
"""


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="what is mapped is read from /proc")
@pytest.mark.parametrize("source", ["float", "float of the dtype that is kept", "copy"])
def test_no_file_stays_mapped_behind_quantised_weights(
    source: str, copy: Path, original: VisionLanguageModel, tmp_path: Path
) -> None:
    folder = str(copy) if source == "copy" else "demo"
    if "kept" in source:
        folder = str(shutil.copytree(original.folder, tmp_path / "kept"))
        tensors = load_file(tmp_path / "kept" / "model.safetensors")
        kept = {name: tensor.to(original.dtype) for name, tensor in tensors.items()}
        save_file(kept, tmp_path / "kept" / "model.safetensors")
    command = [sys.executable, "-c", MAPPED, folder, original.precision.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PEAK = """
import sys, threading, torch
from dataclasses import replace
from pathlib import Path
from nanovlm_v2drop.benchmark.loading import load_ours
from nanovlm_v2drop.benchmark.memory import resident
from nanovlm_v2drop.models.memory import trim

def anonymous():
    return resident("self")["anonymous_mb"]

torch.set_num_threads(1)
load_ours(Path(sys.argv[2]), sys.argv[3])  # a small one: what the libraries need once
trim()  # of what the small one needed itself, or the large one would take it over
before, most, ended = anonymous(), [0.0], threading.Event()

def watch():
    while not ended.wait(0.0005):
        most.append(anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_ours(Path(sys.argv[1]), sys.argv[3])
ended.set()
watcher.join()
print(max(most) - before, anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize(("name", "width"), [("int8", 1.0), ("int4", 0.55)])
def test_the_memory_of_loading_a_float_checkpoint_is_near_that_of_the_quantised_weights(
    name: str, width: float, tmp_path: Path
) -> None:
    shape = TextConfig(vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8)
    for folder, layers in (("large", 12), ("small", 1)):
        (tmp_path / folder).mkdir()
        write_checkpoint(tmp_path / folder, replace(shape, num_hidden_layers=layers), 500, torch.float16)
    weights = (tmp_path / "large" / "model.safetensors").stat().st_size / 2e6  # millions
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large"), str(tmp_path / "small"), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, left = map(float, done.stdout.split())
    assert 0.95 * width * weights < left <= peak  # malloc has had some free memory
    assert peak < 1.7 * width * weights + 20  # in float16 it is 2 a weight; malloc keeps freed pieces between the matrices
