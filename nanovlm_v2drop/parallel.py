"""Several processes, as torchrun starts them: samples over processes, and one decoder over several of them.

    torchrun --nproc-per-node 4 train_free_eval.py --tensor-parallel 2      two replicas, of two processes each

Processes that share a decoder are neighbours in rank. Each holds an equal share of every layer's heads and MLP and of the
head's rows, and a whole copy of the rest: torch's DTensor cuts the matrices, as its ColwiseParallel and RowwiseParallel would.
Layers then compute with plain tensors, the local shards, since DTensor's dispatcher takes 0.1 ms or more a matrix, which is
longer than a GPU takes to decode with it.

Outside torchrun nothing here touches torch.distributed.
Shapes: H heads of the decoder, N processes that share it, V vocabulary.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import TextConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .decoder import Decoder

Value = TypeVar("Value")
COLUMNS, ROWS = 0, 1  # the dimension of a weight (out_features, in_features) that Colwise- and RowwiseParallel split
SPLIT = {
    "q_proj": COLUMNS,
    "k_proj": COLUMNS,
    "v_proj": COLUMNS,
    "o_proj": ROWS,
    "gate_proj": COLUMNS,
    "up_proj": COLUMNS,
    "down_proj": ROWS,
    "lm_head": COLUMNS,  # V x D is a tenth of a 7B's weights, all read for every token; what is gathered is one row a sequence
}
PATIENCE = timedelta(days=1)  # a replica may be done hours before another; torchrun ends all where one fails


@dataclass(frozen=True)
class Processes:
    """This process among those that work together; alone by default.

    `tensor_parallel` neighbours share a decoder, so there are `replicas` of it, and this process belongs to number `replica`.
    """

    rank: int = 0
    world_size: int = 1
    tensor_parallel: int = 1
    local_rank: int = 0

    @property
    def replicas(self) -> int:
        return self.world_size // self.tensor_parallel

    @property
    def replica(self) -> int:
        return self.rank // self.tensor_parallel

    @property
    def is_first(self) -> bool:
        """Whether it is the one that prints, and writes what belongs to all."""
        return self.rank == 0

    @property
    def is_first_of_replica(self) -> bool:
        """Whether it is the one that writes the answers of its replica."""
        return self.rank % self.tensor_parallel == 0

    def device(self, name: str) -> str:
        """Each process its own GPU: "cuda" is the one of its number on this machine."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.world_size > 1 else name

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))  # on the CPU, where waiting costs nothing and no GPU is spun

    def agreed(self, value: Value) -> Value:
        """The first process's value, in all of them."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]


ALONE = Processes()


@cache
def join_processes(device_type: str, tensor_parallel: int = 1) -> Processes:
    """Where this process stands among those that torchrun started; ALONE where it started none.

    Collectives on a GPU go through NCCL, on a CPU through gloo. Raises ValueError for a `tensor_parallel` that the number of
    processes is no multiple of.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
    if tensor_parallel < 1 or world_size % tensor_parallel:
        raise ValueError(
            f"tensor_parallel {tensor_parallel} needs a multiple of as many processes, not {world_size}; "
            f"start them with torchrun --nproc-per-node {max(tensor_parallel, 1)}"
        )
    if not launched:
        return ALONE
    processes = Processes(int(os.environ["RANK"]), world_size, tensor_parallel, int(os.environ["LOCAL_RANK"]))
    if device_type == "cuda":
        torch.cuda.set_device(processes.local_rank)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=PATIENCE)
    return processes


def leave_processes() -> None:
    """Undo `join_processes` at the end of a program that went well. One that failed just ends, and torchrun ends the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    join_processes.cache_clear()
    tensor_mesh.cache_clear()


@cache
def tensor_mesh(device_type: str, tensor_parallel: int) -> "DeviceMesh":
    """The processes that share this process's decoder; all processes have to ask for it. Raises as `join_processes`."""
    from torch.distributed.device_mesh import init_device_mesh  # here: a second to import

    processes = join_processes(device_type, tensor_parallel)
    if processes is ALONE:
        raise ValueError("tensor parallelism needs processes; start them with torchrun --nproc-per-node N")
    mesh = init_device_mesh(device_type, (processes.replicas, tensor_parallel), mesh_dim_names=("replica", "tensor"))
    return mesh["tensor"]


@dataclass(frozen=True, eq=False)
class TensorParallel:
    """What a process that holds a part of a decoder asks of the others that hold it."""

    mesh: "DeviceMesh"

    @property
    def size(self) -> int:
        return self.mesh.size()

    def add_up(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook of matrices split by rows: the sum of all parts, the same on every process."""
        dist.all_reduce(output, group=self.mesh.get_group())
        return output

    def all_logits(self, vocab_size: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook of the head: (..., own rows) -> (..., V), the same on every process, so that all choose one token."""
        whole = output.new_zeros(*output.shape[:-1], vocab_size)
        start = self.mesh.get_local_rank() * -(-vocab_size // self.size)
        whole[..., start : start + output.shape[-1]] = output
        dist.all_reduce(whole, group=self.mesh.get_group())
        return whole

    def all_heads(self, heads: Tensor) -> Tensor:
        """(..., H / N, head_dim) -> (..., H, head_dim)"""
        parts = [torch.empty_like(heads, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, heads.contiguous(), group=self.mesh.get_group())
        return torch.cat(parts, dim=-2)

    def agreed(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in all of them; a copy."""
        group = self.mesh.get_group()
        # Neither gloo nor NCCL knows booleans.
        sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.clone(memory_format=torch.contiguous_format)
        dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
        return sent.to(tensor.dtype)


def check_divisible(config: TextConfig, tensor_parallel: int) -> None:
    """Raise ValueError unless every process would get equally many heads and rows of the MLP."""
    sizes = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    sizes["intermediate_size"] = config.intermediate_size
    if undivided := [f"{name} {size}" for name, size in sizes.items() if size % tensor_parallel]:
        able = [n for n in range(1, config.num_key_value_heads + 1) if not any(size % n for size in sizes.values())]
        raise ValueError(
            f"tensor_parallel {tensor_parallel} does not divide {', '.join(undivided)}; "
            f"{', '.join(map(str, able))} would work"
        )


def split_decoder(decoder: "Decoder", mesh: "DeviceMesh") -> dict[str, tuple[slice, ...]]:
    """Leave of every matrix in SPLIT what this process holds, and put the sums between them; for a decoder without values yet.

    Returns which part of each parameter that is. Raises as `check_divisible`.
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
    """Where Shard(dim) cuts: all parts are equally long, but the last where the size does not divide."""
    length = -(-shape[dim] // mesh.size())
    start = min(mesh.get_local_rank() * length, shape[dim])
    return (slice(None),) * dim + (slice(start, min(start + length, shape[dim])),)
