"""Official checkpoints into our modules: safetensors only, and every tensor is accounted for.

A tensor without a place here, or a place that no tensor fills, is an error: a model with one random layer would still
answer. The headers of all files are matched with the model before any value is read; then the values come one by one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.config import LanguageModelConfig, LlavaConfig, Qwen2VLConfig, SmolVLMConfig, VLMConfig
from ..models.decoder import Decoder
from ..models.language_model import LanguageModel
from ..models.linear import as_bfloat16
from ..models.memory import let_go, trim
from ..models.model_classes import MODEL_CLASSES
from ..models.vlm import VLM
from .files import SAFETENSORS_TWINS, CheckpointError, StoredTensor, check_names, list_tensors, listed, open_safetensors
from .precision import Precision, check_not_split, pack_floats, packed_layers, quantise
from .tensor_parallel import split_decoder
from .uninitialised import Uninitialised

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Model = VLM | LanguageModel
Config = VLMConfig | LanguageModelConfig
Parts = Mapping[str, tuple[slice, ...]]  # our name -> the part of that tensor that is read; what is not named is read whole

# Stored name -> ours. The first pattern that matches decides; None is left out on purpose; a name that none matches
# stays as it is. The same weights are in circulation under four sets of names:
#   hub            llava-hf's files, and what transformers 4 saves
#   transformers 5 the hub's, but without `vision_model.`
#   new            transformers 5 with save_original_format=False: everything but the head is below `model.`
#   original       liuhaotian's and lmms-lab's, where the decoder itself is `model.`; Qwen2-VL's are like these
# nanoVLM has names of its own.
RENAMES: tuple[tuple[str, str | None], ...] = (
    (r".*\bposition_ids$", None),  # 0, 1, 2, ...: old versions saved it
    (r".*\brotary_emb\.inv_freq$", None),  # computed from rope_theta
    (r"(model\.)?vision_tower\.(.*\.)?post_layernorm\.", None),  # behind the layer that LLaVA reads
    (r"(model\.)?vision_tower\.(.*\.)?head\.", None),  # SigLIP's pooling
    (r"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower."),
    (r"(model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"(language_model\.)?(model\.)?image_newline$", "image_newline"),
    (r"(model\.)?visual\.", "visual."),
    (r"(model\.)?vision_model\.", "vision_tower."),  # SmolVLM's, under every set of names
    (r"(model\.)?connector\.modality_projection\.", "connector."),
    (r"(model\.)?text_model\.", "language_model."),
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),  # original: Sequential(Linear, GELU, Linear)
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"language_model\.model\.", "language_model."),  # hub, transformers 5
    (r"model\.language_model\.", "language_model."),  # new
    (r"model\.", "language_model."),  # original
    (r"lm_head\.", "language_model.lm_head."),  # new, original
    (r"vision_encoder\.patch_embedding\.conv\.", "vision_tower.embeddings.patch_embedding."),  # from here on nanoVLM
    (r"vision_encoder\.patch_embedding\.position_embedding$", "vision_tower.embeddings.position_embedding.weight"),
    (r"vision_encoder\.layer_norm\.", "vision_tower.post_layernorm."),
    (r"vision_encoder\.blocks\.(\d+)\.ln", r"vision_tower.encoder.layers.\1.layer_norm"),
    (r"vision_encoder\.blocks\.(\d+)\.attn\.", r"vision_tower.encoder.layers.\1.self_attn."),
    (r"vision_encoder\.blocks\.", "vision_tower.encoder.layers."),
    (r"MP\.", "connector."),
    (r"decoder\.rotary_embd\.inv_freq$", None),
    (r"decoder\.token_embedding\.", "language_model.embed_tokens."),
    (r"decoder\.head\.", "language_model.lm_head."),
    (r"decoder\.blocks\.(\d+)\.norm1\.", r"language_model.layers.\1.input_layernorm."),
    (r"decoder\.blocks\.(\d+)\.norm2\.", r"language_model.layers.\1.post_attention_layernorm."),
    (r"decoder\.blocks\.(\d+)\.attn\.out_proj\.", r"language_model.layers.\1.self_attn.o_proj."),
    (r"decoder\.blocks\.(\d+)\.attn\.", r"language_model.layers.\1.self_attn."),
    (r"decoder\.blocks\.", "language_model.layers."),
    (r"decoder\.norm\.", "language_model.norm."),
)
DECODER_LAYER = re.compile(r"language_model\.layers\.(\d+)\.")
VISION_BLOCK = re.compile(r"(?:vision_tower\.encoder\.layers|visual\.blocks)\.(\d+)\.")
HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.embed_tokens.weight"
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IN_MEMORY = Path("model in memory")  # the file of tensors that come from none


def load_model(
    folder: Path,
    config: Config,
    *,
    device: torch.device,
    precision: Precision,
    attention: str = "auto",
    mesh: "DeviceMesh | None" = None,
) -> Any:
    """Read an official checkpoint into the model of its configuration, ready for inference (eval mode, no gradients).

    The weights never exist twice: each tensor goes straight from the mapped file to `device` and its own form. On the CPU,
    in the dtype of the file, it stays a view of the file; do not overwrite the file while the model lives. In bfloat16 on
    a CPU, matrices are prepacked at their first product, or at once if they are converted. In int8 and int4 they are
    quantised one after the other, and no file stays mapped.

    Args:
        folder: holds model.safetensors, or shards with model.safetensors.index.json, or one other *.safetensors file.
        config: what the folder's config.json says; it decides whether a VLM or a LanguageModel comes back.
        attention: the back end, as attention.resolve_backend takes it.
        mesh: the processes that share the decoder (parallel.tensor_mesh); each reads its own part of the split matrices only.

    Raises:
        FileNotFoundError: the folder or its weights are not there.
        ValueError: the decoder cannot be split over so many processes, or not with quantised weights.
        CheckpointError: the weights are not exactly the model's, are not finite, or cannot be read.
    """
    model, sources = matched_model(list_tensors(Path(folder)), config, attention, Path(folder))
    parts = {} if mesh is None else split_parts(model.language_model, mesh)
    check_not_split(precision, mesh is not None)
    as_stored = {f"{name}.weight" for name in packed_layers(model, precision, device)}
    if precision.is_quantised:
        fill_quantised(model, sources, precision, as_stored)
    else:
        fill(model, dict(read_tensors(sources, parts, device, precision.dtype, as_stored)), parts)
        check_materialised(model)
        let_go(*model.parameters())  # every page was read to check its values
    pack_floats(model, precision, device)
    return model


def fill_quantised(model: Model, sources: dict[str, StoredTensor], precision: Precision, matrices: Set[str]) -> None:
    """Give a model on the CPU its values, and quantise each of the matrices when it is read. No file stays mapped."""
    place, tied = torch.device("cpu"), model.config.text_config.tie_word_embeddings
    later = {name: source for name, source in sources.items() if name in matrices and not (tied and name == HEAD)}
    first = {name: source for name, source in sources.items() if name not in later}
    others = read_tensors(first, {}, place, precision.dtype, set())
    fill(model, {name: tensor.clone() for name, tensor in others}, {}, strict=False)
    for name, stored in read_tensors(later, {}, place, precision.dtype, matrices):
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.weight = nn.Parameter(stored, requires_grad=False)
        quantise(model, precision)  # the other matrices have no values yet
        trim()  # of the float copies
    check_materialised(model)


def share_model(tensors: Mapping[str, Tensor], config: VLMConfig, attention: str = "auto") -> VLM:
    """Make a model of weights that are in memory under official names; they are shared, not copied.

    Raises CheckpointError where they are not exactly the model's, or are not finite.
    """
    names = {dtype: name for name, dtype in STORED_DTYPES.items()}
    stored = [
        StoredTensor(IN_MEMORY, name, tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in tensors.items()
    ]
    check_names(IN_MEMORY, stored)
    model, sources = matched_model(stored, config, attention, IN_MEMORY)
    for source in sources.values():
        check_finite(tensors[source.name], source, tensors[source.name].dtype)
    fill(model, {name: tensors[source.name][source.part] for name, source in sources.items()}, {})
    check_materialised(model)
    return model


def matched_model(
    stored: Sequence[StoredTensor], config: Config, attention: str, folder: Path
) -> tuple[Any, dict[str, StoredTensor]]:
    """A model without values, and the stored tensor of each of its parameters; raises CheckpointError as `match_tensors`."""
    check_depth(stored, config, folder)
    with torch.device("meta"), Uninitialised():
        model = MODEL_CLASSES[type(config)](config, attention)
    return model, match_tensors(stored, model, folder)


def fill(model: Model, state: dict[str, Tensor], parts: Parts, strict: bool = True) -> None:
    """Give a model its values, all of them if `strict`, and make it ready for inference."""
    tied = model.config.text_config.tie_word_embeddings
    if tied:
        state[HEAD] = tied_head(state, parts)
    model.load_state_dict(state, strict=strict, assign=True)
    if tied and not parts:
        model.language_model.lm_head.weight = model.language_model.embed_tokens.weight  # assigning has made two of them
    model.eval().requires_grad_(False)


def check_depth(stored: Sequence[StoredTensor], config: Config, folder: Path) -> None:
    """Compare the number of layers with config.json before they are built: a million layers would take minutes.

    Raises CheckpointError where the files hold fewer, or no vision tower.
    """
    names = [name for tensor in stored if (name := our_name(tensor.name)) is not None]
    if isinstance(config, LlavaConfig) and not any(name.startswith("vision_tower.") for name in names):
        raise CheckpointError(
            f"{folder} stores no vision tower: the original LLaVA checkpoints leave CLIP's weights out; "
            f"use the twin from llava-hf, which has them: {SAFETENSORS_TWINS}"
        )
    layers = config.text_config.num_hidden_layers
    needed = [("decoder", f"num_hidden_layers {layers}", DECODER_LAYER, layers)]
    match config:
        case LlavaConfig(vision_config=clip, vision_layers_run=run):
            needed.append(("vision", f"vision_config.num_hidden_layers {clip.num_hidden_layers}", VISION_BLOCK, run))
        case SmolVLMConfig(vision_config=siglip):
            depth = siglip.num_hidden_layers
            needed.append(("vision", f"vision_config.num_hidden_layers {depth}", VISION_BLOCK, depth))
        case Qwen2VLConfig(vision_config=tower):
            needed.append(("vision", f"vision_config.depth {tower.depth}", VISION_BLOCK, tower.depth))
    for what, setting, pattern, wanted in needed:
        held = 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)
        if held < wanted and (held or what == "decoder"):  # of a tower without any block, the tensors are named later
            raise CheckpointError(
                f"{folder} lacks tensors of the model: config.json says {setting}, but the weights hold {held} {what} layers; "
                "is it the config.json of this checkpoint, and is the download complete?"
            )


def our_name(stored_name: str) -> str | None:
    """Our name for a stored tensor, or None for one that is left out on purpose."""
    for pattern, replacement in RENAMES:
        if match := re.match(pattern, stored_name):
            return None if replacement is None else match.expand(replacement) + stored_name[match.end() :]
    return stored_name


def places_of(stored: StoredTensor) -> list[tuple[str | None, StoredTensor]]:
    """Our name for a stored tensor; nanoVLM's joined queries, keys and values become three, its positions lose an axis of 1."""
    name, shape = our_name(stored.name), stored.shape
    if name is not None and name.endswith("position_embedding.weight") and len(shape) == 3 and shape[0] == 1:
        return [(name, stored._replace(shape=shape[1:], part=(0,)))]
    if name is None or ".self_attn.qkv_proj." not in name or not shape or shape[0] % 3:
        return [(name, stored)]
    size = shape[0] // 3
    parts = [slice(start, start + size) for start in range(0, shape[0], size)] if size else []
    return [
        (name.replace("qkv_proj", f"{letter}_proj"), stored._replace(shape=(size, *shape[1:]), part=(part,)))
        for letter, part in zip("qkv", parts, strict=False)
    ]


