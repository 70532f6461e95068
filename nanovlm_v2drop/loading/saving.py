"""Write a copy of a checkpoint with quantised weights: it has half or a third of the size, and loads without quantising.

    python -m nanovlm_v2drop.loading.saving llava-1.5-7b FOLDER --dtype int8

`load(FOLDER)` reads it; see quantised.py for what the folder holds.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from ..models.config import VLMConfig, read_json_object
from .files import INDEX, TOKENIZERS, inside
from .quantised import quantisation_settings, write_weights
from .specs import WeightsUnavailable
from .zoo import VisionLanguageModel, load, tokenizer_folder

SMALL_FILES = (".json", ".jinja", ".model", ".txt")  # suffixes of settings and tokenizers


def save_quantised(vlm: VisionLanguageModel, folder: str | Path) -> None:
    """Write the quantised copy of a model that was loaded with dtype int8 or int4.

    Raises ValueError for a model without quantised weights, and as `small_files`;
    OSError as `new_folder` and where a file cannot be written.
    """
    if not vlm.precision.is_quantised or vlm.folder is None:
        raise ValueError(f"{vlm.name} is loaded with {vlm.precision.name} weights; load it with dtype int8 or int4 first")
    target = new_folder(folder)
    sources = small_files(vlm.folder, vlm.config)
    write_weights(vlm.model, target)
    for file in sources:
        shutil.copyfile(file, target / file.name)
    config = {**read_json_object(vlm.folder / "config.json"), "quantization_config": quantisation_settings(vlm.precision)}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def small_files(folder: Path, config: VLMConfig) -> list[Path]:
    """The settings and the tokenizer of a model; raises CheckpointError for a link out of its folder."""
    small = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in SMALL_FILES]
    elsewhere = tokenizer_folder(folder, config)  # nanoVLM's can be in another folder
    others = [] if elsewhere == folder else [elsewhere / name for name in TOKENIZERS]
    return [*(inside(folder, file) for file in small if file.name != INDEX), *(file for file in others if file.is_file())]


def new_folder(folder: str | Path) -> Path:
    """The folder, which is made with its parents where it is not there.

    Raises FileExistsError for a file and for a folder that holds files, and OSError where the folder cannot be written in.
    """
    target = Path(folder).expanduser()
    try:
        target.mkdir(parents=True, exist_ok=True)
        is_empty = not any(target.iterdir())
    except (FileExistsError, NotADirectoryError):
        place = next(part for part in (target, *target.parents) if part.exists())
        raise FileExistsError(f"{target} cannot be a folder: {place} is a file; give a new folder") from None
    except OSError as error:
        raise type(error)(f"{target} cannot be written to: {error.strerror}; give another folder") from error
    if not is_empty:
        raise FileExistsError(f"{target} is not empty; give a new folder")
    if not os.access(target, os.W_OK | os.X_OK):
        raise PermissionError(f"{target} cannot be written to: no permission; give another folder")
    return target


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m nanovlm_v2drop.loading.saving", description="Write a quantised copy.")
    parser.add_argument("model", help="a name, a Hub id or a checkpoint's folder, as for load")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("int8", "int4"), required=True)
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    try:
        target = new_folder(args.folder)  # before minutes of quantising
        save_quantised(load(args.model, dtype=args.dtype), target)
    except (ValueError, OSError, WeightsUnavailable) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"wrote {sum(file.stat().st_size for file in target.iterdir()) / 1e9:.2f} GB to {target}")


if __name__ == "__main__":
    main()
