"""The benchmarks: one small file each, which says where the samples come from, how they are asked and how they are scored."""

from pathlib import Path

from .ai2d import Ai2d
from .base import Sample, Task
from .demo import Demo
from .demo_video import DemoVideo
from .gqa import Gqa
from .longvideobench import LongVideoBench
from .mlvu import Mlvu
from .mmbench import MmBench
from .mme import Mme
from .mmstar import MmStar
from .mvbench import MvBench
from .parquet import DatasetUnavailable
from .pope import Pope
from .scienceqa import ScienceQa
from .seed_image import SeedImage
from .textvqa import TextVqa, TextVqaOcr
from .videomme import VideoMme
from .vizwiz import VizWiz

__all__ = ["TASKS", "DatasetUnavailable", "Demo", "DemoVideo", "Mme", "Pope", "Sample", "Task", "load_task"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        *(Demo, DemoVideo, Gqa, ScienceQa, TextVqa, TextVqaOcr, Pope, Mme, MmBench, Ai2d, MmStar, SeedImage, VizWiz),
        *(MvBench, VideoMme, LongVideoBench, Mlvu),
    )
}


def load_task(name: str, data_dir: Path | None = None) -> Task:
    """Make the benchmark of that name. Nothing is read or downloaded before its files or samples are asked for.

    Args:
        name: a key of `TASKS`.
        data_dir: folder with the benchmark's parquet files (see `dataset_files`); None takes them from the Hub.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose one of: {', '.join(sorted(TASKS))}")
    return TASKS[name](data_dir)
