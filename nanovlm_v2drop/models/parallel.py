"""Several processes, as torchrun starts them: samples over processes, and one decoder over several of them.

    torchrun --nproc-per-node 4 train_free_eval.py --tensor-parallel 2      two replicas, of two processes each

Processes that share a decoder have neighbouring ranks. Each holds an equal share of every layer's heads and MLP and of the rows
of lm_head, and a whole copy of the rest. torch's DTensor splits the matrices, like its ColwiseParallel and RowwiseParallel.
Layers then compute with plain tensors (the local shards), because DTensor's dispatcher takes 0.1 ms or more for each matrix,
longer than a GPU needs to decode with it.

Outside torchrun, nothing here uses torch.distributed.
Shapes: H heads of the decoder, N processes that share it, V vocabulary.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Value = TypeVar("Value")
PATIENCE = timedelta(days=1)  # one replica can finish hours before another; torchrun ends all processes if one fails


@dataclass(frozen=True)
class Processes:
    """This process among those that work together; by default it is alone.

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
        """Whether this process prints, and writes the common files."""
        return self.rank == 0

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this process writes the answers of its replica."""
        return self.rank % self.tensor_parallel == 0

    def device(self, name: str) -> str:
        """The device of this process: "cuda" becomes the GPU with its local rank."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.world_size > 1 else name

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))  # on the CPU, because a waiting GPU is busy

    def agreed(self, value: Value) -> Value:
        """The first process's value, in all processes."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]


ALONE = Processes()


@cache
def join_processes(device_type: str, tensor_parallel: int = 1) -> Processes:
    """This process's place among those that torchrun started; ALONE without torchrun.

    Collectives use NCCL on a GPU and gloo on a CPU. Raises ValueError where the number of processes is not a multiple of
    `tensor_parallel`.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
    if tensor_parallel < 1 or world_size % tensor_parallel:
        raise ValueError(
            f"tensor_parallel {tensor_parallel} needs a number of processes that is a multiple of it, not {world_size}; "
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
    """Undo `join_processes` at the end of a successful program. After a failure, torchrun ends all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    join_processes.cache_clear()
    tensor_mesh.cache_clear()


@cache
def tensor_mesh(device_type: str, tensor_parallel: int) -> "DeviceMesh":
    """The processes that share this process's decoder. All processes must call it. Raises ValueError as `join_processes`."""
    from torch.distributed.device_mesh import init_device_mesh  # imported here, because the import takes a second

    processes = join_processes(device_type, tensor_parallel)
    if processes is ALONE:
        raise ValueError("tensor parallelism needs processes; start them with torchrun --nproc-per-node N")
    mesh = init_device_mesh(device_type, (processes.replicas, tensor_parallel), mesh_dim_names=("replica", "tensor"))
    return mesh["tensor"]


@dataclass(frozen=True, eq=False)
class TensorParallel:
    """The operations of a process that holds a part of a decoder, with the processes that hold the other parts."""

    mesh: "DeviceMesh"

    @property
    def size(self) -> int:
        return self.mesh.size()

    def add_up(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook of matrices split by rows: the sum of all parts, on every process."""
        dist.all_reduce(output, group=self.mesh.get_group())
        return output

    def all_logits(self, vocab_size: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook of lm_head: (..., own rows) -> (..., V) on every process, so that all choose the same token."""
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
        """A copy of the first process's tensor, in all processes."""
        group = self.mesh.get_group()
        # gloo and NCCL have no booleans.
        sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.clone(memory_format=torch.contiguous_format)
        dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
        return sent.to(tensor.dtype)
