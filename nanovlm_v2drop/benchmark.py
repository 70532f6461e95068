"""How fast prefill and decode are: beside transformers, beside what the machine can do, and beside the FLOPs formula.

    python -m nanovlm_v2drop.benchmark                                    # 4 layers of LLaVA-1.5-7B, bfloat16, CPU
    python -m nanovlm_v2drop.benchmark --layers 32 --device cuda --repeats 21
    python -m nanovlm_v2drop.benchmark --model llava-1.5-13b --layers 2 --tokens 192 --json > speed.json
    python -m nanovlm_v2drop.benchmark --model llava-onevision-qwen2-7b-ov --frames 32 --retain 0.25,0.2,0.15

Random weights at the official layer shapes, no download. Before anything is timed, dense logits must equal those of
transformers' LlamaForCausalLM or Qwen2ForCausalLM on the very same tensors; both count positions 0, 1, 2, ..., so for Qwen2-VL
our side of this check does so too, which changes no cost. A machine's speed drifts, so each round times everything once, in
an order that rotates; times are medians over the rounds, speed-ups and shares medians of the ratios within a round.

Budgets are means over all layers of the model. Where --layers runs fewer, drop points stand at the same depths and keep the
same shares, which leaves another mean: it is said above the table.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil, isqrt, prod
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
from .dropping.schedule import PAPER_DEPTHS, PAPER_VISION_TOKENS, layers_at_depths
from .evaluate import peak_memory_mb, reset_peak_memory, timestamp
from .inference import Prefilled, decode_one_token, prefill
from .plans import DENSE, find_methods
from .vision_qwen2 import multimodal_positions
from .vlm import PackedInputs
from .zoo import as_device, as_dtype

Run = Callable[[], Any]
Grids = tuple[tuple[int, int, int], ...]  # frames, rows and columns of vision tokens

VICUNA_7B = TextConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
VICUNA_13B = replace(
    VICUNA_7B, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
)
QWEN2 = partial(TextConfig, vocab_size=152064, max_position_embeddings=32768, rope_theta=1e6, qkv_bias=True)
QWEN2_7B = partial(
    QWEN2,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)
QWEN2_72B = partial(
    QWEN2,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
MROPE_SECTION = (16, 24, 24)
# The decoders in the config.json of llava-hf/llava-1.5-*-hf, llava-hf/llava-v1.6-vicuna-*-hf, Qwen/Qwen2-VL-*-Instruct and
# lmms-lab/llava-onevision-qwen2-*-ov, of which llava-hf's conversions only pad the vocabulary.
SHAPES = {
    "llava-1.5-7b": VICUNA_7B,
    "llava-1.5-13b": VICUNA_13B,
    "llava-v1.6-vicuna-7b": VICUNA_7B,
    "llava-v1.6-vicuna-13b": VICUNA_13B,
    "llava-onevision-qwen2-0.5b-ov": QWEN2(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "llava-onevision-qwen2-7b-ov": QWEN2_7B(),
    "llava-onevision-qwen2-72b-ov": QWEN2_72B(),
    "qwen2-vl-2b": QWEN2(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        mrope_section=MROPE_SECTION,
    ),
    "qwen2-vl-7b": QWEN2_7B(mrope_section=MROPE_SECTION),
    "qwen2-vl-72b": QWEN2_72B(mrope_section=MROPE_SECTION),
}
# Vision tokens of a video, by the beginning of a model's name: pooled frames and a newline; merged patches of pairs of frames
# of 360 x 640 pixels.
VIDEO_GRIDS: dict[str, Callable[[int], Grids]] = {
    "llava-onevision": lambda frames: ((frames, 14, 14), (1, 1, 1)),
    "qwen2-vl": lambda frames: ((ceil(frames / 2), 13, 23),),
}
PICTURE_TOKENS, VIDEO_SHARES = "192,128,64", "0.25,0.2,0.15"  # budgets where none are given
JSON_ONLY = ("gemm_ms", "drop_points_ms", "peak_memory_mb", "touched_mb", "read_gb_per_s")


@dataclass(frozen=True)
class Workload:
    """One prompt through one decoder, with `decode_steps` tokens behind it. The whole model has `model_layers` layers."""

    decoder: Decoder
    packed: PackedInputs
    decode_steps: int
    model_layers: int

    @property
    def device(self) -> torch.device:
        return self.packed.inputs_embeds.device

    @property
    def sizes(self) -> tuple[TextConfig, int, int]:
        """Config, text tokens and vision tokens, as DropSchedule counts costs from them."""
        vision_tokens = sum(self.packed.vision_counts)
        return self.decoder.config, sum(self.packed.seqlens) - vision_tokens, vision_tokens

    @property
    def frames(self) -> int:
        return max(frames for grids in self.packed.vision_grids for frames, _, _ in grids)

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
    """`decode` takes what `prefill` returned, decodes, and rewinds the cache, so that every round meets the same one.

    `model_schedule` is that of the whole model, of which the dropper has as much as the layers that run.
    """

    name: str
    prefill: Run
    decode: Callable[[Any], None]
    dropper: TokenDropper | None = None
    model_schedule: DropSchedule | None = None

    @property
    def schedule(self) -> DropSchedule:
        return DropSchedule({}) if self.dropper is None else self.dropper.schedule


def make_workload(args: argparse.Namespace) -> Workload:
    """The decoder and prompt asked for; raises ValueError for an unknown model, device, dtype, back end or number of layers."""
    if args.model not in SHAPES:
        raise ValueError(f"unknown model {args.model!r}; choose one of: {', '.join(SHAPES)}")
    shape = SHAPES[args.model]
    if args.layers > shape.num_hidden_layers:
        raise ValueError(f"{args.model} has {shape.num_hidden_layers} layers, not {args.layers}; lower --layers")
    config, grids = replace(shape, num_hidden_layers=args.layers), prompt_grids(args)
    decoder = random_decoder(config, as_device(args.device), as_dtype(args.dtype), args.attention)
    packed = random_prompt(args.text_tokens, grids, decoder)
    return Workload(decoder, packed, args.decode_steps, shape.num_hidden_layers)


def prompt_grids(args: argparse.Namespace) -> Grids:
    """Of the video, or of one picture, as square as its tokens can be; raises ValueError where the model takes no video."""
    if args.frames is None:
        rows = next(rows for rows in range(isqrt(args.vision_tokens), 0, -1) if args.vision_tokens % rows == 0)
        return ((1, rows, args.vision_tokens // rows),)
    for family, video_grids in VIDEO_GRIDS.items():
        if args.model.startswith(family):
            return video_grids(args.frames)
    raise ValueError(f"{args.model} takes pictures only, not {args.frames} frames of a video; give --vision-tokens instead")


def random_decoder(config: TextConfig, device: torch.device, dtype: torch.dtype, attention: str) -> Decoder:
    """Weights and biases of noise under which wrong work shows in the logits: activations stay near one in size."""
    with torch.device("meta"):
        decoder = Decoder(config, resolve_backend(attention, device, dtype))
    decoder = decoder.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    if config.tie_word_embeddings:  # memory of its own for every tensor: the two have come apart
        decoder.lm_head.weight = decoder.embed_tokens.weight
    for name, weight in decoder.named_parameters():
        is_matrix = weight.dim() == 2
        weight.normal_(*((1.0, 0.1) if "norm" in name else (0.0, weight.shape[-1] ** -0.5 if is_matrix else 1.0)))
    return decoder


def random_prompt(text_tokens: int, grids: Grids, decoder: Decoder) -> PackedInputs:
    """One prompt of noise for the decoder, the vision tokens of `grids` amid the text, with positions as its model has them."""
    like, vision_tokens = decoder.lm_head.weight, sum(map(prod, grids))
    inputs_embeds = torch.randn(text_tokens + vision_tokens, like.shape[-1], dtype=like.dtype, device=like.device)
    rows = torch.arange(len(inputs_embeds), device=like.device)
    vision_mask = (rows >= text_tokens // 2) & (rows < text_tokens // 2 + vision_tokens)
    has_places = decoder.config.mrope_section is not None
    position_ids = multimodal_positions(vision_mask.tolist(), grids, {True}).to(like.device) if has_places else rows
    return PackedInputs(inputs_embeds, position_ids, vision_mask, [len(rows)], (vision_tokens,), vision_grids=(grids,))


def budgets_of(args: argparse.Namespace, vision_tokens: int) -> dict[str, float]:
    """Mean vision tokens a layer by the name that each budget has in the rows; raises ValueError for what is no number."""
    tokens, shares = args.tokens, args.retain
    if tokens is None and shares is None:
        tokens, shares = (PICTURE_TOKENS, None) if args.frames is None else (None, VIDEO_SHARES)
    if tokens is not None:
        return {f"{budget:g}": budget for budget in map(float, tokens.split(","))}
    return {f"{100 * share:.4g}%": share * vision_tokens for share in map(float, shares.split(","))}


def model_schedule(method: type[TokenDropper], budget: float, workload: Workload) -> DropSchedule:
    """For the whole model: the paper's keep ratios at its depths where it has this budget, else the solver's schedule.

    Raises ValueError where the method cannot reach the budget.
    """
    _, _, vision_tokens = workload.sizes
    published = PUBLISHED_SCHEDULES.get(f"paper-{budget:g}") if vision_tokens == PAPER_VISION_TOKENS else None
    if published is not None and method.depths == PAPER_DEPTHS:
        return published.mapped(workload.model_layers, vision_tokens)
    return method.schedule_for(budget, vision_tokens, workload.model_layers, workload.frames)


def at_same_depths(schedule: DropSchedule, model_layers: int, layers: int) -> DropSchedule:
    """The schedule of a model in `layers` of its `model_layers`; drop points that meet in one layer act at once."""
    shares: dict[int, float] = {}
    for layer, share in schedule.items():
        (place,) = layers_at_depths(layers, [layer / model_layers])
        shares[place] = shares.get(place, 1.0) * share
    return schedule.with_values(shares, 1.0) if layers < model_layers else schedule


def our_contenders(workload: Workload, methods: Sequence[str], budgets: Mapping[str, float]) -> list[Contender]:
    """Dense, then every method at every budget; raises ValueError for an unknown method, or a budget that it cannot reach."""
    depths = workload.model_layers, workload.decoder.config.num_hidden_layers
    run = partial(prefill, workload.decoder, workload.packed, max_new_tokens=workload.decode_steps)
    decode = partial(decode_and_rewind, workload)
    contenders = [Contender(DENSE, run, decode)]
    for label, budget in budgets.items():
        for method in filter(None, find_methods(methods)):
            whole = model_schedule(method, budget, workload)
            dropper = method(at_same_depths(whole, *depths))
            contenders.append(Contender(f"{method.name}@{label}", partial(run, dropper), decode, dropper, whole))
    return contenders


def decode_and_rewind(workload: Workload, prefilled: Prefilled) -> None:
    cache, token_ids = prefilled.cache, prefilled.logits.argmax(-1)
    for _ in range(workload.decode_steps):
        decode_one_token(workload.decoder, token_ids, cache)
    cache.crop(workload.decode_steps)


def transformers_contender(workload: Workload) -> Contender:
    """LlamaForCausalLM or Qwen2ForCausalLM around the decoder's own tensors: nothing is copied."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    settings: dict[str, Any] = {**asdict(workload.decoder.config), "attn_implementation": "sdpa"}
    is_qwen2 = workload.decoder.config.qkv_bias
    config: Any = (Qwen2Config if is_qwen2 else LlamaConfig)(**settings)
    with torch.device("meta"):
        model = (Qwen2ForCausalLM if is_qwen2 else LlamaForCausalLM)(config).eval()
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


