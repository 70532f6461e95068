"""The table of `--list-models`, and which model fits a machine. Neither needs torch."""

import os

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..loading.specs import MODELS, PICTURE, SEVERAL, VIDEO, ModelSpec

SPARE = 0.75  # share of the memory that weights may take; the rest is for pictures, caches and other programs
WIDTH = 80


def print_models() -> None:
    """Name, parameters, download size, licence, and what each model takes."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("name", "para-\nmeters", "download", "licence", "takes"):
        table.add_column(title, no_wrap=True, justify="right" if title in ("para-\nmeters", "download") else "left")
    for spec in MODELS.values():
        table.add_row(spec.name, parameters(spec), download(spec), spec.licence or "-", takes(spec))
    Console(width=WIDTH, markup=False, highlight=False).print(table)


def parameters(spec: ModelSpec) -> str:
    if spec.parameters is None:
        return "-"
    return f"{spec.parameters:.1f} B" if spec.parameters >= 0.1 else f"{1000 * spec.parameters:.1f} M"


def download(spec: ModelSpec) -> str:
    return "shipped" if spec.download_size is None else f"{spec.download_size:.1f} GB"


def takes(spec: ModelSpec) -> str:
    pictures = "pictures" if SEVERAL in spec.takes else PICTURE
    return f"{pictures}, video" if VIDEO in spec.takes else pictures


def fitting_model(memory_gb: float, medium: str) -> ModelSpec | None:
    """The largest model to download whose 16-bit weights fit and that takes `medium`; None where none fits."""
    fitting = [
        spec
        for spec in MODELS.values()
        if medium in spec.takes and spec.download_size is not None and spec.download_size <= SPARE * memory_gb
    ]
    return max(fitting, key=lambda spec: spec.download_size or 0.0, default=None)


def physical_memory_gb() -> float:
    """Of the whole machine, in GB (10^9 bytes)."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
