"""Linear layers whose weights have the memory order that a CPU uses for bfloat16 products.

oneDNN computes these products for torch and reads a matrix in blocks. With a plain weight, every call reorders it. That takes
about 15 % of the time of a prefill, and for a decoded token more time than the product itself. Here, a weight is reordered
once, at the first product; until then it can be a view of an unread file. The results are identical to the last bit. Source of
the operators: torch's own compiler, which freezes weights with them (torch/_inductor/fx_passes/mkldnn_fusion.py).
"""

import torch
from torch import Tensor, nn

ROWS = 640  # the order is chosen for products of this many rows: a prompt with one picture
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
        if self.packed_weight is None:
            self.packed_weight, self.plain_weight = torch.ops.mkldnn._reorder_linear_weight(self.plain_weight, ROWS), None
        return self.packed_weight

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): a copy in plain order."""
        return self.pack().to_dense()

    def forward(self, values: Tensor) -> Tensor:
        if torch.is_grad_enabled() and values.requires_grad:
            raise RuntimeError("prepacked bfloat16 weights have no gradients; load the model in float32 for those")
        return torch.ops.mkldnn._linear_pointwise(values, self.pack(), self.bias, "none", [], "")


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether device and dtype are the right ones, and processor and torch have the operators."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    known = hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")
    return known and torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and id(module.weight) not in tables
    }


def prepack(model: nn.Module) -> None:
    """Replace every nn.Linear that is `packable`, one after another, so that at most one weight exists twice."""
    linears = packable(model)
    others = [linear.weight.numel() for linear in linears.values() if linear.weight.dtype != torch.bfloat16]
    buffer = torch.empty(max(others, default=0), dtype=torch.bfloat16)  # shared: allocating memory is slower than converting
    for name in list(linears):
        linear = linears.pop(name)
        packed = PrepackedLinear(linear, buffer)
        packed._forward_hooks = linear._forward_hooks  # the sums over processes that share a decoder
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, packed)