def match_tensors(stored: Sequence[StoredTensor], model: Model, folder: Path) -> dict[str, StoredTensor]:
    """Find the stored tensor of every parameter; raises CheckpointError unless they correspond one to one."""
    named = [place for tensor in stored for place in places_of(tensor)]
    needed = [(name, tensor) for name, tensor in named if name is not None and not is_unused(name, model.config)]
    check_floating([tensor for _, tensor in needed])
    parameters = model.state_dict()
    if unexpected := [str(tensor) for name, tensor in needed if name not in parameters]:
        raise CheckpointError(
            f"{folder} stores tensors that the model has no place for: {listed(unexpected)}; is this a "
            "checkpoint of a known family, with its own config.json? A new dialect needs its names in checkpoint.RENAMES"
        )
    sources: dict[str, StoredTensor] = {}
    for name, tensor in needed:
        if name in sources:
            raise CheckpointError(f"{folder} stores {name} twice: as {sources[name]} and as {tensor}; remove one")
        sources[name] = tensor
    if model.config.text_config.tie_word_embeddings and HEAD in sources and EMBEDDINGS not in sources:
        sources[EMBEDDINGS] = sources.pop(HEAD)  # of two names for one tensor, safetensors keeps the first
    check_nothing_missing(sources, model, folder)
    check_shapes(sources, parameters)
    return sources


