"""Cut a decoder into parts, one for each process, before its weights are read.

Shapes: V vocabulary, D hidden_size.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from ..models.config import TextConfig
from ..models.decoder import Decoder
from ..models.parallel import TensorParallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

COLUMNS, ROWS = 0, 1  # the dimension of a weight (out_features, in_features) that Colwise- and RowwiseParallel split
SPLIT = {
    "q_proj": COLUMNS,
    "k_proj": COLUMNS,
    "v_proj": COLUMNS,
    "o_proj": ROWS,
    "gate_proj": COLUMNS,
    "up_proj": COLUMNS,
    "down_proj": ROWS,
    "lm_head": COLUMNS,  # V x D is a tenth of a 7B model, read for every token; only one row per sequence is gathered
}


def check_divisible(config: TextConfig, tensor_parallel: int) -> None:
    """Raise ValueError unless every process would get equally many heads and rows of the MLP."""
    sizes = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    sizes["intermediate_size"] = config.intermediate_size
    if undivided := [f"{name} {size}" for name, size in sizes.items() if size % tensor_parallel]:
        able = [n for n in range(1, config.num_key_value_heads + 1) if not any(size % n for size in sizes.values())]
        raise ValueError(
            f"tensor_parallel {tensor_parallel} does not divide {', '.join(undivided)}; {', '.join(map(str, able))} would work"
        )


def split_decoder(decoder: Decoder, mesh: "DeviceMesh") -> dict[str, tuple[slice, ...]]:
    """Cut every matrix in SPLIT down to the part that this process holds, and add up the results between processes.

    The decoder must not have values yet. Returns which part of each parameter is held. Raises as `check_divisible`.
    """
    from torch.distributed.tensor import Shard, distribute_tensor  # here: a second to import

    check_divisible(decoder.config, mesh.size())
    decoder.tensor_parallel = processes = TensorParallel(mesh)
    parts: dict[str, tuple[slice, ...]] = {}
    for path, linear in decoder.named_modules():
        if (dim := SPLIT.get(path.rpartition(".")[2])) is None:
            continue
        for name, whole in list(linear.named_parameters(recurse=False)):
            shard = distribute_tensor(whole.detach(), mesh, [Shard(dim)], src_data_rank=None).to_local()
            setattr(linear, name, nn.Parameter(shard, requires_grad=False))
            parts[f"{path}.{name}"] = own_part(whole.shape, dim, mesh)
        if dim == ROWS:
            linear.register_forward_hook(processes.add_up)
    decoder.lm_head.register_forward_hook(partial(processes.all_logits, decoder.config.vocab_size))
    return parts


def own_part(shape: Sequence[int], dim: int, mesh: "DeviceMesh") -> tuple[slice, ...]:
    """The part that Shard(dim) gives this process. All parts are equally long, except the last if the size does not divide."""
    length = -(-shape[dim] // mesh.size())
    start = min(mesh.get_local_rank() * length, shape[dim])
    return (slice(None),) * dim + (slice(start, min(start + length, shape[dim])),)
