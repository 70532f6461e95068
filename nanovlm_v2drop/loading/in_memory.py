"""A model that transformers holds in memory: its settings as the files of a checkpoint folder, and its weights.

transformers is not imported: whatever has these methods will do.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class HeldModel(Protocol):
    """What is asked of a transformers model."""

    config: Any

    def state_dict(self) -> dict[str, Tensor]: ...


def is_held_model(model: object) -> bool:
    return callable(getattr(model, "state_dict", None)) and callable(getattr(getattr(model, "config", None), "to_dict", None))


def held_weights(model: HeldModel) -> tuple[dict[str, Tensor], torch.device, torch.dtype]:
    """The model's weights, and where and what they are; raises ValueError where they lie on several devices, or nowhere."""
    tensors = dict(model.state_dict())
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    kinds = {(tensor.device, tensor.dtype) for tensor in floating}
    if len(kinds) != 1 or floating[0].is_meta:
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds)) or "no weights"
        raise ValueError(f"the model in memory has {found}; move it to one device and dtype with model.to(device, dtype)")
    return tensors, *next(iter(kinds))


def write_settings(model: HeldModel, processor: Any, folder: Path) -> None:
    """Write what a checkpoint folder holds besides the weights.

    `processor` has the attributes `tokenizer` and `image_processor`, and perhaps `video_processor` and `chat_template`, as
    transformers' processors have. Raises ValueError where it lacks one.
    """
    for name in ("tokenizer", "image_processor"):
        if getattr(processor, name, None) is None:
            raise ValueError(f"a model in memory needs its processor, and {type(processor).__name__} has no {name}; "
                             "pass load(model, processor=AutoProcessor.from_pretrained(...))")  # fmt: skip
    processor.tokenizer.save_pretrained(folder)
    parts = {
        "config.json": model.config,
        "generation_config.json": getattr(model, "generation_config", None),
        "preprocessor_config.json": processor.image_processor,
        "video_preprocessor_config.json": getattr(processor, "video_processor", None),
    }
    for name, part in parts.items():
        if part is not None:
            (folder / name).write_text(json.dumps(part.to_dict(), default=str), encoding="utf-8")
    template = getattr(processor, "chat_template", None)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def held_name(model: HeldModel) -> str:
    """A short name for tables: that of the folder or repository that the model was loaded from, where it tells."""
    path = getattr(model.config, "_name_or_path", "")
    return Path(path).name or type(model).__name__