def is_unused(name: str, config: Config) -> bool:
    """Whether this is a block of the tower behind the layer that LLaVA reads; our tower does not build it."""
    block = VISION_BLOCK.match(name)
    if not isinstance(config, LlavaConfig):
        return False
    unused = range(config.vision_layers_run, config.vision_config.num_hidden_layers)
    return block is not None and int(block[1]) in unused


def check_floating(stored: Sequence[StoredTensor]) -> None:
    """Refuse quantised weights, whose numbers mean nothing without their scales."""
    if quantised := [f"{tensor} is {tensor.dtype}" for tensor in stored if tensor.dtype not in STORED_DTYPES]:
        raise CheckpointError(
            f"quantised weights are not supported: {listed(quantised)}; use a checkpoint in one of {', '.join(STORED_DTYPES)}"
        )


def check_nothing_missing(sources: dict[str, StoredTensor], model: Model, folder: Path) -> None:
    """Raise CheckpointError for parameters without a stored tensor; a tied head needs none."""
    optional = {HEAD} if model.config.text_config.tie_word_embeddings else set()
    if missing := [name for name in model.state_dict() if name not in sources and name not in optional]:
        raise CheckpointError(f"{folder} lacks tensors of the model: {listed(missing)}; is the download complete?")


def check_shapes(sources: dict[str, StoredTensor], parameters: dict[str, Tensor]) -> None:
    """Raise CheckpointError where a stored tensor has another shape than its parameter."""
    wrong = [
        f"{tensor} is {tensor.shape}, not {tuple(parameters[name].shape)}"
        for name, tensor in sources.items()
        if tensor.shape != tuple(parameters[name].shape)
    ]
    if wrong:
        raise CheckpointError(f"config.json disagrees on shapes: {listed(wrong)}; is it the one of this checkpoint?")


