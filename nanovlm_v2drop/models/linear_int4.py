"""Linear layers with 4-bit weights, for CPUs with AVX-512 VNNI instructions.

A decoded token reads every weight once, so its time is that of the memory: torch's own one-row kernel reads half of what int8
would. A prompt has many rows, and its time is that of the arithmetic: there a weight is unpacked to int8, some columns at a
time, and multiplied as such.

Both read the same bytes. A weight is q * m * scale: q in -7 ... 7, a whole number m in 1 ... 18 for each group of GROUP inputs
of an output channel, and a scale for each output channel. So q * m is an exact int8 number.

Shapes: R rows, N out_features, K in_features, G = K / GROUP.
"""

import math
import re

import torch
from torch import Tensor, nn

from .linear import QuantisedLinear, Values, replace_linears, whole
from .linear_int8 import SLICE, ZERO_POINT, QuantisedRows, filled_linears, int8_obstacle, quantise_rows

GROUP = 64
LARGEST, LARGEST_MULTIPLE = 7, 18  # their product is the largest multiple of 7 in int8
FEW_ROWS = 16  # from about here on, unpacking costs less than the one-row kernel loses
BLOCK = 64  # channels that are together in the layout for AVX-512: in 32 bytes, half of them in the low halves
UNPACKED = 2**22  # numbers of a weight that are unpacked at once: more would leave a CPU's cache, fewer take more calls
LOW = 0x0F0F0F0F0F0F0F0F  # the low half of each of eight bytes
OFFSET = 8  # stored is q + 8
DECODER_LAYERS = re.compile(r"^(language_model\.)?layers\.")


def quantise_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A floating (N, K) weight -> q (N, K) int8, multiples (N, G) int8, and the scale of each channel (N,).

    The scales are float32 numbers with all digits of bfloat16, so products in bfloat16 take them exactly.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    smallest = torch.finfo(torch.float32).tiny  # a channel of zeros
    scale = (largest.amax(1) / (LARGEST * LARGEST_MULTIPLE)).clamp(min=smallest).bfloat16().float()
    multiples = (largest / (LARGEST * scale[:, None])).round_().clamp_(1, LARGEST_MULTIPLE)
    q = (groups / (multiples * scale[:, None])[..., None]).round_().clamp_(-LARGEST, LARGEST)
    return q.flatten(1).to(torch.int8), multiples.to(torch.int8), scale


