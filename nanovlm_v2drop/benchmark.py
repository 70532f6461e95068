"""How fast prefill and decode are: beside transformers, beside what the machine can do, and beside the FLOPs formula.

    python -m nanovlm_v2drop.benchmark                                    # 4 layers of LLaVA-1.5-7B, bfloat16, CPU
    python -m nanovlm_v2drop.benchmark --layers 32 --device cuda --repeats 21
    python -m nanovlm_v2drop.benchmark --model llava-1.5-13b --layers 2 --tokens 192 --json > speed.json

Random weights at the official layer shapes; nothing is downloaded. Before anything is timed, the dense logits must equal
those of transformers' LlamaForCausalLM on the very same tensors. A machine's speed drifts, so each round times everything
once, in an order that rotates; times are medians over the rounds, speed-ups and shares medians of the ratios in a round.

Prefill: `gemm_percent` is the time of the same matrix products alone (each layer's own weights and tokens, outputs allocated
beforehand) as a share of the prefill. `flops_ratio` is the speed-up over dense that DropSchedule.prefill_flops promises,
`achieved_percent` the share of it that the clock confirms. Drop points (score, select, gather) are timed alone, on tensors
of the same shape.
Decode: the bytes that a token touches (weights once, cache once) over its time; `bandwidth_percent` compares with a pass
that reads the same weights once (a float32 sum, counting the bytes read).
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .attention import BACKENDS, resolve_backend
from .config import TextConfig
from .decoder import Decoder
from .dropping import PUBLISHED_SCHEDULES, DropSchedule, Random, TokenDropper, V2Drop
from .dropping.schedule import layers_at_depths
from .evaluate import DENSE, LLAVA_7B_BUDGETS, peak_memory_mb, timestamp
from .inference import Prefilled, decode_one_token, initial_state, prefill
from .vlm import PackedInputs
from .zoo import DTYPES, as_device, as_dtype

Run = Callable[[], object]
Seconds = Mapping[str, Sequence[float]]  # name of a run -> one time a round

LLAVA = TextConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
TEXT_SHAPES = {  # text_config of llava-hf/llava-1.5-7b-hf and llava-1.5-13b-hf
    "llava-1.5-7b": LLAVA,
    "llava-1.5-13b": replace(
        LLAVA, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
    ),
}
METHODS: tuple[type[TokenDropper], ...] = (V2Drop, Random)


@dataclass(frozen=True)
class Workload:
    """One prompt through one decoder, with `decode_steps` tokens behind it."""

    decoder: Decoder
    packed: PackedInputs
    decode_steps: int

    @property
    def sizes(self) -> tuple[TextConfig, int, int]:
        """Config, text tokens and vision tokens, as DropSchedule counts costs from them."""
        vision_tokens = sum(self.packed.vision_counts)
        return self.decoder.config, sum(self.packed.seqlens) - vision_tokens, vision_tokens

    def vision_tokens_per_layer(self, schedule: DropSchedule) -> list[int]:
        config, _, vision_tokens = self.sizes
        return schedule.vision_tokens_per_layer(vision_tokens, config.num_hidden_layers)


@dataclass(frozen=True)
class Contender:
    """`decode` takes what `prefill` returned, decodes, and rewinds the cache, so that every round meets the same one."""

    name: str
    schedule: DropSchedule
    prefill: Callable[[], Any]
    decode: Callable[[Any], None]
    dropper: TokenDropper | None = None


def make_workload(args: argparse.Namespace) -> Workload:
    """The decoder and prompt asked for; raises ValueError for an unknown model, device, dtype or back end."""
    if args.model not in TEXT_SHAPES:
        raise ValueError(f"unknown model {args.model!r}; choose one of: {', '.join(TEXT_SHAPES)}")
    device, dtype = as_device(args.device), as_dtype(args.dtype)
    config = replace(TEXT_SHAPES[args.model], num_hidden_layers=args.layers)
    decoder = random_decoder(config, device, dtype, resolve_backend(args.attention, device, dtype))
    packed = random_prompt(args.text_tokens, args.vision_tokens, decoder.embed_tokens.weight)
    return Workload(decoder, packed, args.decode_steps)


def random_decoder(config: TextConfig, device: torch.device, dtype: torch.dtype, attention: str) -> Decoder:
    """Weights that keep activations near one in size, so that wrong work shows in the logits."""
    with torch.device("meta"):
        decoder = Decoder(config, attention)
    decoder = decoder.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, weight in decoder.named_parameters():
        weight.normal_(*((1.0, 0.1) if "norm" in name else (0.0, weight.shape[-1] ** -0.5)))
    return decoder


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
    if budget in LLAVA_7B_BUDGETS:
        ratios = PUBLISHED_SCHEDULES[LLAVA_7B_BUDGETS[int(budget)]].values()
        return DropSchedule(dict(zip(layers_at_depths(num_layers), ratios, strict=False)))
    return DropSchedule.for_mean_tokens(budget, num_vision_tokens, num_layers)


def our_contenders(workload: Workload, budgets: Sequence[float]) -> list[Contender]:
    """Dense, then every method at every budget."""
    config, _, vision_tokens = workload.sizes
    droppers: dict[str, TokenDropper | None] = {DENSE: None}
    for budget in budgets:
        schedule = mapped_schedule(budget, vision_tokens, config.num_hidden_layers)
        droppers.update({f"{method.name}@{budget:g}": method(schedule) for method in METHODS})
    return [
        Contender(
            name,
            DropSchedule({}) if dropper is None else dropper.schedule,
            partial(prefill, workload.decoder, workload.packed, dropper, max_new_tokens=workload.decode_steps),
            partial(decode_and_rewind, workload),
            dropper,
        )
        for name, dropper in droppers.items()
    ]


def decode_and_rewind(workload: Workload, prefilled: Prefilled) -> None:
    cache, token_ids = prefilled.cache, prefilled.logits.argmax(-1)
    seqlens, position_ids = list(cache.seqlens), cache.position_ids
    for _ in range(workload.decode_steps):
        decode_one_token(workload.decoder, token_ids, cache)
    cache.seqlens, cache.position_ids = seqlens, position_ids


def transformers_contender(workload: Workload) -> Contender:
    """LlamaForCausalLM around the decoder's own tensors: nothing is copied."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    sizes = {name: value for name, value in asdict(workload.decoder.config).items() if name != "mrope_section"}
    config = LlamaConfig(**sizes, attn_implementation="sdpa")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    ours = workload.decoder.state_dict()
    model.load_state_dict({name: ours[name.removeprefix("model.")] for name in model.state_dict()}, assign=True)
    inputs_embeds = workload.packed.inputs_embeds[None]
    # The rotary frequencies are in no state dict, so they are still on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device=inputs_embeds.device)

    def run() -> Any:
        return model(inputs_embeds=inputs_embeds, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)

    def decode(output: Any) -> None:
        token_ids = output.logits[:, -1].argmax(-1, keepdim=True)
        for _ in range(workload.decode_steps):
            model(input_ids=token_ids, past_key_values=output.past_key_values, use_cache=True)
        output.past_key_values.crop(-workload.decode_steps)

    return Contender("transformers", DropSchedule({}), run, decode)


