"""Linear layers with int8 weights, for CPUs with VNNI instructions.

A weight has one scale for each output channel: weight = q * scale, q in -127 ... 127. The values are quantised on the way in,
with one scale for each token, so that the sums are exact integers. Source of the operators: torch's quantisation for x86
(torch/ao/quantization/quantizer/x86_inductor_quantizer.py lowers to them).

Shapes: R rows, N out_features, K in_features.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import joined
from .linear import ROWS, QuantisedLinear, RowByRow, Values, replace_linears

LARGEST = 127
ZERO_POINT = 128  # oneDNN is fast with unsigned values only
SMALLEST = torch.finfo(torch.float32).tiny  # of a scale: that of a row of zeros
MARGIN = 1.003  # a scale is rounded to bfloat16, by up to 1 / 512 of itself; no value may be beyond 127.5 scales
AT_ONCE = 2**19  # values that are quantised at once; large float32 copies cost more than the arithmetic
SLICE = 256  # rows of a weight that are quantised at once, so that little of it exists in float32
# What these compute enters the decoder as it is: their rounding would be half of the error of a whole tower in int8.
PROJECTORS = re.compile(r"^(multi_modal_projector|connector|visual\.(merger|deepstack_merger_list))\.")


def quantise_symmetric(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (..., K) -> q (..., K) int8 in -127 ... 127 and scale (..., 1) float32 with all digits of bfloat16.

    value = q * scale, with one scale for the last dimension. The largest error is half a scale.
    """
    wide = values.float()
    largest = torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True))
    scale = (largest * (MARGIN / LARGEST)).clamp_(min=SMALLEST).bfloat16().float()
    return (wide * scale.reciprocal()).round_().to(torch.int8), scale


class QuantisedRows(NamedTuple):
    """Values (..., K): q (R, K) uint8, scale (R, 1) float32 with all digits of bfloat16; value = (q - 128) * scale."""

    q: Tensor
    scale: Tensor
    shape: torch.Size


def quantise_rows(values: Values) -> QuantisedRows:
    """Quantise values (..., K) with one scale a row, some rows at a time: their float32 values stay in a CPU's cache."""
    at_once = max(1, AT_ONCE // values.shape[-1])
    if isinstance(values, RowByRow):
        rows = (some.wide() for some in values.split(at_once))
    else:
        rows = values.reshape(-1, values.shape[-1]).split(at_once)
    signed, scale = map(joined, zip(*map(quantise_symmetric, rows), strict=True))
    # torch converts to int8 several times faster than to uint8. The other sign bit adds the zero point of 128.
    return QuantisedRows(signed.view(torch.uint8).bitwise_xor_(ZERO_POINT), scale, values.shape)


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A floating (N, K) weight -> int8 (N, K), and the scale of each row (N,) float32."""
    scale = weight.abs().amax(1).float() / LARGEST
    divisor = scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # a row of zeros
    q = torch.empty(weight.shape, dtype=torch.int8)
    for target, source, by in zip(q.split(SLICE), weight.split(SLICE), divisor.split(SLICE), strict=True):
        target.copy_((source.float() / by).round_())
    return q, scale


class Int8Linear(QuantisedLinear):
    """An nn.Linear for inference with an int8 weight `q` (N, K) and its `scale` (N,): (..., K) -> (..., N) in `dtype`.

    The weight is kept in the memory order of oneDNN.
    """

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.scale, self.dtype = scale, dtype
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.zero_points = torch.zeros(len(q), dtype=torch.int32)
        self.packed_weight = torch.ops.onednn.qlinear_prepack(q, [ROWS, self.in_features])

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype) -> "Int8Linear":
        return cls(*quantise_weight(linear.weight.detach()), linear.bias, dtype)

    @property
    def q(self) -> Tensor:
        """(N, K) int8: a copy in plain order."""
        return self.packed_weight.to_dense().t().contiguous()

    @property
    def weight(self) -> Tensor:
        """(N, K) float32: what the quantised weight means."""
        return self.q.float() * self.scale[:, None]

    @property
    def read_bytes(self) -> int:
        return self.out_features * self.in_features + self.scale.nbytes

    def read(self, values: Values) -> QuantisedRows:
        return quantise_rows(values)

    def product(self, rows: QuantisedRows) -> Tensor:
        scaled = self.unscaled(rows, self.dtype).mul_(rows.scale.to(self.dtype)).view(*rows.shape[:-1], self.out_features)
        return scaled if self.bias is None else scaled.add_(self.bias)

    def added(self, sums: Tensor, rows: QuantisedRows) -> Tensor:
        added = torch.addcmul(sums, self.unscaled(rows, sums.dtype), rows.scale.to(sums.dtype))
        return added if self.bias is None else added.add_(self.bias)

    def unscaled(self, rows: QuantisedRows, dtype: torch.dtype) -> Tensor:
        """(R, N): the product without the scales of the rows, because oneDNN takes one for all of them."""
        weight = (self.packed_weight, self.scale, self.zero_points, None)
        return torch.ops.onednn.qlinear_pointwise(rows.q, 1.0, ZERO_POINT, *weight, 1.0, 0, dtype, "none", [], "")


def int8_obstacle(device: torch.device) -> str | None:
    """The reason why int8 weights cannot be used here, or None."""
    if device.type != "cpu":
        return f"it is for CPUs, not {device.type}"
    if not hasattr(torch.ops.onednn, "qlinear_prepack") or not torch.backends.mkldnn.is_available():
        return f"torch {torch.__version__} has no int8 products of oneDNN here"
    return None if torch.cpu._is_vnni_supported() else "this processor has no AVX-512 VNNI instructions"


def quantisable(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear by name but those of projectors.

    A head that shares its weight with the embeddings is one of them; the embeddings keep theirs.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    return {name: linear for name, linear in layers.items() if not PROJECTORS.match(name)}


def filled_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The quantisable layers that have values, by name."""
    return {name: linear for name, linear in quantisable(model).items() if not linear.weight.is_meta}


def quantise_int8(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every quantisable layer that has values, one after another: at most one of them is held in both forms."""
    replace_linears(model, filled_linears(model), lambda linear: Int8Linear.of(linear, dtype))
