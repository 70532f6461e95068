"""How fast prefill and decode are: beside transformers, beside what the machine can do, and beside the FLOPs formula.

    python -m nanovlm_v2drop.benchmark                                    # 4 layers of LLaVA-1.5-7B, bfloat16, CPU
    python -m nanovlm_v2drop.benchmark --layers 32 --device cuda --repeats 21
    python -m nanovlm_v2drop.benchmark --model llava-1.5-13b --layers 2 --tokens 192 --json > speed.json

Random weights at the official layer shapes, no download. Before anything is timed, dense logits must equal those of
transformers' LlamaForCausalLM on the very same tensors. A machine's speed drifts, so each round times everything once, in an
order that rotates; times are medians over the rounds, speed-ups and shares medians of the ratios within a round.

gemm_percent: time of the same matrix products alone (each layer's own weights and tokens, outputs allocated beforehand), as
a share of the prefill. flops_ratio: the speed-up over dense that DropSchedule.prefill_flops promises; achieved_percent: the
share of it that the clock confirms. drop_points: scoring, selecting and gathering alone, on tensors of the same shape.
peak_memory: weights included; on a CPU the whole process's, its mark reset where Linux can. touched: what one token reads in
decode, weights once and cache once; bandwidth_percent: beside one pass over the same weights (a float32 sum, bytes read).
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .attention import resolve_backend
from .config import TextConfig
from .decoder import Decoder
from .dropping import PUBLISHED_SCHEDULES, DropSchedule, PrefillState, TokenDropper
from .dropping.schedule import PAPER_DEPTHS, layers_at_depths
from .evaluate import peak_memory_mb, reset_peak_memory, timestamp
from .inference import Prefilled, decode_one_token, prefill
from .plans import DENSE, find_methods
from .vlm import PackedInputs
from .zoo import as_device, as_dtype

Run = Callable[[], Any]

# text_config of llava-hf/llava-1.5-7b-hf and llava-1.5-13b-hf
SHAPE_7B = TextConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
SHAPE_13B = replace(
    SHAPE_7B, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
)
JSON_ONLY = ("gemm_ms", "drop_points_ms", "peak_memory_mb", "touched_mb", "read_gb_per_s")
TEXT_SHAPES = {"llava-1.5-7b": SHAPE_7B, "llava-1.5-13b": SHAPE_13B}


@dataclass(frozen=True)
class Workload:
    """One prompt through one decoder, with `decode_steps` tokens behind it."""

    decoder: Decoder
    packed: PackedInputs
    decode_steps: int

    @property
    def device(self) -> torch.device:
        return self.packed.inputs_embeds.device

    @property
    def sizes(self) -> tuple[TextConfig, int, int]:
        """Config, text tokens and vision tokens, as DropSchedule counts costs from them."""
        vision_tokens = sum(self.packed.vision_counts)
        return self.decoder.config, sum(self.packed.seqlens) - vision_tokens, vision_tokens

    @property
    def decode_weights(self) -> list[Tensor]:
        """What a decoded token reads: everything but the embedding table, of which it reads one row."""
        modules = (self.decoder.layers, self.decoder.norm, self.decoder.lm_head)
        return [weight.data for module in modules for weight in module.parameters()]

    def tokens_per_layer(self, schedule: DropSchedule) -> list[int]:
        config, text_tokens, vision_tokens = self.sizes
        counts = schedule.vision_tokens_per_layer(vision_tokens, config.num_hidden_layers)
        return [text_tokens + count for count in counts]

    def cache_bytes(self, schedule: DropSchedule, decoded: int = 0) -> int:
        config, text_tokens, vision_tokens = self.sizes
        value_bytes = self.packed.inputs_embeds.element_size()
        return schedule.kv_cache_bytes(config, text_tokens + decoded, vision_tokens, value_bytes)


@dataclass(frozen=True)
class Contender:
    """`decode` takes what `prefill` returned, decodes, and rewinds the cache, so that every round meets the same one."""

    name: str
    prefill: Run
    decode: Callable[[Any], None]
    dropper: TokenDropper | None = None

    @property
    def schedule(self) -> DropSchedule:
        return DropSchedule({}) if self.dropper is None else self.dropper.schedule


def make_workload(args: argparse.Namespace) -> Workload:
    """The decoder and prompt asked for; raises ValueError for an unknown model, device, dtype or back end."""
    if args.model not in TEXT_SHAPES:
        raise ValueError(f"unknown model {args.model!r}; choose one of: {', '.join(TEXT_SHAPES)}")
    device, dtype = as_device(args.device), as_dtype(args.dtype)
    config = replace(TEXT_SHAPES[args.model], num_hidden_layers=args.layers)
    with torch.device("meta"):
        decoder = Decoder(config, resolve_backend(args.attention, device, dtype))
    decoder = decoder.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, weight in decoder.named_parameters():  # activations stay near one in size, so wrong work shows in the logits
        weight.normal_(*((1.0, 0.1) if "norm" in name else (0.0, weight.shape[-1] ** -0.5)))
    return Workload(decoder, random_prompt(args.text_tokens, args.vision_tokens, decoder.lm_head.weight), args.decode_steps)


def random_prompt(text_tokens: int, vision_tokens: int, like: Tensor) -> PackedInputs:
    """One prompt of noise in the width, dtype and device of `like`, its vision tokens amid the text."""
    inputs_embeds = torch.randn(text_tokens + vision_tokens, like.shape[-1], dtype=like.dtype, device=like.device)
    rows = torch.arange(len(inputs_embeds), device=like.device)
    vision_mask = (rows >= text_tokens // 2) & (rows < text_tokens // 2 + vision_tokens)
    return PackedInputs(inputs_embeds, rows, vision_mask, [len(rows)], (vision_tokens,))


def mapped_schedule(budget: float, num_vision_tokens: int, num_layers: int) -> DropSchedule:
    """The paper's keep ratios for this budget at the paper's depths; the solver's schedule where the paper has none.

    At another depth than 32 layers the paper's ratios leave another mean than the budget: the table shows it.
    """
    published = PUBLISHED_SCHEDULES.get(f"paper-{budget:g}")
    if published is not None:
        return DropSchedule(dict(zip(layers_at_depths(num_layers), published.values(), strict=False)))
    return DropSchedule.for_mean_tokens(budget, num_vision_tokens, num_layers)


def our_contenders(workload: Workload, methods: Sequence[str], budgets: Sequence[float]) -> list[Contender]:
    """Dense, then every method at every budget; raises ValueError for an unknown method, or a budget that it cannot reach."""
    config, _, vision_tokens = workload.sizes
    droppers: dict[str, TokenDropper | None] = {DENSE: None}
    for budget in budgets:
        for method in filter(None, find_methods(methods)):
            schedule_for = mapped_schedule if method.depths == PAPER_DEPTHS else method.schedule_for
            droppers[f"{method.name}@{budget:g}"] = method(schedule_for(budget, vision_tokens, config.num_hidden_layers))
    run = partial(prefill, workload.decoder, workload.packed, max_new_tokens=workload.decode_steps)
    decode = partial(decode_and_rewind, workload)
    return [Contender(name, partial(run, dropper), decode, dropper) for name, dropper in droppers.items()]


def decode_and_rewind(workload: Workload, prefilled: Prefilled) -> None:
    cache, token_ids = prefilled.cache, prefilled.logits.argmax(-1)
    seqlens, position_ids = list(cache.seqlens), cache.position_ids
    for _ in range(workload.decode_steps):
        decode_one_token(workload.decoder, token_ids, cache)
    cache.seqlens, cache.position_ids = seqlens, position_ids


def transformers_contender(workload: Workload) -> Contender:
    """LlamaForCausalLM around the decoder's own tensors: nothing is copied."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {**asdict(workload.decoder.config), "attn_implementation": "sdpa"}
    config = LlamaConfig(**settings)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    ours = workload.decoder.state_dict()
    model.load_state_dict({name: ours[name.removeprefix("model.")] for name in model.state_dict()}, assign=True)
    # The rotary frequencies are in no state dict, so they are still on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(workload.device)
    inputs_embeds = workload.packed.inputs_embeds[None]

    def run() -> Any:
        output = model.model(inputs_embeds=inputs_embeds, past_key_values=DynamicCache(), use_cache=True)
        # Not its logits_to_keep=1: that slice of (1, T, D) meets a very slow bfloat16 product on CPUs, and would flatter us.
        output.logits = model.lm_head(output.last_hidden_state[:, -1])
        return output

    def decode(output: Any) -> None:
        token_ids = output.logits.argmax(-1, keepdim=True)
        for _ in range(workload.decode_steps):
            model(input_ids=token_ids, past_key_values=output.past_key_values, use_cache=True)
        output.past_key_values.crop(-workload.decode_steps)

    return Contender("transformers", run, decode)


