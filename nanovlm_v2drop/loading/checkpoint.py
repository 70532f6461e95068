"""Official checkpoints into our modules: safetensors only, and every tensor is accounted for.

A tensor without a place here, or a place that no tensor fills, is an error: a model with one random layer would still
answer. The headers of all files are matched with the model before any value is read; then the values come one by one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from ..models.config import LlavaConfig, VLMConfig, read_json_object
from ..models.config.settings import MapOf, Text
from ..models.decoder import Decoder
from ..models.linear import as_bfloat16, can_prepack, packable, prepack
from ..models.vlm import MODEL_CLASSES, VLM
from .tensor_parallel import split_decoder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Parts = Mapping[str, tuple[slice, ...]]  # our name -> the part of that tensor that is read; what is not named is read whole

# Stored name -> ours. The first pattern that matches decides; None is left out on purpose; a name that none matches
# stays as it is. The same weights are in circulation under four sets of names:
#   hub            llava-hf's files, and what transformers 4 saves
#   transformers 5 the hub's, but without `vision_model.`
#   new            transformers 5 with save_original_format=False: everything but the head is below `model.`
#   original       liuhaotian's and lmms-lab's, where the decoder itself is `model.`; Qwen2-VL's are like these
RENAMES: tuple[tuple[str, str | None], ...] = (
    (r".*\bposition_ids$", None),  # 0, 1, 2, ...: old versions saved it
    (r".*\brotary_emb\.inv_freq$", None),  # computed from rope_theta
    (r"(model\.)?vision_tower\.(.*\.)?post_layernorm\.", None),  # behind the layer that LLaVA reads
    (r"(model\.)?vision_tower\.(.*\.)?head\.", None),  # SigLIP's pooling
    (r"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower."),
    (r"(model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"(language_model\.)?(model\.)?image_newline$", "image_newline"),
    (r"(model\.)?visual\.", "visual."),
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),  # original: Sequential(Linear, GELU, Linear)
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"language_model\.model\.", "language_model."),  # hub, transformers 5
    (r"model\.language_model\.", "language_model."),  # new
    (r"model\.", "language_model."),  # original
    (r"lm_head\.", "language_model.lm_head."),  # new, original
)
DECODER_LAYER = re.compile(r"language_model\.layers\.(\d+)\.")
VISION_BLOCK = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.")
HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.embed_tokens.weight"
WEIGHT_MAP = MapOf(Text(r"[^\0]{1,255}"))  # tensor name -> file name
DRAWS = (init.normal_, init.uniform_, init.kaiming_uniform_)
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
PICKLE_SUFFIXES = (".bin", ".pth", ".pt")
SAFETENSORS_TWINS = (
    "liuhaotian/llava-v1.5-7b is llava-hf/llava-1.5-7b-hf there, liuhaotian/llava-v1.5-13b is llava-hf/llava-1.5-13b-hf"
)


class CheckpointError(ValueError):
    """The files do not hold exactly the tensors of the model; the message names them and the file."""


class Uninitialised(TorchFunctionMode):
    """Modules made under this draw no initial values.

    On the meta device torch imports its compiler to draw them, which takes longer than reading a gigabyte.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            return torch.empty(*args, **kwargs or {})
        if func in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


