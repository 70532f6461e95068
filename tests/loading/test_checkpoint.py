"""Every dialect of official names loads to the model that transformers makes of it, and nothing else loads at all."""

import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import official_names, tiny_reference, tiny_tokenizer, with_prefixes
from safetensors.torch import load_file, save_file
from tiny import logits_of
from torch import Tensor

from nanovlm_v2drop.loading import checkpoint
from nanovlm_v2drop.loading.checkpoint import load_model
from nanovlm_v2drop.loading.files import CheckpointError
from nanovlm_v2drop.loading.precision import named_precision
from nanovlm_v2drop.models.config import VLMConfig
from nanovlm_v2drop.models.linear import PrepackedLinear, can_prepack
from nanovlm_v2drop.models.vlm import LlavaModel, VisionInput

Tensors = dict[str, Tensor]
CopyWithoutWeights = Callable[..., Path]
CPU = torch.device("cpu")
DOWN_PROJ = "language_model.model.layers.3.mlp.down_proj.weight"
OUR_DOWN_PROJ = "language_model.layers.3.mlp.down_proj.weight"


def load_folder(folder: Path, dtype: torch.dtype = torch.float32) -> LlavaModel:
    config, precision = VLMConfig.from_folder(folder), named_precision(dtype, CPU)
    return load_model(folder, config, device=CPU, precision=precision, attention="sdpa")


def assert_matches(model: LlavaModel, reference: Any, tolerance: float = 1e-5) -> None:
    """Vision features, projected features and logits equal transformers', relative to the largest value."""
    pixel_values = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    image = [model.config.image_token_id] * 36
    prompt = [1, 300, *image, 301, 302, 5]
    tower = reference.model.vision_tower(pixel_values, output_hidden_states=True)
    projected = reference.model.get_image_features(pixel_values)
    pairs = {
        "vision": (model.vision_tower(pixel_values), tower.hidden_states[-2][:, 1:]),
        "projected": (model.encode_images(pixel_values)[0], getattr(projected, "pooler_output", projected)[0]),
        "logits": (
            logits_of(model, model.pack([prompt], [[VisionInput(pixel_values, ((1, 6, 6),), (42, 42))]], (0,))),
            reference(input_ids=torch.tensor([prompt]), pixel_values=pixel_values).logits[0],
        ),
    }
    for name, (ours, theirs) in pairs.items():
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance, f"{name}: {error}"


def without_vision_model(tensors: Tensors) -> Tensors:
    return {name.replace(".vision_model.", "."): tensor for name, tensor in tensors.items()}


def new_names(tensors: Tensors) -> Tensors:
    short = {
        name.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "language_model."): tensor
        for name, tensor in without_vision_model(tensors).items()
    }
    return {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in short.items()}


def original_names(tensors: Tensors) -> Tensors:
    replacements = {
        "vision_tower.vision_model.": "model.vision_tower.vision_tower.vision_model.",
        "multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "language_model.": "",
    }
    return with_prefixes(tensors, replacements)


def with_leftovers(tensors: Tensors) -> Tensors:
    """Tensors that old versions of transformers saved and nobody needs."""
    return tensors | {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(37)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
    }


DIALECTS: dict[str, Callable[[Tensors], Tensors]] = {
    "hub": dict,
    "hub with leftovers": with_leftovers,
    "transformers 5": without_vision_model,
    "new": new_names,
    "original": original_names,
}


def write_shards(folder: Path, tensors: Tensors, num_shards: int = 3) -> list[Path]:
    """Save as `num_shards` files with an index."""
    files = [folder / f"model-{shard + 1:05}-of-{num_shards:05}.safetensors" for shard in range(num_shards)]
    weight_map = {name: files[position % num_shards].name for position, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name, shard in weight_map.items() if shard == file.name}, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_outputs_of_transformers(
    dialect: str, copy_without_weights: CopyWithoutWeights, tiny_hub_tensors: Tensors, tiny_reference_model: Any
) -> None:
    folder = copy_without_weights()
    save_file(DIALECTS[dialect](tiny_hub_tensors), folder / "model.safetensors")
    assert_matches(load_folder(folder), tiny_reference_model)


@pytest.mark.parametrize("original_format", [True, False])
def test_what_transformers_saves_itself_loads(original_format: bool, tmp_path: Path, tiny_reference_model: Any) -> None:
    major = int(pytest.importorskip("transformers").__version__.split(".")[0])
    options = {"save_original_format": original_format} if major >= 5 else {}
    tiny_reference_model.save_pretrained(tmp_path, **options)
    assert_matches(load_folder(tmp_path), tiny_reference_model)