def compare_logits(ours: Tensor, reference: Tensor) -> dict[str, float]:
    """How far two contenders' last logits (V,) are apart; raises RuntimeError where rounding cannot explain it."""
    difference, largest = (ours - reference).abs().max().item(), reference.abs().max().item()
    if not difference <= torch.finfo(ours.dtype).eps ** 0.5 * largest:
        raise RuntimeError(
            f"dense logits and transformers' differ by {difference:.3g} where the largest is {largest:.3g}: "
            "the two do not do the same work, so nothing was timed"
        )
    return {"max_difference": difference, "largest_logit": largest}


def gemm_products(decoder: Decoder, tokens_per_layer: Sequence[int]) -> list[tuple[Tensor, int]]:
    """Every matrix of a prefill with the number of rows it meets; the head meets one."""
    products = [
        (module.weight, tokens)
        for layer, tokens in zip(decoder.layers, tokens_per_layer, strict=True)
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    ]
    return [*products, (decoder.lm_head.weight, 1)]


def gemm_run(products: Sequence[tuple[Tensor, int]]) -> Run:
    """The products alone; inputs and outputs of the same shape are one tensor."""
    like = products[0][0]
    shapes = {(rows, size) for weight, rows in products for size in weight.shape}
    inputs, outputs = ({shape: torch.randn(shape, dtype=like.dtype, device=like.device) for shape in shapes} for _ in range(2))

    def run() -> None:
        for weight, rows in products:
            torch.mm(inputs[rows, weight.shape[1]], weight.t(), out=outputs[rows, weight.shape[0]])

    return run