def check_logits(workload: Workload, reference: Contender) -> dict[str, float]:
    """Compare dense logits with the reference's, which counts positions 0, 1, 2, ...; raises as `compare_logits`."""
    rows = torch.arange(len(workload.packed.inputs_embeds), device=workload.device)
    ours = prefill(workload.decoder, replace(workload.packed, position_ids=rows)).logits[0]
    return compare_logits(ours, reference.prefill().logits[0])


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
    sizes = args.layers, args.repeats, args.decode_steps, args.text_tokens, args.vision_tokens, args.frames
    if min(size for size in sizes if size is not None) < 1:
        raise ValueError("layers, repeats, decode steps, frames and numbers of tokens must be at least 1")
    workload = make_workload(args)
    _, _, vision_tokens = workload.sizes
    contenders = our_contenders(workload, args.methods.split(","), budgets_of(args, vision_tokens))
    notes, check = list(depth_notes(workload, contenders)), None
    if args.transformers and importlib.util.find_spec("transformers"):
        contenders.append(transformers_contender(workload))
        check = check_logits(workload, contenders[-1])
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


def decoding_contenders(contenders: Sequence[Contender]) -> list[Contender]:
    """Of methods whose caches are alike, one; every method that hides a part of its cache; and what is no method."""

    def kind(contender: Contender) -> str:
        dropper = contender.dropper
        hides = dropper is not None and type(dropper).decode_pruning is not TokenDropper.decode_pruning
        return contender.name if dropper is None or hides else str(contender.schedule)

    firsts = {kind(contender): contender.name for contender in reversed(contenders)}
    return [contender for contender in contenders if contender.name in firsts.values()]


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
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(*report["notes"], make_table(report["prefill"]), make_table(report["decode"]), sep="\n", highlight=False)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
