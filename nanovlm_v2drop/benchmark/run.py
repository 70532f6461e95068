r"""How fast prefill and decode are, compared with transformers, llama.cpp, the limits of the machine, and the FLOPs formula.

    python -m nanovlm_v2drop.benchmark                                    # 4 layers of LLaVA-1.5-7B, bfloat16, CPU
    python -m nanovlm_v2drop.benchmark --layers 32 --device cuda --repeats 21
    python -m nanovlm_v2drop.benchmark --model llava-1.5-13b --layers 2 --tokens 192 --json > speed.json
    python -m nanovlm_v2drop.benchmark --model llava-onevision-qwen2-7b-ov --frames 32 --retain 0.25 \
        --peers transformers:sdpa
    python -m nanovlm_v2drop.benchmark --dtype bfloat16,int8,int4 --peers llama.cpp
    python -m nanovlm_v2drop.benchmark --loading

The weights are random, at the official layer shapes, so nothing is downloaded. Before the timing starts, our dense logits
must equal those of LlamaForCausalLM or Qwen2ForCausalLM of transformers on the same tensors. Both count positions 0, 1, 2 and
so on in this check, also for Qwen2-VL; the cost is the same. The speed of a machine drifts, so each round runs everything once,
in an order that rotates. Times are medians over the rounds. Speed-ups and shares are medians of the ratios within a round.

With several dtypes, the same decoder runs in each of them in the same rounds, and every speed-up refers to the first dtype. So
it does with several of --kv-cache-dtype: with auto,int8 the rows of the int8 cache have names such as "bfloat16/int8 dense". A
peer that cannot run here is left out, and a note says why. The rows of transformers and llama.cpp are compared with the matrix
products of the first dtype. llama.cpp runs weights of noise of the same shape, see llama_cpp.py.

Budgets are means over all layers of the model. If --layers runs fewer layers, the drop points are placed at the same depths and
keep the same shares. The mean is then another one, and a note above the table states it.

gemm_percent: the time of the same matrix products alone, as a share of the prefill. In bfloat16 on a CPU our weights are
    prepacked (see models/linear.py) and those of transformers are not. Both are compared with the prepacked products, which
    are faster. plain_gemm_ms is the time of the plain products.
flops_ratio: the speed-up over dense that DropSchedule.prefill_flops predicts.
achieved_percent: the share of that speed-up that was measured.
drop_points: scoring, selecting and gathering alone, on tensors of the same shape.
peak_memory: includes the weights, which are in memory twice if transformers runs beside prepacked weights. On a CPU it is the
    memory of the whole process, and the mark is reset before each run where Linux allows it.
products_percent, kernel_speedup: the time of the matrix products of one decoded token alone as a share of its whole time, and
    the speed-up of these products over those of the first dtype. of_kernel_percent is the share of it that decoding reaches.
touched: the bytes that one token reads in decode, weights and cache.
fastest_ms: the minimum over the rounds.
memory: of processes that hold one model each, see memory.py. It is measured where llama.cpp is a peer.
bandwidth_percent: compared with reading the same number of bytes (a float32 sum over at most READ_BYTES).
"""

import argparse
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..dropping import DropSchedule
from ..dropping.schedule import PAPER_VISION_TOKENS
from ..evaluation.machine import processor_name
from ..models.linear import has_bfloat16_instructions
from .contenders import ATTENTIONS, Contender, check_logits, decoding_contenders, our_contenders, transformers_contenders
from .llama_cpp import QUANTISATIONS, LlamaCpp, PeerUnavailable, llama_cpp_contenders
from .loading import LOADERS, import_row, loading_rows
from .measure import decode_rows, prefill_rows
from .memory import memory_rows
from .workload import Workload, make_workloads, shape_of

CPU = torch.device("cpu")
PICTURE_TOKENS, VIDEO_SHARES = "192,128,64", "0.25,0.2,0.15"  # budgets where none are given
TRANSFORMERS, LLAMA_CPP, NO_PEERS = "transformers", "llama.cpp", "none"
PEERS = {TRANSFORMERS: ATTENTIONS, LLAMA_CPP: QUANTISATIONS}  # and what can be chosen of each
JSON_ONLY = ("fastest_ms", "gemm_ms", "plain_gemm_ms", "drop_points_ms", "peak_memory_mb", "touched_mb", "read_gb_per_s")


