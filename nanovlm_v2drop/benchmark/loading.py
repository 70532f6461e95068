"""How long importing and loading take, compared with transformers. Each load runs in a process of its own.

`loading_rows` writes random weights to a temporary folder in the layout of llava-hf: a decoder with the layer shapes of an
official model, with as many layers as fit, and a vision tower of two small blocks. Both programs read config.json and the
weights, and no tokenizer. The loads are interleaved. Seconds are medians over the repeats.

load: the time until the call returns.
ready: the time until every page of every weight has been read once. Loading a mapped file alone reads nothing. In bfloat16 on a
CPU it includes the prepacking of our weights (see models/linear.py).
peak: the highest resident memory, minus the resident memory before the load. The pages of a mapped file count.
warm: the file is in the page cache. cold: the file was removed from the page cache, but the disk may have a cache of its own.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..evaluation.machine import peak_memory_mb
from ..loading.checkpoint import load_model
from ..loading.files import write_safetensors
from ..loading.precision import named_precision
from ..models.config import TextConfig, VisionConfig, VLMConfig
from ..models.linear import PrepackedLinear
from .official_llava import LAST_LAYER, llava_settings, llava_tensors

LOADERS = ("ours", "transformers")
CACHES = ("warm", "cold")
DTYPES_BY_STORED = {"float16": ("float16", "bfloat16", "float32"), "bfloat16": ("bfloat16",)}
TOWER = VisionConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, image_size=112)


def loading_rows(
    shape: TextConfig,
    *,
    megabytes: float = 1000.0,
    dtypes: Mapping[str, Sequence[str]] = DTYPES_BY_STORED,
    loaders: Sequence[str] = LOADERS,
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """A row for each dtype of a file, dtype that it is loaded into, page cache and loader.

    Args:
        shape: the decoder of an official model, see workload.SHAPES. Layers are removed until the file has about `megabytes`.
        dtypes: for each dtype of a file, the dtypes that it is loaded into, on the CPU.
        loaders: "ours", and "transformers" if it is installed.

    Raises ValueError if one layer alone is larger than `megabytes`, and RuntimeError if a load fails.
    """
    rows = []
    for stored in dtypes:
        with TemporaryDirectory(prefix="nanovlm-loading-") as place:
            size = write_checkpoint(Path(place), shape, megabytes, getattr(torch, stored))
            for dtype, cache in product(dtypes[stored], CACHES):
                runs = [[measured_apart(loader, Path(place), dtype, cache) for loader in loaders] for _ in range(repeats)]
                about = {"stored": stored, "dtype": dtype, "cache": cache, "file_mb": size / 1e6}
                rows += [loading_row(loader, about, own) for loader, own in zip(loaders, zip(*runs, strict=True), strict=True)]
    return rows


def loading_row(loader: str, about: dict[str, Any], runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {
        "loading": loader,
        **about,
        **{name: median(run[name] for run in runs) for name in ("load_seconds", "ready_seconds", "cpu_seconds", "peak_mb")},
        "rounds_seconds": [run["load_seconds"] for run in runs],
    }


def import_row(repeats: int) -> dict[str, Any]:
    """Seconds that importing the main names of this package takes after torch, and seconds that torch itself takes."""
    script = (
        "import time; start = time.perf_counter(); import torch; middle = time.perf_counter(); "
        "from nanovlm_v2drop import generate, load; "
        "print([middle - start, time.perf_counter() - middle])"
    )
    runs = [json.loads(output_of(script)) for _ in range(repeats)]
    torch_seconds, own_seconds = (median(seconds) for seconds in zip(*runs, strict=True))
    return {"loading": "import", "torch_seconds": torch_seconds, "beyond_torch_seconds": own_seconds}


def write_checkpoint(folder: Path, shape: TextConfig, megabytes: float, stored: torch.dtype) -> int:
    """Write config.json and model.safetensors. Returns the size of model.safetensors in bytes. Raises as `loading_rows`."""
    for layers in range(shape.num_hidden_layers, 0, -1):
        smaller = replace(shape, num_hidden_layers=layers, mrope_section=None)
        state = llava_tensors(smaller, TOWER)
        if sum(tensor.numel() for tensor in state.values()) * stored.itemsize <= megabytes * 1e6:
            break
    else:
        raise ValueError(f"one layer is larger than {megabytes:g} MB; give more")
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.empty(t.shape, dtype=stored).normal_(0, 0.02, generator=generator) for name, t in state.items()}
    settings = llava_settings(smaller, TOWER, LAST_LAYER, shape.vocab_size - 1)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    write_safetensors(values, folder / "model.safetensors")
    with (folder / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())  # the page cache can only drop pages that are on the disk
    return (folder / "model.safetensors").stat().st_size


def measured_apart(loader: str, folder: Path, dtype: str, cache: str) -> dict[str, float]:
    """One load in a process of its own. Raises RuntimeError with the last line of its output if it fails."""
    call = f"measured({loader!r}, Path({str(folder)!r}), {dtype!r}, {cache!r}, {torch.get_num_threads()})"
    return json.loads(output_of(f"import json; from nanovlm_v2drop.benchmark.loading import *; print(json.dumps({call}))"))


def output_of(script: str) -> str:
    """The last line that a script prints in a new Python process, which imports this same package."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"loading failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.splitlines()[-1]


def measured(loader: str, folder: Path, dtype: str, cache: str, threads: int) -> dict[str, float]:
    """Seconds and MB of one load in this process, which must not have loaded anything before."""
    torch.set_num_threads(threads)
    load = load_ours if loader == "ours" else transformers_loader()
    prepare_cache(folder / "model.safetensors", cache)
    before, started, worked = resident_bytes(), time.perf_counter(), time.process_time()
    model = load(folder, dtype)
    loaded, cpu = time.perf_counter(), time.process_time() - worked
    for module in model.modules():
        if isinstance(module, PrepackedLinear):
            module.pack()
    for weight in model.parameters():
        weight.detach().flatten()[:: 4096 // weight.element_size()].sum()
    ready = time.perf_counter()
    peak_mb = peak_memory_mb(torch.device("cpu")) - before / 1e6
    return {"load_seconds": loaded - started, "ready_seconds": ready - started, "cpu_seconds": cpu, "peak_mb": peak_mb}


def load_ours(folder: Path, dtype: str) -> Any:
    cpu = torch.device("cpu")
    return load_model(folder, VLMConfig.from_folder(folder), device=cpu, precision=named_precision(dtype, cpu))


def transformers_loader() -> Any:
    """`LlavaForConditionalGeneration.from_pretrained`, imported before the clock starts."""
    from transformers import LlavaForConditionalGeneration

    return lambda folder, dtype: LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def prepare_cache(file: Path, cache: str) -> None:
    """Read the file once ("warm"), or remove its pages from the page cache ("cold")."""
    with file.open("rb") as opened:
        if cache == "cold":
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while cache == "warm" and opened.read(1 << 24):
            pass


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
