"""Linear layers whose weights lie in the order in which a CPU multiplies them in bfloat16.

oneDNN, which does these products for torch, takes a matrix in blocks. A plain weight is put into that order anew in every
call: that costs a prefill about 15 % of its time, and a decoded token, which reads every weight for a single row, more than
the product itself. Here it is done once. The results are the same to the last bit.
Source of the operators: torch's own compiler, which freezes weights with them (torch/_inductor/fx_passes/mkldnn_fusion.py).
"""

import torch
from torch import Tensor, nn

ROWS = 640  # of the products that the order is chosen for: a prompt with one picture


class PrepackedLinear(nn.Module):
    """An nn.Linear for inference: (..., in_features) -> (..., out_features), both bfloat16 on a CPU; the bias stays."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16(), ROWS)

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): a copy in the plain order."""
        return self.packed_weight.to_dense()

    def forward(self, values: Tensor) -> Tensor:
        if torch.is_grad_enabled() and values.requires_grad:
            raise RuntimeError("prepacked bfloat16 weights have no gradients; load the model in float32 for those")
        return torch.ops.mkldnn._linear_pointwise(values, self.packed_weight, self.bias, "none", [], "")


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this is what the order is for, and this processor and torch can do it."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    known = hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")
    return known and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def prepack(model: nn.Module) -> None:
    """Exchange every nn.Linear of the model, one by one, so that no more than one weight exists twice.

    A head that shares its weight with the embeddings stays as it is: they are read row by row.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and id(child.weight) not in tables:
                packed = PrepackedLinear(child)
                packed._forward_hooks = child._forward_hooks  # the sums over processes that share a decoder
                setattr(parent, name, packed)