class Int4Linear(QuantisedLinear):
    """An nn.Linear for inference with a 4-bit weight: (..., K) -> (..., N) in `dtype`.

    `nibbles` (N, K / 2) uint8 is in the order of torch's kernel; `multiples` (G, N) int8; `scale` (N,) float32. The products of
    the last two, as the kernel takes them, hold the multiples, which are not kept a second time.
    """

    def __init__(self, nibbles: Tensor, multiples: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = len(nibbles), 2 * nibbles.shape[1]
        self.nibbles, self.scale, self.dtype = nibbles, scale, dtype
        self.bias = None if bias is None else bias.detach().to(dtype)
        steps = (multiples * scale).bfloat16()
        self.scales_and_zeros = torch.stack([steps, torch.zeros_like(steps)], dim=-1)  # (G, N, 2)

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype) -> "Int4Linear":
        """The quantised layer; raises ValueError for a shape that torch's kernel does not take."""
        check_shape(linear)
        weight = linear.weight.detach()
        parts = [quantise_groups(rows) for rows in weight.split(SLICE)]
        nibbles = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int() + OFFSET, 2) for q, _, _ in parts]
        multiples, scale = (torch.cat(list(own)) for own in list(zip(*parts, strict=True))[1:])
        return cls(torch.cat(nibbles), multiples.T.contiguous(), scale, linear.bias, dtype)

    @property
    def weight(self) -> Tensor:
        """(N, K) float32: what the quantised weight means."""
        everything = self.unpacked(slice(None), torch.empty(2 * self.nibbles.nbytes, dtype=torch.int8))
        return in_order(everything).flatten(1).T.float() * self.scale[:, None]

    @property
    def multiples(self) -> Tensor:
        return self.multiples_of(slice(None))

    def multiples_of(self, channels: slice) -> Tensor:
        """(G, C) int8: exact, because the rounding of a step to bfloat16 moves none by more than 0.04."""
        return (self.scales_and_zeros[:, channels, 0].float() / self.scale[channels]).round_().to(torch.int8)

    def pieces(self) -> list[slice]:
        """The channels that are unpacked at once."""
        count = max(BLOCK, UNPACKED // self.in_features // BLOCK * BLOCK)
        return [slice(first, min(first + count, self.out_features)) for first in range(0, self.out_features, count)]

    def unpacked(self, channels: slice, memory: Tensor) -> Tensor:
        """(K, C) int8: q * m of some channels, in the order of `by_halves`. They are written to the `memory` of K * C bytes."""
        packed = self.nibbles[channels].view(torch.int64).view(-1, self.in_features, BLOCK // 16)  # blocks, K, 32 bytes
        unpacked = memory[: 2 * packed.nbytes].view(self.in_features, -1)
        low, high = unpacked.view(torch.int64).chunk(2, dim=1)
        low.unflatten(1, (-1, BLOCK // 16)).copy_(packed.transpose(0, 1))
        torch.bitwise_right_shift(low, 4, out=high)
        for half in (low, high):
            half.bitwise_and_(LOW)
        unpacked.sub_(OFFSET).unflatten(0, (-1, GROUP)).mul_(by_halves(self.multiples_of(channels)[:, None]))
        return unpacked

    @property
    def read_bytes(self) -> int:
        return self.nibbles.nbytes + self.scales_and_zeros.nbytes

    def read(self, values: Values) -> Tensor | QuantisedRows:
        has_many_rows = math.prod(values.shape) > FEW_ROWS * self.in_features
        return quantise_rows(values) if has_many_rows else whole(values)

    def product(self, rows: Tensor | QuantisedRows) -> Tensor:
        product = self.of_many(rows) if isinstance(rows, QuantisedRows) else self.of_few(rows)
        return product if self.bias is None else product.add_(self.bias)

    def of_few(self, values: Tensor) -> Tensor:
        """By torch's kernel for one row, in bfloat16."""
        flat = values.reshape(-1, self.in_features).bfloat16().contiguous()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.nibbles, GROUP, self.scales_and_zeros)
        return product.to(self.dtype).view(*values.shape[:-1], self.out_features)

    def of_many(self, rows: QuantisedRows) -> Tensor:
        """By int8 products, some channels at a time. All use the same memory, because new memory takes the system's time."""
        signed, scale = rows.q.bitwise_xor(ZERO_POINT).view(torch.int8), rows.scale.to(self.dtype)
        product, pieces = torch.empty(len(signed), self.out_features, dtype=self.dtype), self.pieces()
        memory = torch.empty(pieces[0].stop * self.in_features, dtype=torch.int8)
        sums = torch.empty(pieces[0].stop * len(signed), dtype=torch.int32)
        for channels in pieces:
            weight, own = self.unpacked(channels, memory), by_halves(self.scale[channels]).to(self.dtype)
            products = torch._int_mm(signed, weight, out=sums[: len(signed) * len(own)].view(len(signed), -1))
            scaled = products.to(self.dtype).mul_(own).mul_(scale)
            product[:, channels].unflatten(1, (-1, 2, BLOCK // 2)).copy_(in_order(scaled))
        return product.view(*rows.shape[:-1], self.out_features)


def by_halves(values: Tensor) -> Tensor:
    """(..., C) in the order in which channels are unpacked: those in the low halves of all blocks, then those in the high."""
    return values.unflatten(-1, (-1, 2, BLOCK // 2)).transpose(-3, -2).flatten(-3)


def in_order(values: Tensor) -> Tensor:
    """(..., C) as `by_halves` gives them -> (..., blocks, 2, 32) in their own order"""
    return values.unflatten(-1, (2, -1, BLOCK // 2)).transpose(-3, -2)


def check_shape(linear: nn.Linear) -> None:
    """Raise ValueError for a matrix whose shape torch's kernel does not take."""
    rows, columns = linear.out_features, linear.in_features
    if rows % BLOCK or columns % GROUP:
        raise ValueError(f"int4 needs matrices with multiples of {BLOCK} rows and columns, not {rows} x {columns}; use int8")


def int4_obstacle(device: torch.device) -> str | None:
    """The reason why 4-bit weights cannot be used here, or None."""
    if (reason := int8_obstacle(device)) is not None:
        return reason
    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability == "AVX512" else f"torch runs its kernels for {capability} here, not for AVX512"


def quantise_int4(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every nn.Linear with values in a decoder's layers, one after another. Raises ValueError as `Int4Linear.of`."""
    inside = {name: layer for name, layer in filled_linears(model).items() if DECODER_LAYERS.search(name)}
    replace_linears(model, inside, lambda linear: Int4Linear.of(linear, dtype))
