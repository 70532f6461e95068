"""Memory that this process holds without need, and how it goes back to the system.

A weight in the dtype of its file stays a view of the mapped file. Reading it makes its pages resident, and they stay so,
although a weight that has been checked or reordered is not read again soon. Pages that were let go are read from the file when
needed.

The C library also keeps what it is given back, in pieces between other values.
"""

import ctypes
import mmap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

MAPS = Path("/proc/self/maps")  # Linux


def let_go(*weights: Tensor) -> None:
    """Let go of the pages that only one of these weights covers, of weights that are views of a mapped file.

    Nothing happens to other weights, and on other systems than Linux. A weight must be as it is in the file: the mapping is
    private, so values that were written to it would be lost.
    """
    spans = list(mapped_files()) if MAPS.is_file() else []
    for weight in weights:
        first, end = whole_pages(weight)
        if first < end and any(first >= start and end <= stop for start, stop in spans):
            c_library().madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


def whole_pages(weight: Tensor) -> tuple[int, int]:
    """The addresses of the first page inside of a contiguous tensor, and behind the last one; none of another tensor."""
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return 0, 0
    size, start = mmap.PAGESIZE, weight.data_ptr()
    return -(-start // size) * size, (start + weight.nbytes) // size * size


def mapped_files() -> Iterator[tuple[int, int]]:
    """First address and end of every mapping of a file in this process."""
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            start, _, stop = addresses.partition("-")
            yield int(start, 16), int(stop, 16)


def trim() -> None:
    """Give the system the memory that is freed in this process, where the C library can do so (glibc)."""
    if hasattr(c_library(), "malloc_trim"):
        c_library().malloc_trim(0)


@cache
def c_library() -> Any:
    """Python's own madvise needs the object of the mapping, which safetensors keeps."""
    return ctypes.CDLL(None)
