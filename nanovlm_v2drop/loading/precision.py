"""Which numbers a model computes with: a name in DTYPE_NAMES, or `auto`, which chooses by processor and memory."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..models.kv_cache import KV_CACHE_DTYPES
from ..models.linear import can_prepack, has_bfloat16_instructions, packable, prepack, replace_linears
from ..models.linear_float32 import OneDNNLinear, is_faster_with_onednn
from ..models.linear_int4 import int4_obstacle, quantise_int4
from ..models.linear_int8 import int8_obstacle, quantisable, quantise_int8
from ..models.linear_widened import WidenedLinear
from .specs import AUTO, DTYPE_NAMES

QUANTISED = {"int8": 1.05, "int4": 0.65}  # bytes of a weight on average: embeddings stay in 16 bits
OBSTACLES = {"int8": int8_obstacle, "int4": int4_obstacle}
SMALL = 50_000_000  # weights; a smaller model answers about as fast in float32
SPARE = 0.75  # share of the memory that weights may take; the rest is for pictures, caches and other programs
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Precision:
    """`name` says how matrices are stored, as in DTYPE_NAMES; everything else, and what is computed, is in `dtype`.

    The two differ for quantised weights, and for bfloat16 weights on a CPU without instructions for bfloat16. `reason` tells
    why `auto` chose this precision; it is empty where the user chose. `kv_cache_dtype` is one of kv_cache.KV_CACHE_DTYPES.
    """

    name: str
    dtype: torch.dtype
    reason: str = ""
    kv_cache_dtype: str = KV_CACHE_DTYPES[0]

    def __str__(self) -> str:
        cache = self.cache_note
        return f"{self.name}{cache} (auto: {self.reason})" if self.reason else f"{self.name}{cache}"

    @property
    def cache_note(self) -> str:
        return "" if self.kv_cache_dtype == KV_CACHE_DTYPES[0] else f" with an {self.kv_cache_dtype} cache"

    @property
    def noted(self) -> str:
        """What is noted beside answers: everything of it that they depend on."""
        computed = str(self.dtype)
        weights = computed if computed == f"torch.{self.name}" else f"{self.name} weights, {computed}"
        return weights + self.cache_note

    @property
    def is_quantised(self) -> bool:
        return self.name in QUANTISED


def named_precision(dtype: str | torch.dtype, device: torch.device) -> Precision:
    """The precision that `dtype` names; `auto` is none of them, because it needs the size of the model.

    Raises ValueError for an unknown name, and for quantised weights where they cannot run.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise ValueError(f"unknown dtype {name!r}; choose one of: {AUTO}, {', '.join(DTYPE_NAMES)}")
    if name in QUANTISED and (reason := OBSTACLES[name](device)) is not None:
        raise ValueError(f"dtype {name} cannot run: {reason}; use auto or bfloat16")
    return Precision(name, computing_dtype(name, device))


def check_not_split(precision: Precision, is_split: bool) -> None:
    """Raise ValueError where several processes would share quantised weights."""
    if is_split and precision.is_quantised:
        raise ValueError(f"tensor_parallel with {precision.name} weights is not possible; use bfloat16, or one process")


def computing_dtype(name: str, device: torch.device) -> torch.dtype:
    """What is computed with weights stored as `name`."""
    if name not in QUANTISED and name != "bfloat16":
        return getattr(torch, name)
    emulates = device.type == "cpu" and not has_bfloat16_instructions()
    return torch.float32 if emulates else torch.bfloat16


def chosen_precision(device: torch.device, num_weights: int) -> Precision:
    """What `auto` means for a model of `num_weights`: the float dtype with the most digits that is fast and fits.

    It never quantises, because answers would change. Where no float dtype fits, the reason names a quantised one that does.
    """
    if device.type != "cpu":
        return Precision("bfloat16", torch.bfloat16, f"the weights are on {device.type}")
    size = f"{num_weights / 1e9:.1f} B weights" if num_weights >= 1e8 else f"{num_weights / 1e6:.1f} M weights"
    if num_weights < SMALL:
        return Precision("float32", torch.float32, f"only {size}")
    memory = memory_bytes()
    fast = ("bfloat16",) if has_bfloat16_instructions() else ("float32", "bfloat16")
    fits = [name for name in fast if getattr(torch, name).itemsize * num_weights <= SPARE * memory]
    name = fits[0] if fits else "bfloat16"
    instructions = "has" if has_bfloat16_instructions() else "has no"
    reason = f"{size}, {memory / 1e9:.0f} GB of memory, and the processor {instructions} bfloat16 instructions"
    advice = "" if fits else f"; {smaller_form(num_weights, SPARE * memory, device)}"
    return Precision(name, computing_dtype(name, device), reason + advice)


def smaller_form(num_weights: int, room: float, device: torch.device) -> str:
    """Which quantised form of a model fits into `room` bytes, where bfloat16 does not."""
    sizes = {name: width * num_weights for name, width in QUANTISED.items() if OBSTACLES[name](device) is None}
    needed = f"bfloat16 needs {torch.bfloat16.itemsize * num_weights / 1e9:.1f} GB and {room / 1e9:.1f} GB are for weights"
    ways = [f"--dtype {name} needs {size / 1e9:.1f} GB" for name, size in sizes.items() if size <= room]
    return f"{needed}: {ways[0] if ways else 'no dtype that runs here fits'}"


def memory_bytes() -> int:
    """The memory of this machine, or of the container that this process runs in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(physical, int(limit)) if limit.isdecimal() else physical


def packed_layers(model: nn.Module, precision: Precision, device: torch.device) -> dict[str, nn.Linear]:
    """The layers, by name, whose weights `pack` or `quantise` takes in the dtype of the file, and converts."""
    if precision.is_quantised:
        return quantisable(model)
    return packable(model) if precision.name == "bfloat16" and can_prepack(device) else {}


def quantise(model: nn.Module, precision: Precision) -> None:
    """Quantise the matrices that have values, as far as the precision asks for it.

    With int4, those outside the decoder's layers become int8: the tower and the head suffer most from four bits. Projectors
    stay in bfloat16: see linear_int8.PROJECTORS.
    """
    if precision.name == "int4":
        quantise_int4(model, precision.dtype)
    if precision.is_quantised:
        quantise_int8(model, precision.dtype)


def pack(model: nn.Module, precision: Precision, device: torch.device) -> None:
    """Put the matrices of a model on a CPU into the form in which they are multiplied, one after another."""
    quantise(model, precision)
    pack_floats(model, precision, device)


def pack_floats(model: nn.Module, precision: Precision, device: torch.device) -> None:
    """As `pack`, for the matrices that stay floats."""
    if can_prepack(device) and (precision.is_quantised or precision.name == "bfloat16"):
        pack_bfloat16(model, precision.dtype)
    elif precision.name == "float32" and device.type == "cpu" and is_faster_with_onednn():
        replace_linears(model, packable(model), OneDNNLinear)


def pack_bfloat16(model: nn.Module, computed: torch.dtype) -> None:
    """Pack bfloat16 weights for values of the dtype `computed`."""
    if computed == torch.bfloat16:
        prepack(model)
    else:
        replace_linears(model, packable(model), WidenedLinear)