def budgets_of(args: argparse.Namespace, vision_tokens: int) -> dict[str, float]:
    """Mean vision tokens per layer, by the name of each budget in the rows. Raises ValueError for text that is no number."""
    tokens, shares = args.tokens, args.retain
    if tokens is None and shares is None:
        tokens, shares = (PICTURE_TOKENS, None) if args.frames is None else (None, VIDEO_SHARES)
    if tokens is not None:
        return {f"{budget:g}": budget for budget in numbers("--tokens", tokens)}
    return {f"{100 * share:.4g}%": share * vision_tokens for share in numbers("--retain", shares)}


def numbers(option: str, text: str) -> list[float]:
    """The numbers of an option; raises ValueError for text that is none."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be numbers with commas between them") from None


def named_peers(text: str) -> dict[str, list[str]]:
    """What of each peer runs, from "PEER,PEER:CHOICE,...". Raises ValueError for an unknown peer or choice."""
    peers: dict[str, list[str]] = {}
    for item in text.split(",") if text != NO_PEERS else ():
        name, _, choice = item.partition(":")
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; choose from {', '.join(PEERS)}, or {NO_PEERS}")
        if choice and choice not in PEERS[name]:
            raise ValueError(f"{name} has no choice {choice!r}; choose from {', '.join(PEERS[name])}")
        peers[name] = [*peers.get(name, ()), *([choice] if choice else PEERS[name])]
    return peers


def installed_peers(text: str, notes: list[str]) -> dict[str, list[str]]:
    """The peers that were asked for, without transformers if that is not installed; a note says so. Raises as `named_peers`."""
    peers = named_peers(text)
    if TRANSFORMERS in peers and importlib.util.find_spec(TRANSFORMERS) is None:
        notes.append(f"{TRANSFORMERS} was left out: it is not installed")
        del peers[TRANSFORMERS]
    return peers


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for options with a number below one."""
    for name in names:
        if (count := getattr(args, name)) is not None and count < 1:
            raise ValueError(f"--{name.replace('_', '-')} {count} must be at least 1")


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers below one and for graphs without a GPU."""
    check_counts(args, "layers", "repeats", "decode_steps", "text_tokens", "vision_tokens", "frames", "threads")
    if args.cuda_graph and args.device == "cpu":
        raise ValueError("--cuda-graph needs --device cuda")


@torch.inference_mode()
def run_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Check the logits, then measure. Raises ValueError for impossible options and RuntimeError if the logits differ."""
    notes: list[str] = []
    peers = installed_peers(args.peers, notes)
    workloads = make_workloads(args, TRANSFORMERS in peers)
    first = workloads[0]
    _, _, vision_tokens = first.sizes
    methods, budgets = args.methods.split(","), budgets_of(args, vision_tokens)
    contenders = [each for workload in workloads for each in our_contenders(workload, methods, budgets)]
    notes += depth_notes(first, contenders)
    check, references = checked_transformers(first, peers.get(TRANSFORMERS, []), notes)
    with ExitStack() as stack:
        running = running_llama_cpp(first, peers.get(LLAMA_CPP, []), stack, notes)
        contenders += [*references, *running]
        timed = {
            "prefill": prefill_rows(contenders, args.repeats),
            "decode": decode_rows(decoding_contenders(contenders), args.repeats),
            **({"memory": memory_rows(vars(args), running)} if running and sys.platform == "linux" else {}),
        }
    about = {"vision_tokens": vision_tokens, "model_layers": first.model_layers, "attention": first.decoder.attention}
    machine = describe_machine(first.device)
    return {**vars(args), **about, "notes": notes, "logits_check": check, **timed, "machine": machine}


def checked_transformers(
    workload: Workload, attentions: Sequence[str], notes: list[str]
) -> tuple[dict[str, float] | None, list[Contender]]:
    """How far our dense logits are from those of transformers, and its contenders. Quantised weights are not compared."""
    if not attentions:
        return None, []
    references = transformers_contenders(workload, attentions)
    notes += position_notes(workload)
    if workload.precision.is_quantised:
        notes.append(f"the logits of {workload.precision.name} weights were not compared with those of {TRANSFORMERS}")
        return None, references
    return check_logits(workload, references[0]), references


