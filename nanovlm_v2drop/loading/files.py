"""The files of a checkpoint folder: which weights it holds, and which folders cannot be loaded at all.

A folder may come from a stranger: no weights outside of it are opened, and no pickle is.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..models.config import read_json_object
from ..models.config.settings import MapOf, Text

WEIGHT_MAP = MapOf(Text(r"[^\0]{1,255}"))  # tensor name -> file name
INDEX = "model.safetensors.index.json"
OWN_INDEX = "quantised.safetensors.index.json"  # of our own copies; other programs find no weights
OWN_QUANTISATION = "nanovlm-v2drop"  # the quantisation method in the config.json of our own copies; see quantised.py
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
PICKLE_SUFFIXES = (".bin", ".pth", ".pt")
SAFETENSORS_TWINS = (
    "liuhaotian/llava-v1.5-7b is llava-hf/llava-1.5-7b-hf there, liuhaotian/llava-v1.5-13b is llava-hf/llava-1.5-13b-hf"
)
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "non_lora_trainables.bin",
    "pytorch_lora_weights.safetensors",
)
ADAPTER_TENSOR = re.compile(r"^base_model\.model\.|\.(lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)\b")
# Files and tensor names of the quantisations in circulation.
QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
QUANTISED_TENSORS = {
    "GPTQ or AWQ": re.compile(r"\.(qweight|qzeros|g_idx)$"),
    "bitsandbytes": re.compile(r"\.(SCB|weight_format|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*)$"),
    "compressed-tensors": re.compile(r"\.weight_(packed|shape|zero_point|global_scale|g_idx)$"),
    "FP8 or INT8": re.compile(r"\.(weight_scale|weight_scale_inv|input_scale|activation_scale|[kv]_scale)$"),
    "other": re.compile(r"\.(scales|zeros|qscale|weight_scale_\d|_packed|W_q|codebooks|codes)$"),
}


class CheckpointError(ValueError):
    """The files do not hold exactly the tensors of the model; the message names them and the file."""


class StoredTensor(NamedTuple):
    """One entry of a file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    part: tuple[int | slice, ...] = ()  # where a stored tensor holds several of ours; the shape is the part's

    def __str__(self) -> str:
        return f"{self.name} ({self.file.name})"


def check_folder(folder: Path) -> None:
    """Refuse a folder whose weights would not be those that are wanted: an adapter, or a quantised checkpoint.

    Raises CheckpointError; needs the small files only.
    """
    if adapters := [name for name in ADAPTER_FILES if (folder / name).is_file()]:
        raise CheckpointError(adapter_message(folder, adapters[0]))
    config = folder / "config.json"
    raw = read_json_object(config) if config.is_file() else {}
    for settings in (raw, raw.get("text_config"), raw.get("llm_config")):
        if not isinstance(settings, dict):
            continue
        quantisation = settings.get("quantization_config") or settings.get("compression_config")
        if quantisation and own_quantisation(folder) is None:
            raise CheckpointError(quantised_message(folder, f"config.json names {describe_quantisation(quantisation)}"))
    if found := [name for name in QUANTISATION_FILES if (folder / name).is_file()]:
        raise CheckpointError(quantised_message(folder, f"it holds {found[0]}"))


def own_quantisation(folder: Path) -> dict[str, Any] | None:
    """What config.json says of a quantised copy that this project wrote; None for every other folder."""
    config = folder / "config.json"
    settings = read_json_object(config).get("quantization_config") if config.is_file() else None
    return settings if isinstance(settings, dict) and settings.get("quant_method") == OWN_QUANTISATION else None


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def adapter_message(folder: Path, found: str) -> str:
    """Why an adapter is refused, and how to merge it."""
    config = folder / "adapter_config.json"
    base = read_json_object(config).get("base_model_name_or_path") if config.is_file() else None
    model = f"its base model ({base})" if isinstance(base, str) and base else "its base model"
    return (
        f"{folder} holds an adapter ({found}), which would be ignored; merge it into {model} and load the result: "
        "peft.PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(MERGED), or LLaVA's "
        "scripts/merge_lora_weights.py for one that LLaVA trained. Remove the adapter's files if it is merged already"
    )


def describe_quantisation(quantisation: Any) -> str:
    """The method and the number of bits of a quantization_config."""
    if not isinstance(quantisation, dict):
        return f"the quantisation {quantisation!r}"
    bits = quantisation.get("bits", next((n for n in (4, 8) if quantisation.get(f"load_in_{n}bit")), None))
    method = quantisation.get("quant_method") or quantisation.get("quant_algo") or "an unnamed method"
    return f"the quantisation {method}" + ("" if bits is None else f" with {bits} bits")


def quantised_message(folder: Path, found: str) -> str:
    return (
        f"{folder} is a quantised checkpoint ({found}), which is not supported; "
        "use the original checkpoint with 16- or 32-bit weights"
    )


