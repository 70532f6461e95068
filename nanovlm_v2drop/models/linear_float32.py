"""float32 products by oneDNN on processors that torch's own library, MKL, does not use fully.

MKL uses AVX-512 on Intel's processors only. On AMD's, it computes with half as many numbers at a time, and oneDNN takes less
than half of its time. The results differ in the last digit, as between processors of the two makers.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

CPUINFO = Path("/proc/cpuinfo")
FEW_ROWS = 16  # with fewer rows, reordering the weight for oneDNN takes longer than the product


class OneDNNLinear(nn.Linear):
    """An nn.Linear with the parameters of another, in float32 on a CPU. Gradients and compiled code take nn.Linear's way."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, values: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        has_few_rows = values.numel() < FEW_ROWS * self.in_features
        if has_few_rows or torch.compiler.is_compiling() or torch.is_grad_enabled() or values.dtype != torch.float32:
            return super().forward(values)
        return torch.ops.mkldnn._linear_pointwise(values, self.weight, self.bias, "none", [], "")


@cache
def is_faster_with_onednn() -> bool:
    """Whether torch multiplies float32 numbers by MKL here, and the processor has instructions that only oneDNN uses."""
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()):
        return False
    is_amd = CPUINFO.is_file() and "AuthenticAMD" in CPUINFO.read_text()
    return is_amd and hasattr(torch.ops.mkldnn, "_linear_pointwise")
