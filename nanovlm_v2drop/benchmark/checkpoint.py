"""Full-size checkpoints of noise: the speed and memory of a machine with a real model are measured without a download.

    python -m nanovlm_v2drop.benchmark.checkpoint smolvlm-256m FOLDER     # writes 0.5 GB
    python -m nanovlm_v2drop.benchmark.checkpoint llava-1.5-7b FOLDER     # writes 14 GB; its own memory stays below 1 GB
    python -m nanovlm_v2drop.benchmark.checkpoint llava-1.5-7b FOLDER --layers 2

The folder loads like the released one, and its answers mean nothing. The layout is the official one, so that transformers reads
the same files. The weights are written a shard at a time.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..loading.files import INDEX, write_safetensors
from ..loading.saving import new_folder
from ..models.config import VisionConfig
from .official_llava import llava_files, llava_tensors, llava_tokenizer
from .official_smolvlm import BASE, LARGE, Sizes, smolvlm_config, smolvlm_settings, smolvlm_tensors, smolvlm_tokenizer
from .workload import SHAPES

MODELS: dict[str, Sizes | VisionConfig] = {  # what the shape of the decoder leaves open
    "smolvlm-256m": BASE,
    "smolvlm-500m": BASE,
    "smolvlm-2.2b": LARGE,
    "llava-1.5-7b": VisionConfig(),
    "llava-1.5-13b": VisionConfig(),
}
SHARD_BYTES = 2**28  # a larger tensor has a shard of its own
PIECE = 2**20  # values that are drawn at once


@dataclass(frozen=True)
class Layout:
    """What a folder holds: settings by file, a tokenizer, and the shapes of the tensors by their official names."""

    settings: Mapping[str, dict[str, Any]]
    tokenizer: Tokenizer
    shapes: Mapping[str, torch.Size]


def layout_of(name: str, layers: int | None) -> Layout:
    """The folder of a model in MODELS, with all layers of its decoder or the first `layers`; raises ValueError as below."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of: {', '.join(MODELS)}")
    shape, open_sizes = SHAPES[name], MODELS[name]
    if layers is not None and not 1 <= layers <= shape.num_hidden_layers:
        raise ValueError(f"{name} has {shape.num_hidden_layers} layers; --layers {layers} must be from 1 to that")
    shape = replace(shape, num_hidden_layers=layers or shape.num_hidden_layers)
    if isinstance(open_sizes, Sizes):
        config = smolvlm_config(shape, open_sizes)
        return Layout(smolvlm_settings(config), smolvlm_tokenizer(), smolvlm_tensors(config))
    shapes = {name: tensor.shape for name, tensor in llava_tensors(shape, open_sizes).items()}
    return Layout(llava_files(shape, open_sizes), llava_tokenizer(), shapes)


def write_checkpoint(name: str, folder: Path, seed: int = 0, layers: int | None = None) -> Path:
    """Write a random checkpoint of a model in MODELS, in bfloat16. Returns its folder.

    Raises ValueError for another model and for a number of layers that it does not have, and OSError as
    `new_folder` and `write_safetensors`: a real checkpoint is never replaced.
    """
    layout = layout_of(name, layers)
    folder = new_folder(folder)
    layout.tokenizer.save(str(folder / "tokenizer.json"))
    for file, content in layout.settings.items():
        (folder / file).write_text(json.dumps(content, indent=2), encoding="utf-8")
    write_shards(layout.shapes, folder, torch.Generator().manual_seed(seed))
    return folder


def write_shards(shapes: Mapping[str, torch.Size], folder: Path, generator: torch.Generator) -> None:
    """Write noise in files of about SHARD_BYTES, one after the other, and the index that names them."""
    shards = list(shards_of(shapes))
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors({name: noise(name, shapes[name], generator) for name in names}, folder / file)
        places.update(dict.fromkeys(names, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=2), encoding="utf-8")


def shards_of(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """The names of the tensors of each shard."""
    names, size = list[str](), 0
    for name, shape in shapes.items():
        own = torch.bfloat16.itemsize * shape.numel()
        if names and size + own > SHARD_BYTES:
            yield names
            names, size = [], 0
        names, size = [*names, name], size + own
    yield names


def noise(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values of a size that keeps activations near one."""
    scale = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.1
    middle = int(("norm" in name or "layrnorm" in name) and name.endswith("weight"))
    values = torch.empty(shape, dtype=torch.bfloat16)
    for piece in values.view(-1).split(PIECE):
        piece.copy_(torch.randn(len(piece), generator=generator) * scale + middle)
    return values


def build_parser() -> argparse.ArgumentParser:
    description = "Write a full-size checkpoint of noise."
    parser = argparse.ArgumentParser("python -m nanovlm_v2drop.benchmark.checkpoint", description=description)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="of the decoder; default: all of the model")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        folder = write_checkpoint(args.model, args.folder, args.seed, args.layers)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"wrote {sum(file.stat().st_size for file in folder.iterdir()) / 1e9:.2f} GB to {folder}")


if __name__ == "__main__":
    main()
