"""How fast prefill and decode are: beside transformers, beside what the machine can do, and beside the FLOPs formula.

    python -m nanovlm_v2drop.benchmark                                    # 4 layers of LLaVA-1.5-7B, bfloat16, CPU
    python -m nanovlm_v2drop.benchmark --layers 32 --device cuda --repeats 21
    python -m nanovlm_v2drop.benchmark --model llava-1.5-13b --layers 2 --tokens 192 --json > speed.json
    python -m nanovlm_v2drop.benchmark --model llava-onevision-qwen2-7b-ov --frames 32 --retain 0.25 --transformers sdpa
    python -m nanovlm_v2drop.benchmark --loading

Random weights at the official layer shapes, no download. Before anything is timed, dense logits must equal those of
transformers' LlamaForCausalLM or Qwen2ForCausalLM on the very same tensors; both count positions 0, 1, 2, ..., so for Qwen2-VL
our side of this check does so too, which changes no cost. A machine's speed drifts, so each round times everything once, in
an order that rotates; times are medians over the rounds, speed-ups and shares medians of the ratios within a round.

Budgets are means over all layers of the model. Where --layers runs fewer, drop points stand at the same depths and keep the
same shares, which leaves another mean: it is said above the table.

gemm_percent: time of the same matrix products alone, as our layers call them (each layer's own weights and tokens), as a
share of the prefill. In bfloat16 on a CPU ours are prepacked (see linear.py) and transformers' are not: it is held against the
same, faster ceiling, and plain_gemm_ms says what plain products take. flops_ratio: the speed-up over dense that
DropSchedule.prefill_flops promises; achieved_percent: the share of it that the clock confirms. drop_points: scoring, selecting
and gathering alone, on tensors of the same shape. peak_memory: weights included, twice where transformers' stand beside
prepacked ones; on a CPU the whole process's, its mark reset where Linux can. touched: what one token reads in decode, weights
once and cache once; bandwidth_percent: beside reading as many bytes (a float32 sum over READ_BYTES at most).
"""

import argparse
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..dropping import DropSchedule
from ..dropping.schedule import PAPER_VISION_TOKENS
from ..evaluation.evaluate import processor_name
from .contenders import ATTENTIONS, Contender, check_logits, decoding_contenders, our_contenders, transformers_contenders
from .loading import LOADERS, import_row, loading_rows
from .measure import decode_rows, prefill_rows
from .workload import Workload, make_workload, shape_of

CPU = torch.device("cpu")
PICTURE_TOKENS, VIDEO_SHARES = "192,128,64", "0.25,0.2,0.15"  # budgets where none are given
JSON_ONLY = ("gemm_ms", "plain_gemm_ms", "drop_points_ms", "peak_memory_mb", "touched_mb", "read_gb_per_s")


def budgets_of(args: argparse.Namespace, vision_tokens: int) -> dict[str, float]:
    """Mean vision tokens a layer by the name that each budget has in the rows; raises ValueError for what is no number."""
    tokens, shares = args.tokens, args.retain
    if tokens is None and shares is None:
        tokens, shares = (PICTURE_TOKENS, None) if args.frames is None else (None, VIDEO_SHARES)
    if tokens is not None:
        return {f"{budget:g}": budget for budget in map(float, tokens.split(","))}
    return {f"{100 * share:.4g}%": share * vision_tokens for share in map(float, shares.split(","))}


