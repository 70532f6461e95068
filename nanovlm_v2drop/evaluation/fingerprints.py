"""What tells two experiments apart by content: weights, data and the source of methods. Paths and times play no part.

Two equal fingerprints mean equal contents with one exception: of a weights file above WHOLE_FILE bytes, only the header and
BLOCKS blocks of each tensor are read (all of a tensor that is no larger). Another checkpoint or a further training step changes
numbers everywhere and is seen; a change of a few numbers between the blocks is not.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..dropping import TokenDropper
from .methods import sources_of

WHOLE_FILE = 256 * 2**20
BLOCKS, BLOCK = 32, 4096
MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors")  # what loading may read of a folder
NO_SOURCE = "no source file"


def model_fingerprint(folder: Path) -> str:
    """Of a checkpoint's weights, settings and tokenizer."""
    files = sorted(file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file())
    return joined(part for file in files for part in (file.name.encode(), content_hash(file)))


def held_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Of weights that were in memory before: the first and the last values of each tensor."""
    ends = {name: torch.cat([tensor.flatten()[:BLOCK], tensor.flatten()[-BLOCK:]]) for name, tensor in tensors.items()}
    return joined(part for name, end in ends.items() for part in (name.encode(), end.double().cpu().numpy().tobytes()))


def data_fingerprint(files: Iterable[Path]) -> str:
    """Of data files, in their order."""
    return joined(whole_hash(file) for file in files)


def method_fingerprint(method: type[TokenDropper]) -> str:
    """Of the source files of a method and of the classes that it is made of."""
    files = sources_of(method)
    return joined(whole_hash(file) for file in files) if files else NO_SOURCE


def joined(parts: Iterable[bytes]) -> str:
    return f"sha256:{sha256(b''.join(sha256(part).digest() for part in parts)).hexdigest()[:16]}"


def content_hash(file: Path) -> bytes:
    """Of a whole file, or of a sample of a large file of weights."""
    if file.suffix != ".safetensors" or file.stat().st_size <= WHOLE_FILE:
        return whole_hash(file)
    digest = sha256()
    with file.open("rb") as opened:
        length = opened.read(8)
        header = opened.read(int.from_bytes(length, "little"))
        digest.update(length + header)
        for start, end in tensor_bounds(header):
            for block in sampled(opened, 8 + len(header) + start, 8 + len(header) + end):
                digest.update(block)
    return digest.digest()


def whole_hash(file: Path) -> bytes:
    digest = sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.digest()


def tensor_bounds(header: bytes) -> list[tuple[int, int]]:
    """First byte and end of each tensor of a safetensors file, in order."""
    entries = json.loads(header)
    return sorted(tuple(entry["data_offsets"]) for name, entry in entries.items() if name != "__metadata__")


def sampled(opened: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """BLOCKS blocks spread evenly from the first byte to the last one; a range that is no larger whole."""
    if end - start <= BLOCKS * BLOCK:
        opened.seek(start)
        yield opened.read(end - start)
        return
    last = end - start - BLOCK
    for number in range(BLOCKS):
        opened.seek(start + last * number // (BLOCKS - 1))
        yield opened.read(BLOCK)