def compare_logits(ours: Tensor, reference: Tensor) -> dict[str, float]:
    """How far two contenders' last logits (V,) are apart; raises RuntimeError where rounding cannot explain it."""
    difference, largest = (ours - reference).abs().max().item(), reference.abs().max().item()
    if not difference <= torch.finfo(ours.dtype).eps ** 0.5 * largest:
        raise RuntimeError(
            f"dense logits and transformers' differ by {difference:.3g} where the largest is {largest:.3g}: unequal work"
        )
    return {"max_difference": difference, "largest_logit": largest}


def gemm_products(decoder: Decoder, tokens_per_layer: Sequence[int]) -> list[tuple[Tensor, int]]:
    """Every matrix of a prefill with the number of rows it meets; the head meets one."""
    pairs = zip(decoder.layers, tokens_per_layer, strict=True)
    linears = [(module, rows) for layer, rows in pairs for module in layer.modules() if isinstance(module, nn.Linear)]
    return [(module.weight, rows) for module, rows in [*linears, (decoder.lm_head, 1)]]


def gemm_run(products: Sequence[tuple[Tensor, int]]) -> Run:
    """The products alone; inputs and outputs of the same shape are one tensor."""
    like, shapes = products[0][0], {(rows, size) for weight, rows in products for size in weight.shape}
    inputs, outputs = ({shape: torch.randn(shape, dtype=like.dtype, device=like.device) for shape in shapes} for _ in range(2))

    def run() -> None:
        for weight, rows in products:
            torch.mm(inputs[rows, weight.shape[1]], weight.t(), out=outputs[rows, weight.shape[0]])

    return run