@torch.inference_mode()
def run_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Check, then measure; raises ValueError for options that cannot be, RuntimeError where the logits differ."""
    sizes = args.layers, args.repeats, args.decode_steps, args.text_tokens, args.vision_tokens, args.frames
    if min(size for size in sizes if size is not None) < 1:
        raise ValueError("layers, repeats, decode steps, frames and numbers of tokens must be at least 1")
    if args.cuda_graph and args.device == "cpu":
        raise ValueError("--cuda-graph needs --device cuda")
    workload = make_workload(args)
    _, _, vision_tokens = workload.sizes
    contenders = our_contenders(workload, args.methods.split(","), budgets_of(args, vision_tokens))
    notes, check = list(depth_notes(workload, contenders)), None
    if workload.plain is not None:
        references = transformers_contenders(workload, args.transformers.split(","))
        check = check_logits(workload, references[0])
        contenders += references
        notes += position_notes(workload)
    return {
        **vars(args),
        "vision_tokens": vision_tokens,
        "model_layers": workload.model_layers,
        "attention": workload.decoder.attention,
        "notes": notes,
        "logits_check": check,
        "prefill": prefill_rows(workload, contenders, args.repeats),
        "decode": decode_rows(workload, decoding_contenders(contenders), args.repeats),
        "machine": describe_machine(workload.device),
    }


def depth_notes(workload: Workload, contenders: Sequence[Contender]) -> Iterator[str]:
    """What the budgets of the whole model have become in the layers that run, where these are fewer."""
    config, text_tokens, vision_tokens = workload.sizes
    layers, all_layers = config.num_hidden_layers, workload.model_layers
    whole_config = replace(config, num_hidden_layers=all_layers)
    dense_flops = DropSchedule({}).prefill_flops(whole_config, text_tokens, vision_tokens)
    for each in contenders if layers < all_layers else ():
        if (whole := each.model_schedule) is not None:
            asked, run = whole.mean_tokens(vision_tokens, all_layers), each.schedule.mean_tokens(vision_tokens, layers)
            ratio = dense_flops / whole.prefill_flops(whole_config, text_tokens, vision_tokens)
            model = f"mean {asked:.1f} and flops ratio {ratio:.2f} in all {all_layers} layers"
            yield f"{each.name}: {model}; mean {run:.1f} in the {layers} that run"


def position_notes(workload: Workload) -> list[str]:
    if workload.packed.position_ids.dim() == 1:
        return []
    return ["transformers: positions 0, 1, 2, ... instead of time, row and column: equal work; so were dense logits compared"]


def describe_machine(device: torch.device) -> dict[str, Any]:
    return {
        "cpu": processor_name(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": getattr(sys.modules.get("transformers"), "__version__", None),
    }


def make_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What fits a screen of the rows, under the names that they have in the JSON."""
    names = [name for name, value in rows[0].items() if not isinstance(value, (list, dict)) and name not in JSON_ONLY]
    table = Table(*(name.replace("_", " ") for name in names))
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in names))
    return table


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m nanovlm_v2drop.benchmark", description=__doc__, formatter_class=raw)
    sizes = {"layers": 4, "text-tokens": 64, "repeats": 7, "decode-steps": 16}
    names = {"model": "llava-1.5-7b", "methods": "v2drop,random"}
    places = {"dtype": "bfloat16", "device": "cpu", "attention": "auto"}
    for name, default in {**names, **places, **sizes, "threads": torch.get_num_threads()}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    prompt, budget = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    prompt.add_argument("--vision-tokens", type=int, default=PAPER_VISION_TOKENS, help="of a picture; default: %(default)s")
    prompt.add_argument("--frames", type=int, help="of a video, instead of a picture")
    budget.add_argument("--tokens", help=f"mean vision tokens a layer; default for a picture: {PICTURE_TOKENS}")
    budget.add_argument("--retain", help=f"the same as shares of the vision tokens; default for a video: {VIDEO_SHARES}")
    parser.add_argument("--cuda-graph", action="store_true", help="decode our models by a CUDA graph; needs --device cuda")
    parser.add_argument("--compile", action="store_true", help="compile the layers of our models with torch.compile")
    parser.add_argument("--transformers", default=",".join(ATTENTIONS), help="its attentions; default: %(default)s")
    parser.add_argument("--no-transformers", dest="transformers", action="store_const", const="")
    parser.add_argument("--loading", action="store_true", help="instead: seconds to import, and to load a checkpoint of 1 GB")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    return parser


def run_loading(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds for importing and loading, ours and transformers'; raises as `loading_rows`."""
    loaders = LOADERS if args.transformers else LOADERS[:1]
    importing, rows = import_row(args.repeats), loading_rows(shape_of(args.model), loaders=loaders, repeats=args.repeats)
    beyond, torchs = importing["beyond_torch_seconds"], importing["torch_seconds"]
    note = f"importing takes {beyond:.2f} s beyond torch's own {torchs:.2f} s"
    return {**vars(args), "notes": [note], "importing": importing, "loads": rows, "machine": describe_machine(CPU)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        torch.set_num_threads(args.threads)
        args.transformers = args.transformers if importlib.util.find_spec("transformers") else ""
        report = (run_loading if args.loading else run_benchmark)(args)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    report["command"] = " ".join([parser.prog, *map(shlex.quote, sys.argv[1:] if argv is None else argv)])
    if not args.json:
        console = Console(width=None if sys.stdout.isatty() else 160)
        tables = [make_table(report[name]) for name in ("loads", "prefill", "decode") if name in report]
        console.print(*report["notes"], *tables, sep="\n", highlight=False)
    print(json.dumps(report))
