"""Folders that must not be loaded: adapters, quantised weights, files outside of them, and files that may not be read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import DOWN_PROJ, write_shards
from torch import Tensor

from nanovlm_v2drop.loading import files
from nanovlm_v2drop.loading.files import CheckpointError
from nanovlm_v2drop.loading.zoo import load

Tensors = dict[str, Tensor]
LORA = {
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf",
}  # fmt: skip


@pytest.fixture
def folder(copy_without_weights: Callable[..., Path], tiny_hub_tensors: Tensors) -> Path:
    """A whole checkpoint, to be spoiled."""
    copied = copy_without_weights("spoiled")
    save_file(tiny_hub_tensors, copied / "model.safetensors")
    return copied


def put(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def change_config(folder: Path, **changes: Any) -> None:
    put(folder, "config.json", {**json.loads((folder / "config.json").read_text()), **changes})


def change_depth(folder: Path, section: str) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change_config(folder, **{section: {**raw[section], "num_hidden_layers": 900}})


def rename(folder: Path, tensors: Tensors, new_name: Callable[[str], str]) -> None:
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def add(folder: Path, tensors: Tensors, suffix: str, dtype: torch.dtype = torch.float32) -> None:
    more = {DOWN_PROJ.removesuffix("weight") + suffix: torch.ones(4, dtype=dtype)}
    save_file({**tensors, **more}, folder / "model.safetensors")


def add_lora(folder: Path) -> None:
    put(folder, "adapter_config.json", LORA)
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(4, 8)}, folder / "adapter_model.safetensors")


def lora_alone(folder: Path, whole: bool) -> None:
    add_lora(folder)
    for name in ("model.safetensors", "config.json") if whole else ("model.safetensors",):
        (folder / name).unlink()


Spoil = Callable[[Path, Tensors], Any]
MERGE = r"merge it into its base model .*merge_and_unload\(\)\.save_pretrained"
REFUSED: dict[str, tuple[Spoil, str]] = {
    "adapter beside the weights": (
        lambda f, _: add_lora(f),
        r"holds an adapter \(adapter_config\.json\), .*into its base model \(llava-hf/llava-1\.5-7b-hf\) .*merge_and_unload",
    ),
    "adapter without base": (lambda f, _: lora_alone(f, False), r"holds an adapter \(adapter_config\.json\)"),
    "adapter without config.json": (lambda f, _: lora_alone(f, True), r"holds an adapter \(adapter_config\.json\)"),
    "adapter as a pickle": (lambda f, _: (f / "adapter_model.bin").write_bytes(b"x"), MERGE),
    "adapter of LLaVA": (lambda f, _: (f / "non_lora_trainables.bin").write_bytes(b"x"), r"scripts/merge_lora_weights\.py"),
    "adapter weights alone": (lambda f, _: (f / "adapter_model.safetensors").write_bytes(b"x"), MERGE),
    "adapter not merged": (lambda f, t: add(f, t, "lora_A.default.weight"), r"holds an adapter \(tensors such as .*lora_A"),
    "adapter with a base layer": (
        lambda f, t: rename(f, t, lambda name: name.replace("q_proj.", "q_proj.base_layer.")),
        r"holds an adapter \(tensors such as .*base_layer",
    ),
    "saved by peft": (lambda f, t: rename(f, t, lambda name: f"base_model.model.{name}"), r"holds an adapter \(tensors such"),
    "GPTQ in config.json": (
        lambda f, _: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"is a quantised checkpoint \(config\.json names the quantisation gptq with 4 bits\), which is not supported; use the",
    ),
    "bitsandbytes in config.json": (
        lambda f, _: change_config(f, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"names the quantisation bitsandbytes with 8 bits",
    ),
    "fp8 in text_config": (
        lambda f, _: change_config(f, text_config={"quantization_config": {"quant_method": "fp8"}}),
        r"names the quantisation fp8\)",
    ),
    "compressed tensors in config.json": (
        lambda f, _: change_config(f, compression_config={"quant_method": "compressed-tensors"}),
        r"names the quantisation compressed-tensors\)",
    ),
    "AWQ in InternVL's llm_config": (
        lambda f, _: change_config(f, llm_config={"quantization_config": {"quant_method": "awq", "bits": 4}}),
        r"names the quantisation awq with 4 bits\)",
    ),
    "a text as quantisation": (lambda f, _: change_config(f, quantization_config="awq"), r"names the quantisation 'awq'"),
    "AutoGPTQ's file": (lambda f, _: put(f, "quantize_config.json", {"bits": 4}), r"it holds quantize_config\.json"),
    "AWQ's file": (lambda f, _: put(f, "quant_config.json", {"w_bit": 4}), r"it holds quant_config\.json"),
    "ModelOpt's file": (lambda f, _: put(f, "hf_quant_config.json", {}), r"it holds hf_quant_config\.json"),
    "GPTQ tensors": (lambda f, t: add(f, t, "qweight", torch.int32), r"\(GPTQ or AWQ: it stores .*down_proj\.qweight"),
    "AWQ zeros": (lambda f, t: add(f, t, "qzeros", torch.int32), r"\(GPTQ or AWQ: it stores .*down_proj\.qzeros"),
    "bitsandbytes 4 bits": (
        lambda f, t: add(f, t, "weight.quant_state.bitsandbytes__nf4", torch.uint8),
        r"\(bitsandbytes: it stores .*quant_state\.bitsandbytes__nf4",
    ),
    "bitsandbytes 8 bits": (lambda f, t: add(f, t, "SCB"), r"\(bitsandbytes: it stores .*down_proj\.SCB"),
    "compressed tensors": (
        lambda f, t: add(f, t, "weight_packed", torch.int32),
        r"\(compressed-tensors: it stores .*down_proj\.weight_packed",
    ),
    "block-wise fp8": (lambda f, t: add(f, t, "weight_scale_inv"), r"\(FP8 or INT8: it stores .*weight_scale_inv"),
    "AQLM": (lambda f, t: add(f, t, "codebooks", torch.float16), r"\(other: it stores .*down_proj\.codebooks"),
    "HQQ": (lambda f, t: add(f, t, "W_q", torch.uint8), r"\(other: it stores .*down_proj\.W_q"),
    "input scales": (lambda f, t: add(f, t, "input_scale"), r"\(FP8 or INT8: it stores .*down_proj\.input_scale"),
    "GGUF": (
        lambda f, _: (f / "model.safetensors").rename(f / "llava-q4.gguf"),
        r"is a quantised checkpoint \(it holds llava-q4\.gguf\)",
    ),
    "more decoder layers than are stored": (
        lambda f, _: change_depth(f, "text_config"),
        r"config\.json says num_hidden_layers 900, but the weights hold 6 decoder layers; is it the config\.json of",
    ),
    "more vision layers than are stored": (
        lambda f, _: change_depth(f, "vision_config"),
        r"says vision_config\.num_hidden_layers 900, but the weights hold 4 vision layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_with_other_weights_than_are_wanted_is_refused_in_one_line(
    case: str, folder: Path, tiny_hub_tensors: Tensors
) -> None:
    spoil, message = REFUSED[case]
    spoil(folder, tiny_hub_tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_quantisation_that_is_null_is_none(folder: Path) -> None:
    change_config(folder, quantization_config=None)
    load(folder)


# Shards outside of the folder


OUTSIDE = {
    "above": lambda place: "../elsewhere/a.safetensors",
    "above and back": lambda place: "../spoiled/../elsewhere/a.safetensors",
    "above, from inside": lambda place: "inner/../../elsewhere/a.safetensors",
    "absolute": lambda place: str(place / "elsewhere" / "a.safetensors"),
    "above on Windows": lambda place: "..\\elsewhere\\a.safetensors",
    "drive": lambda place: "C:\\weights\\a.safetensors",
    "drive without a root": lambda place: "C:a.safetensors",
    "other machine": lambda place: "\\\\server\\share\\a.safetensors",
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_an_index_names_no_file_outside_of_its_folder(case: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "inner").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "elsewhere" / "a.safetensors")
    put(folder, "model.safetensors.index.json", {"weight_map": {DOWN_PROJ: OUTSIDE[case](tmp_path)}})
    with pytest.raises(CheckpointError, match="which is not in its folder; such files are never opened"):
        load(folder)


@pytest.mark.parametrize("linked", ["shard", "folder of the shard", "model.safetensors", "a.safetensors"])
def test_a_link_does_not_lead_out_of_the_folder(linked: str, folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    stored = (folder / "model.safetensors").rename(elsewhere / "a.safetensors")
    if linked == "shard":
        (folder / "a.safetensors").symlink_to(stored)
        put(folder, "model.safetensors.index.json", {"weight_map": {DOWN_PROJ: "a.safetensors"}})
    elif linked.endswith(".safetensors"):  # the only file
        (folder / linked).symlink_to(stored)
    else:
        (folder / "inner").symlink_to(elsewhere)
        put(folder, "model.safetensors.index.json", {"weight_map": {DOWN_PROJ: "inner/a.safetensors"}})
    with pytest.raises(CheckpointError, match=r"is a link to .*elsewhere/a\.safetensors, outside of its folder.*copy it"):
        load(folder)


def test_links_inside_of_the_folder_and_to_the_folder_itself_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "model.safetensors").rename(folder / "inner" / "a.safetensors")
    (folder / "b.safetensors").symlink_to("inner/a.safetensors")
    put(folder, "model.safetensors.index.json", {"weight_map": {DOWN_PROJ: "b.safetensors"}})
    (tmp_path / "link").symlink_to(folder)
    load(tmp_path / "link")


@pytest.mark.parametrize("shared", [False, True])
def test_the_links_of_the_hubs_cache_are_followed(
    shared: bool, folder: Path, tiny_hub_tensors: Tensors, tmp_path: Path
) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (folder / "model.safetensors").unlink()
    write_shards(folder, tiny_hub_tensors)
    for number, file in enumerate(folder.iterdir()):
        shutil.move(file, tmp_path / f"shared{number}" if shared else blobs / f"blob{number}")
        if shared:  # the cache may keep a blob once for several repositories
            (blobs / f"blob{number}").symlink_to(f"../../shared{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    load(snapshot)
    shard = snapshot / "model-00001-of-00003.safetensors"
    shutil.copy(shard, tmp_path / "elsewhere")
    shard.unlink()
    shard.symlink_to("../../../elsewhere")
    with pytest.raises(CheckpointError, match=r"is a link to .*elsewhere, outside of its folder"):
        load(snapshot)


# Files that may not be read


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@pytest.mark.parametrize("name", ["model.safetensors", "a.safetensors"])
def test_a_pipe_is_no_file_of_weights(name: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / name)
    with pytest.raises(FileNotFoundError, match=r"spoiled has no \*\.safetensors file; is the download complete\?"):
        load(folder)


def test_a_file_of_another_user_is_not_called_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(CheckpointError, match=r"model\.safetensors may not be read by this user .*chmod a\+r") as caught:
        load(folder)
    assert "download" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read_it_is_told_as_such(folder: Path) -> None:
    (folder / "model.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match="may not be read by this user"):
        load(folder)


def test_a_written_file_may_be_read_by_whom_other_new_files_may(tmp_path: Path) -> None:
    files.write_safetensors({"one": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    modes = {file.name: file.stat().st_mode for file in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_names_are_listed_up_to_a_limit() -> None:
    assert files.listed("abcde") == "a, b, c and 2 more"
    assert files.listed("abc") == "a, b, c"