def test_shards_load_to_the_same_weights_as_one_file(
    copy_without_weights: CopyWithoutWeights, tiny_llava_folder: Path, tiny_hub_tensors: Tensors
) -> None:
    folder = copy_without_weights()
    write_shards(folder, tiny_hub_tensors)
    expected = load_folder(tiny_llava_folder).state_dict()
    for name, tensor in load_folder(folder).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_one_file_comes_before_an_index(copy_without_weights: CopyWithoutWeights, tiny_hub_tensors: Tensors) -> None:
    folder = copy_without_weights()
    save_file(tiny_hub_tensors, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "of-another-copy.safetensors"}}')
    assert torch.equal(load_folder(folder).state_dict()[OUR_DOWN_PROJ], tiny_hub_tensors[DOWN_PROJ])


def test_a_lone_safetensors_file_may_have_any_name(copy_without_weights: CopyWithoutWeights, tiny_hub_tensors: Tensors) -> None:
    folder = copy_without_weights()
    save_file(tiny_hub_tensors, folder / "weights.safetensors")
    assert torch.equal(load_folder(folder).state_dict()[OUR_DOWN_PROJ], tiny_hub_tensors[DOWN_PROJ])


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_the_float32_values_of_what_they_store(
    stored: torch.dtype, copy_without_weights: CopyWithoutWeights, tiny_hub_tensors: Tensors
) -> None:
    folder = copy_without_weights()
    halves = {name: tensor.to(stored) for name, tensor in tiny_hub_tensors.items()}
    save_file(halves, folder / "model.safetensors")
    model = load_folder(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.state_dict()[OUR_DOWN_PROJ], halves[DOWN_PROJ].float())


def test_the_model_is_ready_for_inference(tiny_llava_folder: Path) -> None:
    model = load_folder(tiny_llava_folder, torch.bfloat16)
    assert not model.training
    assert model.language_model.attention == "sdpa"
    assert {(p.dtype, p.device, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, CPU, False)}


def test_the_last_vision_block_is_neither_built_nor_needed(
    copy_without_weights: CopyWithoutWeights, tiny_hub_tensors: Tensors, tiny_reference_model: Any
) -> None:
    folder = copy_without_weights()
    used = {k: v for k, v in tiny_hub_tensors.items() if "encoder.layers.3." not in k and "post_layernorm" not in k}
    assert len(used) == len(tiny_hub_tensors) - 18
    save_file(used, folder / "model.safetensors")
    model = load_folder(folder)
    assert len(model.vision_tower.encoder.layers) == 3
    assert_matches(model, tiny_reference_model)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """transformers' model with tied embeddings, and its folder, which stores no head."""
    folder = tmp_path_factory.mktemp("tied")
    reference = tiny_reference(tiny_tokenizer(), tie_word_embeddings=True)
    reference.config.save_pretrained(folder)
    tensors = official_names(reference.state_dict())
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    return reference, folder


def test_tied_embeddings_need_no_stored_head_and_are_one_parameter(tied: tuple[Any, Path]) -> None:
    reference, folder = tied
    model = load_folder(folder)
    assert model.language_model.lm_head.weight is model.language_model.embed_tokens.weight
    assert_matches(model, reference)