def drop_points_run(workload: Workload, dropper: TokenDropper) -> Run:
    """The drop points alone, on noise of the shape that arrives at each."""
    counts = workload.vision_tokens_per_layer(dropper.schedule)
    states = []
    for layer_idx in dropper.schedule:
        packed = random_prompt(workload.sizes[1], counts[layer_idx - 1], workload.packed.inputs_embeds)
        states.append(replace(initial_state(packed), layer_idx=layer_idx, previous=torch.randn_like(packed.inputs_embeds)))
    return lambda: [dropper(state) for state in states]


def decode_weights(decoder: Decoder) -> list[Tensor]:
    """What a decoded token reads: everything but the embedding table, of which it reads one row."""
    return [weight.data for module in (decoder.layers, decoder.norm, decoder.lm_head) for weight in module.parameters()]


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def time_rounds(runs: Mapping[str, Run], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run in every round, behind one round that is not counted. Garbage is collected before and after."""
    names, seconds = list(runs), {name: [0.0] * repeats for name in runs}
    gc.collect()
    gc.disable()
    try:
        for round_idx in (0, *range(repeats)):
            start = round_idx % len(names)
            for name in names[start:] + names[:start]:
                started = timestamp(device)
                result = runs[name]()
                seconds[name][round_idx] = timestamp(device) - started
                del result
            print(f"round {round_idx + 1} of {repeats}", file=sys.stderr, flush=True)
    finally:
        gc.enable()
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios within a round."""
    return median(one / other for one, other in zip(numerators, denominators, strict=True))


def measure_memory(contender: Contender, device: torch.device) -> dict[str, float]:
    """Cache and peak of one prefill, weights included. On a CPU the peak is the whole process's, reset where Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    prefilled = contender.prefill()
    if isinstance(prefilled, Prefilled):
        cache_bytes = prefilled.cache.nbytes
    else:
        cache_bytes = nbytes(part for layer in prefilled.past_key_values.layers for part in (layer.keys, layer.values))
    return {"kv_cache_mb": cache_bytes / 1e6, "peak_memory_mb": peak_memory_mb(device)}


def time_prefill(workload: Workload, contenders: Sequence[Contender], repeats: int) -> dict[str, list[float]]:
    """The contenders, the matrix products of each schedule, the drop points of each method."""
    runs: dict[str, Run] = {contender.name: contender.prefill for contender in contenders}
    for contender in contenders:
        tokens = [workload.sizes[1] + count for count in workload.vision_tokens_per_layer(contender.schedule)]
        runs.setdefault(f"products {contender.schedule}", gemm_run(gemm_products(workload.decoder, tokens)))
        if contender.dropper is not None:
            runs[f"drop points {contender.name}"] = drop_points_run(workload, contender.dropper)
    return time_rounds(runs, repeats, workload.packed.inputs_embeds.device)


def prefill_row(workload: Workload, contender: Contender, seconds: Seconds) -> dict[str, Any]:
    own, products = seconds[contender.name], seconds[f"products {contender.schedule}"]
    drop_points = seconds.get(f"drop points {contender.name}")
    flops = contender.schedule.prefill_flops(*workload.sizes)
    speedup, flops_ratio = median_ratio(seconds[DENSE], own), DropSchedule({}).prefill_flops(*workload.sizes) / flops
    return {
        "contender": contender.name,
        "schedule": {str(layer): ratio for layer, ratio in contender.schedule.items()},
        "mean_vision_tokens": mean(workload.vision_tokens_per_layer(contender.schedule)),
        "prefill_ms": 1e3 * median(own),
        "prefill_tflops": flops / 1e12,
        "tflop_per_s": flops / median(own) / 1e12,
        "gemm_ms": 1e3 * median(products),
        "gemm_percent": 100 * median_ratio(products, own),
        "speedup": speedup,
        "flops_ratio": flops_ratio,
        "achieved_percent": 100 * speedup / flops_ratio,
        "drop_points_ms": None if drop_points is None else 1e3 * median(drop_points),
        "drop_points_percent": None if drop_points is None else 100 * median_ratio(drop_points, own),
        "rounds_ms": [1e3 * value for value in own],
    }


def time_decode(workload: Workload, contenders: Sequence[Contender], repeats: int) -> dict[str, list[float]]:
    runs: dict[str, Run] = {each.name: partial(each.decode, each.prefill()) for each in contenders}
    weights = [weight.view(torch.float32) for weight in decode_weights(workload.decoder)]
    runs["read"] = lambda: [weight.sum() for weight in weights]
    return time_rounds(runs, repeats, workload.packed.inputs_embeds.device)


def decode_bytes(workload: Workload, schedule: DropSchedule) -> float:
    """Bytes that one token touches, its own keys and values included, on average over the steps."""
    config, text_tokens, vision_tokens = workload.sizes
    value_bytes = workload.packed.inputs_embeds.element_size()
    grown = [text_tokens + 1, text_tokens + workload.decode_steps]
    cached = [schedule.kv_cache_bytes(config, tokens, vision_tokens, value_bytes) for tokens in grown]
    return nbytes(decode_weights(workload.decoder)) + mean(cached)


def decode_row(workload: Workload, contender: Contender, seconds: Seconds) -> dict[str, Any]:
    touched = decode_bytes(workload, contender.schedule)
    per_token = [value / workload.decode_steps for value in seconds[contender.name]]
    reading = [value * touched / nbytes(decode_weights(workload.decoder)) for value in seconds["read"]]
    return {
        "contender": contender.name,
        "decode_ms_per_token": 1e3 * median(per_token),
        "touched_mb": touched / 1e6,
        "gb_per_s": touched / median(per_token) / 1e9,
        "bandwidth_percent": 100 * median_ratio(reading, per_token),
        "speedup": median_ratio(seconds[DENSE], seconds[contender.name]),
        "bytes_ratio": decode_bytes(workload, DropSchedule({})) / touched,
        "rounds_ms": [1e3 * value for value in per_token],
    }


@torch.inference_mode()
def run_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Check, then measure everything; raises ValueError for what was asked wrongly, RuntimeError where logits differ."""
    workload = make_workload(args)
    contenders, check = our_contenders(workload, args.tokens), None
    if args.transformers and importlib.util.find_spec("transformers"):
        contenders.append(transformers_contender(workload))
        check = compare_logits(contenders[0].prefill().logits[0], contenders[-1].prefill().logits[0, -1])
    memory = [measure_memory(contender, torch.device(args.device)) for contender in contenders]
    prefill_seconds = time_prefill(workload, contenders, args.repeats)
    # Random leaves a cache of the same size as V2Drop's.
    decoding = [contender for contender in contenders if not isinstance(contender.dropper, Random)]
    decode_seconds = time_decode(workload, decoding, args.repeats)
    report = {
        **vars(args),
        "attention": workload.decoder.attention,
        "check": check,
        "read_gb_per_s": nbytes(decode_weights(workload.decoder)) / median(decode_seconds["read"]) / 1e9,
        "prefill": [{**prefill_row(workload, c, prefill_seconds), **mb} for c, mb in zip(contenders, memory, strict=True)],
        "decode": [decode_row(workload, contender, decode_seconds) for contender in decoding],
        "machine": describe_machine(args.device),
    }
    return json.loads(json.dumps(report), parse_float=lambda digits: float(f"{float(digits):.6g}"))


def describe_machine(device: str) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    installed = importlib.util.find_spec("transformers") is not None
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers") if installed else None,
    }