def read_tensors(
    sources: dict[str, StoredTensor], parts: Parts, device: torch.device, dtype: torch.dtype, as_stored: Set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor under our name, on its device and in its dtype; only one is in two forms at a time.

    Those named in `as_stored` keep the dtype of the file; they are converted later.
    """
    for file, items in groupby(sources.items(), key=lambda item: item[1].file):
        with open_safetensors(file) as opened:
            for name, source in items:
                whole = opened.get_slice(source.name) if name in parts else opened.get_tensor(source.name)
                stored = whole[parts.get(name, source.part)]
                check_finite(stored, source, dtype)
                yield name, stored if name in as_stored else converted(stored, device, dtype)


def converted(stored: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor on `device` and in `dtype`; a GPU converts faster than this processor, so it moves first."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return as_bfloat16(stored)
    return stored.to(device).to(dtype)


def check_finite(stored: Tensor, source: StoredTensor, dtype: torch.dtype) -> None:
    """Raise CheckpointError where a value is not finite, or would not be in `dtype`; the extremes show it without a mask."""
    extremes = torch.stack(torch.aminmax(stored))
    if not extremes.isfinite().all():
        count = int(stored.isfinite().logical_not().sum())
        raise CheckpointError(f"{source} has {count} of {stored.numel()} values that are not finite; download it again")
    if not extremes.to(dtype).isfinite().all():
        raise CheckpointError(f"{source} has values too large for {dtype}; load it in float32 or bfloat16")


def split_parts(decoder: Decoder, mesh: "DeviceMesh") -> Parts:
    """The part of each tensor that this process reads, where several processes share the decoder."""
    return {f"language_model.{name}": part for name, part in split_decoder(decoder, mesh).items()}


def tied_head(state: Mapping[str, Tensor], parts: Parts) -> Tensor:
    """The head, as a view of the embeddings that it is tied to; raises CheckpointError where a stored one differs."""
    head = state[EMBEDDINGS][parts.get(HEAD, ())]
    if HEAD in state and not torch.equal(state[HEAD], head):
        raise CheckpointError(
            "config.json ties lm_head to embed_tokens (tie_word_embeddings), but the stored two differ; "
            "correct the setting or remove lm_head.weight"
        )
    return head


def check_materialised(model: Model) -> None:
    """Raise CheckpointError for anything that no stored value reached, such as a buffer that is not saved."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    if left := [name for name, tensor in tensors if tensor.is_meta]:
        raise CheckpointError(f"never filled from the checkpoint: {listed(left)}")