def test_a_stored_head_must_equal_the_embeddings_that_it_is_tied_to(tied: tuple[Any, Path], tmp_path: Path) -> None:
    tensors = load_file(tied[1] / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tied[1] / "config.json").read_bytes())
    head = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors | {"language_model.lm_head.weight": head}, tmp_path / "model.safetensors")
    model = load_folder(tmp_path)
    assert model.language_model.lm_head.weight is model.language_model.embed_tokens.weight
    save_file(tensors | {"language_model.lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"ties lm_head to embed_tokens .* but the stored two differ"):
        load_folder(tmp_path)


def test_the_only_name_that_is_stored_of_a_tied_tensor_may_be_that_of_the_head(tied: tuple[Any, Path], tmp_path: Path) -> None:
    reference, folder = tied
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.lm_head.weight"] = tensors.pop("language_model.model.embed_tokens.weight")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    assert_matches(load_folder(tmp_path), reference)
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks tensors of the model: language_model\.embed_tokens\.weight; is the down"):
        load_folder(tmp_path)


def test_weights_in_the_dtype_of_the_file_stay_in_the_mapped_file(tiny_llava_folder: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("needs Linux's list of mapped files")
    model = load_folder(tiny_llava_folder)
    file = str(tiny_llava_folder / "model.safetensors")
    lines = [line.split() for line in maps.read_text().splitlines() if line.endswith(file)]
    ranges = [tuple(int(bound, 16) for bound in line[0].split("-")) for line in lines]
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges), name


def test_converting_holds_one_stored_tensor_at_a_time(tiny_llava_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts = []
    original = checkpoint.check_finite

    def counted(stored: Tensor, *arguments: Any) -> Tensor:
        alive.add(stored)
        counts.append(len(alive))
        return original(stored, *arguments)

    monkeypatch.setattr(checkpoint, "check_finite", counted)
    model = load_folder(tiny_llava_folder, torch.float64)
    assert len(counts) == len(model.state_dict())
    assert set(counts) == {1}


@pytest.mark.skipif(not can_prepack(torch.device("cpu")), reason="this processor has no fast bfloat16")
def test_bfloat16_on_a_cpu_is_loaded_prepacked_and_computes_the_same(tiny_llava_folder: Path) -> None:
    model, plain = load_folder(tiny_llava_folder, torch.bfloat16), load_folder(tiny_llava_folder, torch.float32).bfloat16()
    assert not [module for module in model.modules() if type(module) is torch.nn.Linear]
    for name, module in model.named_modules():
        if isinstance(module, PrepackedLinear):
            assert torch.equal(module.weight, plain.get_submodule(name).weight), name


BLOCK = "vision_tower.vision_model.encoder.layers"
EDITS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (
        lambda t: [t.pop(name) for name in list(t) if "layers.2.mlp" in name and "vision" not in name],
        r"copy lacks tensors of the model: language_model\.layers\.2\.mlp\.gate_proj\.weight, .* complete\?",
    ),
    "missing many": (
        lambda t: [t.pop(name) for name in list(t) if "self_attn.o_proj" in name],
        r"layers\.0\.self_attn\.o_proj\.weight, .*layers\.2\.self_attn\.o_proj\.weight and 3 more; is the download",
    ),
    "unexpected": (
        lambda t: t.update(image_newline=torch.zeros(48)),
        r"no place for: image_newline \(model\.safetensors\); is this a checkpoint of a known family",
    ),
    "deeper tower": (
        lambda t: t.update({f"{BLOCK}.9.mlp.fc1.bias": torch.zeros(64)}),
        r"no place for: vision_tower\.vision_model\.encoder\.layers\.9\.mlp\.fc1\.bias",
    ),
    "shape": (
        lambda t: t.update({DOWN_PROJ: torch.zeros(48, 95)}),
        r"layers\.3\.mlp\.down_proj\.weight \(model\.safetensors\) is \(48, 95\), not \(48, 96\)",
    ),
    "nan": (
        lambda t: t.update({DOWN_PROJ: t[DOWN_PROJ].where(torch.arange(96) != 7, torch.nan)}),
        r"layers\.3\.mlp\.down_proj\.weight \(model\.safetensors\) has 48 of 4608 values that are not finite",
    ),
    "infinity": (
        lambda t: t.update({DOWN_PROJ: t[DOWN_PROJ].where(torch.arange(96) != 7, -torch.inf)}),
        r"down_proj\.weight \(model\.safetensors\) has 48 of 4608 values that are not finite; download it again",
    ),
    "twice": (
        lambda t: t.update({DOWN_PROJ.replace("language_model.model.", "model."): t[DOWN_PROJ].clone()}),
        r"stores language_model\.layers\.3\.mlp\.down_proj\.weight twice: as language_model\.model\.layers\.3\..* and "
        r"as model\.layers\.3\.mlp",
    ),
    "quantised": (
        lambda t: t.update({DOWN_PROJ: t[DOWN_PROJ].to(torch.int8), f"{DOWN_PROJ}_scale": torch.ones(48)}),
        r"is a quantised checkpoint \(FP8 or INT8: it stores language_model\.model\.layers\.3\.mlp\.down_proj\.weight_scale "
        r"\(model\.safetensors\)\), which is not supported; use the original checkpoint with 16- or 32-bit weights",
    ),
    "integers": (
        lambda t: t.update({DOWN_PROJ: t[DOWN_PROJ].to(torch.int8)}),
        r"quantised weights are not supported: .*down_proj\.weight \(model\.safetensors\) is I8; use a checkpoint in one of "
        r"F64, F32, F16, BF16",
    ),
    "float8": (
        lambda t: t.update({DOWN_PROJ: t[DOWN_PROJ].to(torch.float8_e4m3fn)}),
        r"down_proj\.weight \(model\.safetensors\) is F8_E4M3",
    ),
    "no tower": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("vision_tower.")],
        r"stores no vision tower: .* leave CLIP's weights out; .*llava-v1\.5-7b is llava-hf/llava-1\.5-7b-hf",
    ),
}


