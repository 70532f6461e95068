"""Where a model computes: a device of this machine, and the processes that share a decoder."""

from typing import TYPE_CHECKING

import torch

from ..models.parallel import join_processes, tensor_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def find_place(device: str | torch.device, tensor_parallel: int) -> "tuple[torch.device, DeviceMesh | None]":
    """Where this process computes, and the processes that it shares the decoder with."""
    if tensor_parallel == 1:
        return as_device(device), None
    kind = str(device).partition(":")[0]
    processes = join_processes(kind, tensor_parallel)
    return as_device(processes.device(str(device))), tensor_mesh(kind, tensor_parallel)


def as_device(device: str | torch.device) -> torch.device:
    """A device that is there; raises ValueError for another."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # torch raises RuntimeError for an unknown name or a missing driver, AssertionError where it was built without CUDA.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}; use cpu") from error
    return found
