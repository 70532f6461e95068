"""What can be checked in milliseconds: files, folders and packages, before torch is imported or weights are fetched."""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from ..loading.specs import MODELS, VIDEO
from . import choices
from .arguments import DEMOS

MOST_PICTURES = 64  # of one question


def check_files_and_packages(arguments: argparse.Namespace) -> None:
    """Replace folders of pictures by their pictures in `arguments.image`.

    Raises FileNotFoundError, PermissionError or ValueError for what cannot be read or written, and ImportError for a package
    that this run will need.
    """
    if arguments.image is not None:
        arguments.image = pictures_of(arguments.image)
    if arguments.video is not None:
        check_file(arguments.video, "--video")
        check_takes_video(arguments.model, "--video")
    for name in ("weights", "data"):
        if (folder := getattr(arguments, name)) is not None:
            check_folder(folder, f"--{name}")
    if arguments.weights is not None:
        check_checkpoint(arguments.weights, "--weights")
    elif (model := Path(arguments.model).expanduser()).is_dir() and arguments.model not in MODELS:
        check_checkpoint(model, "--model")
    if arguments.output is not None:
        check_output(arguments.output)
    check_packages(arguments)


def pictures_of(given: Sequence[Path]) -> list[Path]:
    """The files given, and in place of a folder its pictures in the order of their names."""
    found: list[Path] = []
    for place in given:
        own = pictures_in(place) if place.is_dir() else [place]
        for picture in own:
            check_file(picture, "--image")
        found += own
    if len(found) > MOST_PICTURES:
        raise ValueError(f"--image gives {len(found)} pictures; one question takes at most {MOST_PICTURES}")
    return found


def pictures_in(folder: Path) -> list[Path]:
    check_folder(folder, "--image")
    suffixes = choices.picture_suffixes()
    # macOS leaves a hidden ._photo.jpg beside photo.jpg on other systems' disks, which is no picture.
    shown = (file for file in folder.iterdir() if not file.name.startswith("."))
    pictures = sorted(file for file in shown if file.suffix.lower() in suffixes)
    if not pictures:
        raise FileNotFoundError(f"--image {folder} holds no picture ({', '.join(suffixes)})")
    return pictures


def check_file(file: Path, option: str) -> None:
    if file.is_dir():
        raise ValueError(f"{option} {file} is a folder; give a file")
    if not file.exists():
        raise FileNotFoundError(f"{option} {file}: there is no such file")
    if not file.is_file():
        raise ValueError(f"{option} {file} is no ordinary file")
    if not os.access(file, os.R_OK):
        raise PermissionError(f"{option} {file}: no permission to read it")


def check_folder(folder: Path, option: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {folder}: there is no such folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise PermissionError(f"{option} {folder}: no permission to read it")


def check_checkpoint(folder: Path, option: str) -> None:
    """Raise FileNotFoundError for a folder without config.json; the message also names the other files that are not there."""
    check_folder(folder, option)
    if not (folder / "config.json").is_file():
        missing = [file for file in ("config.json", "*.safetensors", "tokenizer*") if not any(folder.glob(file))]
        raise FileNotFoundError(f"{option} {folder} holds no {', no '.join(missing)}; give the folder of a checkpoint")


def check_output(output: Path) -> None:
    """Raise unless results can be written there; nothing is created yet."""
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"--output {output}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--output {output}: no permission to write in {existing}")


def check_takes_video(model: str, option: str) -> None:
    if model in MODELS and VIDEO not in MODELS[model].takes:
        able = ", ".join(name for name, spec in MODELS.items() if VIDEO in spec.takes)
        raise ValueError(f"{option}: {model} takes pictures only; models that take a video: {able}")


def check_packages(arguments: argparse.Namespace) -> None:
    """Raise ImportError for a missing package, before minutes of work are lost for it."""
    asks = arguments.prompt is not None or arguments.chat or arguments.conversations
    needed = {
        "plotly": not asks and not arguments.calibrate and not arguments.text,
        "pyarrow": not asks and not arguments.text and any(task not in DEMOS for task in arguments.tasks),
        "av": arguments.video is not None,
        "flash_attn": arguments.attention == "flash-attn",
    }
    if missing := [name for name, need in needed.items() if need and importlib.util.find_spec(name) is None]:
        raise ImportError(f"this run needs the package {missing[0]}: pip install {missing[0].replace('_', '-')}")