def list_tensors(folder: Path) -> list[StoredTensor]:
    """What the headers of a folder's safetensors files announce.

    Raises CheckpointError where the index disagrees, and for adapters and quantised weights.
    """
    check_folder(folder)
    stored = []
    for file, promised in weight_files(folder).items():
        with open_safetensors(file) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            stored += [StoredTensor(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
        if absent := sorted(promised - slices.keys()):
            raise CheckpointError(f"{file} lacks {listed(absent)}, which the index places there; download both again")
    check_names(folder, stored)
    return stored


def check_names(folder: Path, stored: Sequence[StoredTensor]) -> None:
    """Refuse tensors of an adapter that is not merged, and of quantised weights."""
    if adapters := [str(tensor) for tensor in stored if ADAPTER_TENSOR.search(tensor.name)]:
        raise CheckpointError(adapter_message(folder, f"tensors such as {adapters[0]}"))
    for method, pattern in QUANTISED_TENSORS.items():
        if quantised := [str(tensor) for tensor in stored if pattern.search(tensor.name)]:
            raise CheckpointError(quantised_message(folder, f"{method}: it stores {listed(quantised)}"))


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """The folder's safetensors files, in order, with the tensor names that an index promises in each (or none)."""
    single, index = folder / "model.safetensors", folder / (INDEX if own_quantisation(folder) is None else OWN_INDEX)
    if single.is_file():  # before the index, as transformers decides it
        return {inside(folder, single): set()}
    if index.is_file():
        return indexed_files(index)
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())  # opening a pipe would wait for ever
    if len(files) > 1:
        raise CheckpointError(f"{folder} has {len(files)} safetensors files but no {index.name}; download that too")
    if not files:
        raise missing_weights(folder)
    return {inside(folder, files[0]): set()}


def indexed_files(index: Path) -> dict[Path, set[str]]:
    """The shards that an index names, each with its tensor names; raises CheckpointError for one that is not there."""
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ValueError as error:
        raise CheckpointError(f"{error}; download it again") from error
    if not weight_map or not WEIGHT_MAP.accepts(weight_map):
        raise CheckpointError(f"{index} has no weight_map (tensor name -> file name); download it again")
    names = sorted(set(weight_map.values()))
    shards: dict[Path, set[str]] = {shard_path(index, name): set() for name in names}
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{index} names shards that are not there: {listed(absent)}; finish the download")
    for name, shard in weight_map.items():
        shards[index.parent / shard].add(name)
    return {inside(index.parent, shard): promised for shard, promised in shards.items()}


def shard_path(index: Path, name: str) -> Path:
    """Where an index places a shard; raises CheckpointError for a name that leaves its folder."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    if any(path.drive or path.root or ".." in path.parts for path in paths):
        raise CheckpointError(f"{index} names the shard {name!r}, which is not in its folder; such files are never opened")
    return index.parent / name


def inside(folder: Path, file: Path) -> Path:
    """`file`, unless links lead out of its folder; those of the Hub's cache lead to the blobs of the same repository.

    Raises CheckpointError.
    """
    home = folder.resolve()
    if file.resolve().is_relative_to(home):
        return file
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else None
    if file.is_symlink() and blobs is not None and (file.parent.resolve() / file.readlink().parent).resolve() == blobs:
        return file
    raise CheckpointError(
        f"{file} is a link to {file.resolve()}, outside of its folder; such files are never opened: copy it into "
        "the folder, or load the folder that it lies in"
    )


def missing_weights(folder: Path) -> Exception:
    """Why a folder without safetensors cannot be loaded."""
    if not folder.is_dir():
        return FileNotFoundError(f"no checkpoint folder at {str(folder)!r}")
    names = sorted(file.name for file in folder.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        return CheckpointError(
            f"{folder} has only pickles ({listed(pickles)}), which are never loaded since they can run code; "
            f"use the safetensors twin from llava-hf: {SAFETENSORS_TWINS}"
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return CheckpointError(quantised_message(folder, f"it holds {listed(gguf)}"))
    return FileNotFoundError(f"{folder} has no *.safetensors file; is the download complete?")


def open_safetensors(file: Path) -> Any:
    """Map a file; raises CheckpointError for one that is damaged or may not be read."""
    try:
        file.open("rb").close()
        return safe_open(file, framework="pt", device="cpu")
    except PermissionError as error:
        raise CheckpointError(
            f"{file} may not be read by this user ({error.strerror}); ask its owner for `chmod a+r {file}`"
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is no complete safetensors file: {error}; "
            "download it again (a Git LFS pointer needs git lfs pull)"
        ) from error


def write_safetensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a file; raises OSError where that fails, as for a full disk."""
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
        file.chmod(mode)  # safetensors 0.8 lets only the owner read what it writes
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}; remove its folder and make room, or give another folder") from error


def listed(names: Iterable[str], limit: int = 3) -> str:
    """A few names, and how many more there are."""
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