def drop_points_run(workload: Workload, dropper: TokenDropper) -> Run:
    """The drop points alone, on what arrives at each in a prefill."""
    states = []

    class Recording(type(dropper)):  # type: ignore[misc]
        def __call__(self, state: PrefillState) -> PrefillState:
            states.append(replace(state))
            return super().__call__(state)

    recording = copy(dropper)
    recording.__class__ = Recording
    prefill(workload.decoder, workload.packed, recording)
    return lambda: [dropper(state) for state in states]


def time_rounds(runs: Mapping[str, Run], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run in every round, behind one round that is not counted. Garbage is collected before and after."""
    names, seconds = list(runs), {name: [0.0] * repeats for name in runs}
    gc.collect()
    gc.disable()
    try:
        for round_idx in range(-1, repeats):
            start = round_idx % len(names)
            for name in names[start:] + names[:start]:
                started = timestamp(device)
                result = runs[name]()
                seconds[name][max(round_idx, 0)] = timestamp(device) - started
                del result  # frees a cache: not a part of what is timed
            print(f"round {round_idx + 1} of {repeats}", file=sys.stderr, flush=True)
    finally:
        gc.enable()
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return median(one / other for one, other in zip(numerators, denominators, strict=True))


def peak_of(run: Run, device: torch.device) -> float:
    """MB at the highest point of one run."""
    reset_peak_memory(device)
    run()
    return peak_memory_mb(device)


def prefill_rows(workload: Workload, contenders: Sequence[Contender], repeats: int) -> list[dict[str, Any]]:
    """Time the contenders, the matrix products of each schedule and the drop points of each method."""
    peaks = {contender.name: peak_of(contender.prefill, workload.device) for contender in contenders}
    runs: dict[str, Run] = {contender.name: contender.prefill for contender in contenders}
    for each in contenders:
        products = gemm_products(workload.decoder, workload.tokens_per_layer(each.schedule))
        runs.setdefault(f"products {each.schedule}", gemm_run(products))
        runs[f"drop points {each.name}"] = drop_points_run(workload, each.dropper) if each.dropper else list
    seconds = time_rounds(runs, repeats, workload.device)
    return [{**prefill_row(workload, each, seconds), "peak_memory_mb": peaks[each.name]} for each in contenders]


def prefill_row(workload: Workload, contender: Contender, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    names = contender.name, DENSE, f"drop points {contender.name}", f"products {contender.schedule}"
    own, dense, drop_points, products = (seconds[name] for name in names)
    flops, dense_flops = (each.prefill_flops(*workload.sizes) for each in (contender.schedule, DropSchedule({})))
    config, _, vision_tokens = workload.sizes
    return {
        "prefill": contender.name,
        "schedule": {str(layer): ratio for layer, ratio in contender.schedule.items()},
        "mean_vision_tokens": contender.schedule.mean_tokens(vision_tokens, config.num_hidden_layers),
        "prefill_ms": 1e3 * median(own),
        "gemm_ms": 1e3 * median(products),
        "gemm_percent": 100 * median_ratio(products, own),
        "tflop_per_s": flops / median(own) / 1e12,
        "speedup": median_ratio(dense, own),
        "flops_ratio": dense_flops / flops,
        "achieved_percent": 100 * median_ratio(dense, own) * flops / dense_flops,
        "drop_points_ms": 1e3 * median(drop_points),
        "drop_points_percent": 100 * median_ratio(drop_points, own),
        "kv_cache_mb": workload.cache_bytes(contender.schedule) / 1e6,
        "rounds_ms": [1e3 * value for value in own],
    }


def decode_rows(workload: Workload, contenders: Sequence[Contender], repeats: int) -> list[dict[str, Any]]:
    """Time the contenders' decoding, each from the cache of its own prefill, and one reading of the weights."""
    runs: dict[str, Run] = {contender.name: partial(contender.decode, contender.prefill()) for contender in contenders}
    weights = [weight.view(torch.float32) for weight in workload.decode_weights]
    runs["read"] = lambda: [weight.sum() for weight in weights]
    seconds = time_rounds(runs, repeats, workload.device)
    return [decode_row(workload, contender, seconds) for contender in contenders]


def decode_row(workload: Workload, contender: Contender, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    own = [value / workload.decode_steps for value in seconds[contender.name]]
    weight_bytes = sum(weight.nbytes for weight in workload.decode_weights)
    # The cache grows by one token a step: the mean over the steps is that of the first and the last.
    touched = weight_bytes + fmean(workload.cache_bytes(contender.schedule, step) for step in (1, workload.decode_steps))
    return {
        "decode": contender.name,
        "decode_ms_per_token": 1e3 * median(own),
        "touched_mb": touched / 1e6,
        "gb_per_s": touched / median(own) / 1e9,
        "read_gb_per_s": weight_bytes / median(seconds["read"]) / 1e9,
        "bandwidth_percent": 100 * median_ratio(seconds["read"], own) * touched / weight_bytes,
        "speedup": median_ratio(seconds[DENSE], seconds[contender.name]),
        "rounds_ms": [1e3 * value for value in own],
    }


@torch.inference_mode()
def run_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Check, then measure; raises ValueError for options that cannot be, RuntimeError where the logits differ."""
    if min(args.layers, args.repeats, args.decode_steps, args.text_tokens, args.vision_tokens) < 1:
        raise ValueError("layers, repeats, decode steps and numbers of tokens must be at least 1")
    workload = make_workload(args)
    budgets = [float(budget) for budget in args.tokens.split(",")]
    contenders, check = our_contenders(workload, args.methods.split(","), budgets), None
    if args.transformers and importlib.util.find_spec("transformers"):
        contenders.append(transformers_contender(workload))
        check = compare_logits(contenders[0].prefill().logits[0], contenders[-1].prefill().logits[0])
    # Caches of one schedule are alike, so one method of each decodes.
    alike = {str(each.schedule) if each.dropper else each.name: each for each in reversed(contenders)}
    decoding = [contender for contender in contenders if contender in alike.values()]
    return {
        **vars(args),
        "attention": workload.decoder.attention,
        "logits_check": check,
        "prefill": prefill_rows(workload, contenders, args.repeats),
        "decode": decode_rows(workload, decoding, args.repeats),
        "machine": describe_machine(workload.device),
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return {
        "cpu": names[0] if names else platform.processor(),
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
    for row in rows:
        table.add_row(*(f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in names))
    return table


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m nanovlm_v2drop.benchmark", description=__doc__, formatter_class=raw)
    sizes = {"layers": 4, "text-tokens": 64, "vision-tokens": 576, "repeats": 7, "decode-steps": 16}
    names = {"model": "llava-1.5-7b", "methods": "v2drop,random", "tokens": "192,128,64"}
    places = {"dtype": "bfloat16", "device": "cpu", "attention": "auto"}
    for name, default in {**names, **places, **sizes, "threads": torch.get_num_threads()}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    parser.add_argument("--no-transformers", dest="transformers", action="store_false")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        torch.set_num_threads(args.threads)
        report = run_benchmark(args)
    except ValueError as error:
        parser.error(str(error))
    report["command"] = " ".join([parser.prog, *map(shlex.quote, sys.argv[1:] if argv is None else argv)])
    if not args.json:
        Console(width=None if sys.stdout.isatty() else 160).print(make_table(report["prefill"]), make_table(report["decode"]))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
