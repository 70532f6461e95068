"""The machine that runs: its name, its clock, and its memory."""

import platform
import re
import resource
import time
from contextlib import suppress
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")  # a container's limit on memory lies here
UNKNOWN_FREE = 2**31  # taken as free where the system does not tell


def timestamp(device: torch.device) -> float:
    """Seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new high-water mark of memory; on a CPU this works on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held since `reset_peak_memory`: by torch on a GPU, by the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    # ru_maxrss begins with the peak of the program that started this one; VmHWM is of this program alone.
    peak = kilobytes(STATUS, "VmHWM")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak is None else peak) * 1024 / 1e6


def machine_name(device: torch.device) -> str:
    """The processor that runs, and how many threads or which GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return names[0] if names else platform.processor()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device; on a CPU without swapping, and within a container's limit."""
    if device.type == "cuda":
        held_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held_by_torch
    return min(filter(None, (available_memory(), left_in_container())), default=UNKNOWN_FREE)


def available_memory() -> int | None:
    """What Linux can give without swapping; None elsewhere."""
    available = kilobytes(MEMINFO, "MemAvailable")
    return None if available is None else available * 1024


def kilobytes(file: Path, name: str) -> int | None:
    """What one of Linux's files says for a name; None where there is no such file or name."""
    found = re.search(rf"^{name}:\s*(\d+) kB", file.read_text(), re.MULTILINE) if file.is_file() else None
    return int(found[1]) if found else None


def left_in_container() -> int | None:
    """What a container may still take; None without a limit."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return max(int(limit) - int(used), 1)
    except (OSError, ValueError):  # no container, or its limit is the word max
        return None