class StoredTensor(NamedTuple):
    """One entry of a file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} ({self.file.name})"


def load_model(
    folder: Path,
    config: VLMConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "auto",
    mesh: "DeviceMesh | None" = None,
) -> VLM:
    """Read an official checkpoint into a model that is ready for inference (eval mode, no gradients).

    The weights never exist twice: each tensor goes straight from the mapped file to `device` and `dtype`. On the CPU,
    in the dtype of the file, it stays a view of the file, which must then not be overwritten while the model lives. In
    bfloat16 on a CPU, matrices go from the file into prepacked order, at their first product or, if converted, at once.

    Args:
        folder: holds model.safetensors, or shards with model.safetensors.index.json, or one other *.safetensors file.
        config: what the folder's config.json says.
        attention: the back end, as attention.resolve_backend takes it.
        mesh: the processes that share the decoder (parallel.tensor_mesh); each reads its own part of the split matrices only.

    Raises:
        FileNotFoundError: the folder or its weights are not there.
        ValueError: the decoder cannot be split over so many processes.
        CheckpointError: the weights are not exactly the model's, are not finite, or cannot be read.
    """
    stored = list_tensors(Path(folder))
    check_depth(stored, config.text_config.num_hidden_layers, Path(folder))
    with torch.device("meta"), Uninitialised():
        model = MODEL_CLASSES[type(config)](config, attention)
    sources = match_tensors(stored, model, Path(folder))
    parts = {} if mesh is None else split_parts(model.language_model, mesh)
    prepacks = can_prepack(device, dtype)
    as_stored = {f"{name}.weight" for name in packable(model)} if prepacks else set()
    state = dict(read_tensors(sources, parts, device, dtype, as_stored))
    if config.text_config.tie_word_embeddings:
        state[HEAD] = tied_head(state, parts)
    model.load_state_dict(state, strict=True, assign=True)
    if config.text_config.tie_word_embeddings and mesh is None:
        model.language_model.lm_head.weight = model.language_model.embed_tokens.weight  # assigning has made two of them
    check_materialised(model)
    model.eval().requires_grad_(False)
    if prepacks:
        prepack(model)
    return model


def list_tensors(folder: Path) -> list[StoredTensor]:
    """What the headers of a folder's safetensors files announce; raises CheckpointError where the index disagrees."""
    stored = []
    for file, promised in weight_files(folder).items():
        with open_safetensors(file) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            stored += [StoredTensor(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
        if absent := sorted(promised - slices.keys()):
            raise CheckpointError(f"{file} lacks {listed(absent)}, which the index places there; download both again")
    return stored


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """The folder's safetensors files, in order, with the tensor names that an index promises in each (or none)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():  # before the index, as transformers decides it
        return {single: set()}
    if index.is_file():
        return indexed_files(index)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise CheckpointError(f"{folder} has {len(files)} safetensors files but no {index.name}; download that too")
    if not files:
        raise missing_weights(folder)
    return {files[0]: set()}


def indexed_files(index: Path) -> dict[Path, set[str]]:
    """The shards that an index names, each with its tensor names; raises CheckpointError for one that is not there."""
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ValueError as error:
        raise CheckpointError(f"{error}; download it again") from error
    if not weight_map or not WEIGHT_MAP.accepts(weight_map):
        raise CheckpointError(f"{index} has no weight_map (tensor name -> file name); download it again")
    shards: dict[Path, set[str]] = {index.parent / name: set() for name in sorted(set(weight_map.values()))}
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{index} names shards that are not there: {listed(absent)}; finish the download")
    for name, shard in weight_map.items():
        shards[index.parent / shard].add(name)
    return shards


def missing_weights(folder: Path) -> Exception:
    """Why a folder without safetensors cannot be loaded."""
    if not folder.is_dir():
        return FileNotFoundError(f"no checkpoint folder at {str(folder)!r}")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if not pickles:
        return FileNotFoundError(f"{folder} has no *.safetensors file; is the download complete?")
    return CheckpointError(
        f"{folder} has only pickles ({listed(pickles)}), which are never loaded since they can run code; "
        f"use the safetensors twin from llava-hf: {SAFETENSORS_TWINS}"
    )


def open_safetensors(file: Path) -> Any:
    """Map a file; raises CheckpointError for one that is damaged."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is no complete safetensors file: {error}; "
            "download it again (a Git LFS pointer needs git lfs pull)"
        ) from error


def check_depth(stored: Sequence[StoredTensor], num_hidden_layers: int, folder: Path) -> None:
    """Raise CheckpointError where config.json promises far more layers than are stored, before any of them is built."""
    layers = {match[1] for tensor in stored if (match := DECODER_LAYER.match(our_name(tensor.name) or ""))}
    # A missing layer or two is an incomplete download, which is named tensor by tensor later.
    if num_hidden_layers > 2 * len(layers) + 8:
        raise CheckpointError(
            f"{folder}: config.json says num_hidden_layers {num_hidden_layers}, but the weights hold {len(layers)} decoder "
            "layers; is config.json the one of this checkpoint, and is the download complete?"
        )


def our_name(stored_name: str) -> str | None:
    """Our name for a stored tensor, or None for one that is left out on purpose."""
    for pattern, replacement in RENAMES:
        if match := re.match(pattern, stored_name):
            return None if replacement is None else replacement + stored_name[match.end() :]
    return stored_name


def match_tensors(stored: Sequence[StoredTensor], model: VLM, folder: Path) -> dict[str, StoredTensor]:
    """Find the stored tensor of every parameter; raises CheckpointError unless they correspond one to one."""
    named = [(our_name(tensor.name), tensor) for tensor in stored]
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
    check_nothing_missing(sources, model, folder)
    check_shapes(sources, parameters)
    return sources


def is_unused(name: str, config: VLMConfig) -> bool:
    """Whether this is a block of the tower behind the layer that LLaVA reads, which our tower does not build."""
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


def check_nothing_missing(sources: dict[str, StoredTensor], model: VLM, folder: Path) -> None:
    """Raise CheckpointError for parameters without a stored tensor; a tied head needs none."""
    optional = {HEAD} if model.config.text_config.tie_word_embeddings else set()
    missing = [name for name in model.state_dict() if name not in sources and name not in optional]
    if not missing:
        return
    if isinstance(model.config, LlavaConfig) and not any(name.startswith("vision_tower.") for name in sources):
        raise CheckpointError(
            f"{folder} stores no vision tower: the original LLaVA checkpoints leave CLIP's weights out; "
            f"use the twin from llava-hf, which has them: {SAFETENSORS_TWINS}"
        )
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

    Those named in `as_stored` keep the dtype of the file, for who converts them later.
    """
    for file, items in groupby(sources.items(), key=lambda item: item[1].file):
        with open_safetensors(file) as opened:
            for name, source in items:
                stored = opened.get_slice(source.name)[parts[name]] if name in parts else opened.get_tensor(source.name)
                check_finite(stored, source, dtype)
                yield name, stored if name in as_stored else converted(stored, device, dtype)


def converted(stored: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """On its device and in its dtype; converted there, since a GPU does it faster than this processor."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return as_bfloat16(stored)
    return stored.to(device).to(dtype)


def check_finite(stored: Tensor, source: StoredTensor, dtype: torch.dtype) -> None:
    """Raise CheckpointError where a value is not finite, or would not be in `dtype`. The extremes tell, without a mask."""
    extremes = torch.stack(torch.aminmax(stored))
    if not extremes.isfinite().all():
        count = int(stored.isfinite().logical_not().sum())
        raise CheckpointError(f"{source} has {count} of {stored.numel()} values that are not finite; download it again")
    if not extremes.to(dtype).isfinite().all():
        raise CheckpointError(f"{source} has values too large for {dtype}; load it in float32 or bfloat16")


def split_parts(decoder: Decoder, mesh: "DeviceMesh") -> Parts:
    """What this process reads of the tensors of a decoder that it shares."""
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


def check_materialised(model: VLM) -> None:
    """Raise CheckpointError for anything that no stored value reached, such as a buffer that is not saved."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    if left := [name for name, tensor in tensors if tensor.is_meta]:
        raise CheckpointError(f"never filled from the checkpoint: {listed(left)}")


def listed(names: Sequence[str], limit: int = 3) -> str:
    """A few names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