def running_llama_cpp(
    workload: Workload, quantisations: Sequence[str], stack: ExitStack, notes: list[str]
) -> dict[Contender, LlamaCpp]:
    """llama.cpp's contenders and their processes, which end with the stack. A note says why they are left out."""
    if not quantisations:
        return {}
    try:
        running = stack.enter_context(llama_cpp_contenders(workload, quantisations))
    except PeerUnavailable as reason:
        notes.append(f"{LLAMA_CPP} was left out: {reason}")
        return {}
    notes += {f"{LLAMA_CPP}: {process.about}" for process in running.values()}
    return running


def depth_notes(workload: Workload, contenders: Sequence[Contender]) -> Iterator[str]:
    """The means of the whole model and of the layers that run, if these are fewer."""
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
    note = "transformers counts positions 0, 1, 2 and so on, not time, row and column"
    return [f"{note}; the work is the same, and the dense logits were compared in this way"]


def describe_machine(device: torch.device) -> dict[str, Any]:
    return {
        "cpu": processor_name(),
        "instructions": instruction_sets(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": getattr(sys.modules.get("transformers"), "__version__", None),
    }


def instruction_sets() -> list[str]:
    """What decides the speed of products on this processor, as far as oneDNN may use it."""
    has_bfloat16 = has_bfloat16_instructions()
    known = {
        "VNNI": torch.cpu._is_vnni_supported(),
        "AVX512_BF16": has_bfloat16 and torch.cpu._is_avx512_bf16_supported(),
        "AMX": has_bfloat16 and torch.cpu._is_amx_tile_supported(),
    }
    return [torch.backends.cpu.get_cpu_capability(), *(name for name, has in known.items() if has)]


def make_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The columns that fit on a screen, under the names that they have in the JSON."""
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
    places = {"dtype": "bfloat16", "device": "cpu", "attention": "auto", "kv-cache-dtype": "auto", "peers": TRANSFORMERS}
    for name, default in {**names, **places, **sizes, "threads": torch.get_num_threads()}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    prompt, budget = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    prompt.add_argument("--vision-tokens", type=int, default=PAPER_VISION_TOKENS, help="of the picture; default: %(default)s")
    prompt.add_argument("--frames", type=int, help="frames of a video, which replaces the picture")
    budget.add_argument("--tokens", help=f"mean vision tokens per layer; default for a picture: {PICTURE_TOKENS}")
    budget.add_argument("--retain", help=f"shares of the vision tokens; default for a video: {VIDEO_SHARES}")
    parser.add_argument("--cuda-graph", action="store_true", help="decode our models by a CUDA graph; needs --device cuda")
    parser.add_argument("--compile", action="store_true", help="compile the layers of our models with torch.compile")
    parser.add_argument("--loading", action="store_true", help="measure import and loading of 1 GB instead")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    return parser


def run_loading(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds for importing and loading, for us and for transformers. Raises what `loading_rows` raises."""
    notes: list[str] = []
    loaders = LOADERS if TRANSFORMERS in installed_peers(args.peers, notes) else LOADERS[:1]
    importing, rows = import_row(args.repeats), loading_rows(shape_of(args.model), loaders=loaders, repeats=args.repeats)
    beyond, torchs = importing["beyond_torch_seconds"], importing["torch_seconds"]
    notes.append(f"importing takes {beyond:.2f} s beyond torch's own {torchs:.2f} s")
    return {**vars(args), "notes": notes, "importing": importing, "loads": rows, "machine": describe_machine(CPU)}


def result_console() -> Console:
    """As wide as the terminal; where stdout is none, wide enough for every table."""
    return Console(width=None if sys.stdout.isatty() else 160)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table; where stdout is no terminal, also as a JSON object with the machine."""
    result_console().print(make_table(rows), highlight=False)
    if not sys.stdout.isatty():
        print(json.dumps({"rows": rows, "machine": describe_machine(torch.device("cpu"))}))


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        check_options(args)
        torch.set_num_threads(args.threads)
        report = (run_loading if args.loading else run_benchmark)(args)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    report["command"] = " ".join([parser.prog, *map(shlex.quote, sys.argv[1:] if argv is None else argv)])
    if not args.json:
        tables = [make_table(report[name]) for name in ("loads", "prefill", "decode", "memory") if name in report]
        result_console().print(*report["notes"], *tables, sep="\n", highlight=False)
    if args.json or not sys.stdout.isatty():
        print(json.dumps(report))