def test_layers_that_are_not_stored_are_refused_before_any_is_built(
    copy_without_weights: CopyWithoutWeights, tiny_hub_tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_without_weights()
    save_file(tiny_hub_tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["num_hidden_layers"] = 1000
    (folder / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr(checkpoint, "MODEL_CLASSES", {})  # building any model would now be a KeyError
    with pytest.raises(CheckpointError, match=r"num_hidden_layers 1000, but the weights hold 6 decoder layers;"):
        load_folder(folder)


@pytest.mark.parametrize("edit", EDITS)
def test_weights_that_are_not_exactly_the_models_are_refused_by_name(
    edit: str, copy_without_weights: CopyWithoutWeights, tiny_hub_tensors: Tensors
) -> None:
    change, message = EDITS[edit]
    tensors = dict(tiny_hub_tensors)
    change(tensors)
    folder = copy_without_weights()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_folder(folder)


def test_values_too_large_for_the_dtype_asked_for_are_refused(
    copy_without_weights: CopyWithoutWeights, tiny_hub_tensors: Tensors
) -> None:
    folder = copy_without_weights()
    save_file(tiny_hub_tensors | {DOWN_PROJ: torch.full((48, 96), 1e5)}, folder / "model.safetensors")
    load_folder(folder, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"too large for torch\.float16; load it in float32 or bfloat16"):
        load_folder(folder, torch.float16)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def make_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 456\n")


def drop_one_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors[DOWN_PROJ]
    save_file(tensors, file)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, r"{name} \(\d+ bytes\) is no complete safetensors file: .*; download it again"),
    "empty": (lambda file: file.write_bytes(b""), r"{name} \(0 bytes\) is no complete safetensors file"),
    "pointer": (make_pointer, r"{name} \(\d+ bytes\) is no complete safetensors file: .* needs git lfs pull"),
    "absent": (Path.unlink, r"index\.json names shards that are not there: {name}; finish the download"),
    "incomplete": (drop_one_tensor, r"{name} lacks .*layers\.3\.mlp\.down_proj\.weight, which the index places there"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named(damage: str, copy_without_weights: CopyWithoutWeights, tiny_hub_tensors: Tensors) -> None:
    spoil, message = DAMAGES[damage]
    folder = copy_without_weights()
    shard = next(file for file in write_shards(folder, tiny_hub_tensors) if DOWN_PROJ in load_file(file))
    spoil(shard)
    with pytest.raises(CheckpointError, match=message.replace("{name}", re.escape(shard.name))):
        load_folder(folder)


@pytest.mark.parametrize("content", ['{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_weight_map_is_refused(content: str, copy_without_weights: CopyWithoutWeights) -> None:
    folder = copy_without_weights()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
        load_folder(folder)


def test_an_index_that_is_not_json_is_refused(copy_without_weights: CopyWithoutWeights) -> None:
    folder = copy_without_weights()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(CheckpointError, match=r"index\.json is not valid JSON.*download it again"):
        load_folder(folder)


def test_several_files_without_an_index_are_refused(
    copy_without_weights: CopyWithoutWeights, tiny_hub_tensors: Tensors
) -> None:
    folder = copy_without_weights()
    write_shards(folder, tiny_hub_tensors)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has 3 safetensors files but no model\.safetensors\.index\.json"):
        load_folder(folder)


def test_pickles_are_never_loaded_and_the_error_names_the_safetensors_twins(
    copy_without_weights: CopyWithoutWeights,
) -> None:
    folder = copy_without_weights()
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "mm_projector.bin"):
        (folder / name).write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=r"only pickles \(mm_projector\.bin, .* never loaded") as caught:
        load_folder(folder)
    assert "liuhaotian/llava-v1.5-7b is llava-hf/llava-1.5-7b-hf" in str(caught.value)
    assert "liuhaotian/llava-v1.5-13b is llava-hf/llava-1.5-13b-hf" in str(caught.value)


def test_a_folder_without_weights_is_named(copy_without_weights: CopyWithoutWeights) -> None:
    with pytest.raises(FileNotFoundError, match=r"copy has no \*\.safetensors file; is the download complete\?"):
        load_folder(copy_without_weights())
