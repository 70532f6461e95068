"""The memory of processes that each hold one decoder and have answered one prompt, ours and llama.cpp's.

anonymous: the memory that only this process can hold. For us it includes torch's own.
mapped: pages of files that the process has touched: libraries, and the weights of llama.cpp.
"""

import json
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .contenders import Contender, our_contenders
from .llama_cpp import LlamaCpp
from .loading import output_of
from .workload import make_workloads

MARKS = {"RssAnon": "anonymous_mb", "RssFile": "mapped_mb"}


def memory_rows(options: Mapping[str, Any], running: Mapping[Contender, LlamaCpp]) -> list[dict[str, Any]]:
    """A row for each dtype of the options, in a new process, and for each running process of llama.cpp. Linux only."""
    rows = []
    for dtype in options["dtype"].split(","):
        rows.append({"memory": f"ours {dtype}", **measured_apart({**options, "dtype": dtype})})
    return rows + [{"memory": each.name, **resident(process.process.pid)} for each, process in running.items()]


def measured_apart(options: Mapping[str, Any]) -> dict[str, float]:
    """`own_memory` in a process of its own."""
    return json.loads(output_of(f"import json; from {__name__} import own_memory; print(json.dumps(own_memory({options!r})))"))


@torch.inference_mode()
def own_memory(options: Mapping[str, Any]) -> dict[str, float]:
    """The memory of this process after it has made the decoder of one dtype, and has run one prompt and some tokens."""
    torch.set_num_threads(options["threads"])
    workload, *_ = make_workloads(Namespace(**options))
    (dense,) = our_contenders(workload, [], {})
    dense.decoding(dense.prefill())()
    return resident(os.getpid())


def resident(process_id: int | str) -> dict[str, float]:
    """MB of a process (its number, or "self") that are resident now."""
    lines = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8").splitlines()
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if name in MARKS}
    return {MARKS[name]: size * 1024 / 1e6 for name, size in kilobytes.items()}