def make_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The numbers of the rows under the names that they have in the JSON."""
    names = [name for name, value in rows[0].items() if not isinstance(value, (list, dict))]
    table = Table(*(name.replace("_", " ") for name in names))
    for row in rows:
        table.add_row(*(f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name] or "") for name in names))
    return table


def positive(digits: str) -> int:
    if int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{digits} must be at least 1")
    return int(digits)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nanovlm_v2drop.benchmark", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llava-1.5-7b", help=f"layer shapes of one of: {', '.join(TEXT_SHAPES)}")
    for name, default in (("layers", 4), ("text-tokens", 64), ("vision-tokens", 576), ("repeats", 7), ("decode-steps", 16)):
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help="default: %(default)s")
    parser.add_argument("--tokens", default="192,128,64", help="budgets: 192, 128, 64 are the paper's schedules")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="auto", choices=("auto", *BACKENDS))
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--no-transformers", dest="transformers", action="store_false")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        args.tokens = [float(budget) for budget in args.tokens.split(",")]
        report = run_benchmark(args)
    except ValueError as error:
        parser.error(str(error))
    report["command"] = shlex.join([parser.prog, *(sys.argv[1:] if argv is None else argv)])
    if not args.json:
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(make_table(report["prefill"]), make_table(report["decode"]))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
