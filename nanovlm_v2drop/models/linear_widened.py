"""Linear layers with bfloat16 weights for CPUs without bfloat16 instructions.

Such a processor emulates bfloat16 products, several times slower than float32. A decoded token is limited by memory all the
same, so its products are those of bfloat16. For a prompt, a weight is converted to float32, a piece at a time. A weight keeps
its plain order, in which it can stay a view of the file: converting one from oneDNN's order takes half as long as a product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import as_bfloat16, check_no_gradients

FEW_ROWS = 2  # emulated products of at most this many rows are faster than float32
PIECE = 2**21  # values that are converted at once: in float32 they are still in a CPU's cache when they are multiplied


class WidenedLinear(nn.Linear):
    """An nn.Linear for inference with a bfloat16 weight: float32 values (..., in_features) -> float32 (..., out_features).

    The bias is float32.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(as_bfloat16(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias

    def forward(self, values: Tensor) -> Tensor:
        check_no_gradients(values, "bfloat16")
        has_many_rows = values.numel() > FEW_ROWS * self.in_features
        product = self.wide_product(values) if has_many_rows else F.linear(values.bfloat16(), self.weight).float()
        return product if self.bias is None else product.add_(self.bias)

    def wide_product(self, values: Tensor) -> Tensor:
        product = values.new_empty(*values.shape[:-1], self.out_features)
        pieces = self.weight.split(max(1, PIECE // self.in_features))
        for target, piece in zip(product.split([len(piece) for piece in pieces], dim=-1), pieces, strict=True):
            # MKL, which F.linear calls, would use half of the width of AMD's processors.
            target.copy_(torch.ops.mkldnn._linear_pointwise(values, piece.float(), None, "none", [], ""))
        return product
