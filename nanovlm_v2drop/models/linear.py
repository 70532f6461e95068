"""Linear layers whose weights have the memory order that a CPU uses for bfloat16 products.

oneDNN computes these products for torch and reads a matrix in blocks. With a plain weight, every call reorders it. That takes
about 15 % of the time of a prefill, and for a decoded token more time than the product itself. Here, a weight is reordered
once, at the first product; until then it can be a view of an unread file. The results are identical to the last bit. Source of
the operators: torch's own compiler, which freezes weights with them (torch/_inductor/fx_passes/mkldnn_fusion.py).
"""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .memory import let_go

ROWS = 640  # the order is chosen for products of this many rows: a prompt with one picture
WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")  # instruction sets of oneDNN
PIECE = 2**20  # values that are converted at once: in float32 they fit into a CPU's cache


class PrepackedLinear(nn.Module):
    """An nn.Linear for inference: (..., in_features) -> (..., out_features), both bfloat16 on a CPU; the bias is unchanged.

    A weight of another dtype is packed at once, through `buffer`: bfloat16 memory for as many values as it has.
    """

    def __init__(self, linear: nn.Linear, buffer: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.plain_weight: Tensor | None = as_bfloat16(linear.weight.detach(), buffer)
        self.packed_weight: Tensor | None = None
        if linear.weight.dtype != torch.bfloat16:  # the next layer will use the buffer
            self.pack()

    def pack(self) -> Tensor:
        """The reordered weight. The first call reorders it and releases the plain one."""
        if self.packed_weight is None and self.plain_weight is not None:
            self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(self.plain_weight, ROWS)
            let_go(self.plain_weight)
            self.plain_weight = None
        return cast(Tensor, self.packed_weight)

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): a copy in plain order."""
        return self.pack().to_dense()

    def forward(self, values: Tensor) -> Tensor:
        check_no_gradients(values, "prepacked bfloat16")
        return torch.ops.mkldnn._linear_pointwise(values, self.pack(), self.bias, "none", [], "")


@dataclass(frozen=True)
class RowByRow:
    """Values (R, K) that are made of `sources` (R, K) each: `compute` makes all of them in the dtype of the layers.

    Quantised layers make them a few rows at a time, with `precise` in float32, and a CPU's cache holds them until they are
    quantised.
    """

    compute: Callable[..., Tensor]
    precise: Callable[..., Tensor]
    sources: tuple[Tensor, ...]

    @property
    def shape(self) -> torch.Size:
        return self.sources[0].shape

    def split(self, rows: int) -> list["RowByRow"]:
        """The same values in parts of so many rows."""
        parts = zip(*(source.split(rows) for source in self.sources), strict=True)
        return [RowByRow(self.compute, self.precise, part) for part in parts]

    def whole(self) -> Tensor:
        return self.compute(*self.sources)

    def wide(self) -> Tensor:
        return self.precise(*(source.float() for source in self.sources))


Values = Tensor | RowByRow  # (..., K), or (R, K)


def whole(values: Values) -> Tensor:
    return values.whole() if isinstance(values, RowByRow) else values


class QuantisedLinear(nn.Module):
    """The common part of quantised layers, which read the values in a form of their own: see `products`."""

    in_features: int
    out_features: int

    @property
    def read_bytes(self) -> int:
        """The bytes that a product with one row reads of the weight and its scales."""
        raise NotImplementedError

    def read(self, values: Values) -> Any:
        """The values in the form that `product` takes; equal for all layers of a kind and width."""
        raise NotImplementedError

    def product(self, rows: Any) -> Tensor:
        """What `read` gave -> (..., out_features)"""
        raise NotImplementedError

    def added(self, sums: Tensor, rows: Any) -> Tensor:
        """The sums (R, out_features) and the product of what `read` gave, in the dtype of the sums."""
        return sums + self.product(rows)

    def forward(self, values: Tensor) -> Tensor:
        return products(values, self)[0]


def products(values: Values, *linears: nn.Module) -> list[Tensor]:
    """The values times the matrix of each layer. Quantised layers share one quantised copy of the values."""
    first = linears[0]
    if not isinstance(first, QuantisedLinear):
        tensor = whole(values)
        return [linear(tensor) for linear in linears]
    check_no_gradients(values, "quantised")
    rows = first.read(values)
    return [linear.product(rows) for linear in linears if isinstance(linear, QuantisedLinear)]


def added(sums: Tensor, values: Values, linear: nn.Module) -> Tensor:
    """The sums (R, out_features) and the product of the values with the matrix of a layer."""
    if isinstance(linear, QuantisedLinear):
        check_no_gradients(values, "quantised")
        return linear.added(sums, linear.read(values))
    return sums + linear(whole(values))


def added_and_product(sums: Tensor, values: Values, linear: nn.Module) -> tuple[Tensor, Tensor]:
    """What `added` gives, to the last bit, and the product itself."""
    if isinstance(linear, QuantisedLinear):  # one step can make both; a CPU's sums have the digits for their difference
        together = added(sums, values, linear)
        return together, together - sums
    product = linear(whole(values))
    return sums + product, product


def check_no_gradients(values: Values, kind: str) -> None:
    """Raise RuntimeError where a derivative is asked for."""
    sources = values.sources if isinstance(values, RowByRow) else (values,)
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        raise RuntimeError(f"{kind} weights have no gradients; load the model in float32 for those")


def can_prepack(device: torch.device) -> bool:
    """Whether the device is a CPU and torch has the operators of prepacked bfloat16 weights for it."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    known = hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")
    return known and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 numbers itself. On x86, torch's own check is true for every AVX-512 processor.

    oneDNN emulates them as well where the environment limits it to older instructions.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BFLOAT16:
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def as_bfloat16(weight: Tensor, buffer: Tensor | None = None) -> Tensor:
    """A weight on the CPU in bfloat16: the weight itself, or a copy in `buffer` (if given) or in new memory.

    The conversion goes through float32, piece by piece, because torch's direct conversion from float16 is three times slower.
    """
    if weight.dtype == torch.bfloat16:
        return weight
    buffer = torch.empty(weight.numel(), dtype=torch.bfloat16) if buffer is None else buffer[: weight.numel()]
    for target, source in zip(buffer.split(PIECE), weight.flatten().split(PIECE), strict=True):
        target.copy_(source.float())
    return buffer.view_as(weight)


def packable(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear by name, except a head that shares its weight with the embeddings, which are read row by row."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and id(module.weight) not in tables
    }


def prepack(model: nn.Module) -> None:
    """Replace every nn.Linear that is `packable`, one after another, so that at most one weight exists twice."""
    linears = packable(model)
    others = [linear.weight.numel() for linear in linears.values() if linear.weight.dtype != torch.bfloat16]
    buffer = torch.empty(max(others, default=0), dtype=torch.bfloat16)  # shared: allocating memory is slower than converting
    replace_linears(model, linears, lambda linear: PrepackedLinear(linear, buffer))


def replace_linears(model: nn.Module, linears: dict[str, nn.Linear], made: Callable[[nn.Linear], nn.Module]) -> None:
    """Put what `made` makes of each layer, by its name in the model, into its place. Empties `linears`."""
    for name in list(linears):
        linear = linears.pop(name)
        replacement = made(linear)
        replacement._forward_hooks = linear._forward_hooks  # the sums over processes that share a decoder
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, replacement)
