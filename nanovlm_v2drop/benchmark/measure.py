"""The stopwatch: everything runs once per round, in an order that rotates, together with the limits of this machine."""

import gc
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from ..dropping import DropSchedule, PrefillState, TokenDropper
from ..evaluation.machine import peak_memory_mb, reset_peak_memory, timestamp
from ..evaluation.plans import DENSE
from ..inference import prefill
from ..models.decoder import Decoder
from ..models.linear import QuantisedLinear
from .contenders import Contender, Run
from .workload import Linear, Workload

READ_BYTES = 2**30  # the bandwidth is measured with this many bytes, which no cache can hold


def gemm_products(decoder: Decoder, tokens_per_layer: Sequence[int]) -> list[tuple[Linear, int]]:
    """Every linear layer of a prefill with its number of rows. The head has one row."""
    pairs = zip(decoder.layers, tokens_per_layer, strict=True)
    linears = [(module, rows) for layer, rows in pairs for module in layer.modules() if isinstance(module, Linear)]
    return [*linears, (decoder.lm_head, 1)]


def gemm_run(products: Sequence[tuple[Linear, int]], like: Tensor) -> Run:
    """The products alone, in the dtype and on the device of `like`. Inputs of the same shape share one tensor.

    The inputs of quantised layers are quantised before.
    """
    inputs: dict[tuple[int, int, type], Any] = {}
    calls: list[Run] = []
    for module, rows in products:
        if (key := (rows, module.in_features, type(module))) not in inputs:
            values = torch.randn(rows, module.in_features, dtype=like.dtype, device=like.device)
            inputs[key] = module.read(values) if isinstance(module, QuantisedLinear) else values
        calls.append(partial(module.product if isinstance(module, QuantisedLinear) else module, inputs[key]))

    def run() -> None:
        for call in calls:
            call()

    return run


def plain_gemm_run(tensors: Mapping[str, Tensor], inputs_embeds: Tensor) -> Run:
    """The products of a dense prefill (T, D) with plain weights into allocated outputs: the upper limit of transformers."""
    weights = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2 and "embed" not in name}
    sizes = {size for weight in weights.values() for size in weight.shape}
    inputs, outputs = ({size: torch.randn(len(inputs_embeds), size).to(inputs_embeds) for size in sizes} for _ in range(2))

    def run() -> None:
        for name, weight in weights.items():
            rows = slice(1 if name.startswith("lm_head") else None)
            torch.mm(inputs[weight.shape[1]][rows], weight.t(), out=outputs[weight.shape[0]][rows])

    return run


def read_run(num_bytes: int, device: torch.device) -> Run:
    """Read memory once, as fast as torch can."""
    buffer = torch.ones(num_bytes // 4, device=device)
    return lambda: buffer.sum()


def drop_points_run(workload: Workload, dropper: TokenDropper) -> Run:
    """The drop points alone, on the tensors that arrive at each of them in a prefill."""
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
    """Seconds of every run in every round. A first round is not counted. Garbage is collected before and after, not during."""
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
                del result  # the cache is freed outside the timed part
            print(f"round {round_idx + 1} of {repeats}", file=sys.stderr, flush=True)
    finally:
        gc.enable()
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return median(one / other for one, other in zip(numerators, denominators, strict=True))


def peak_of(run: Run, device: torch.device) -> float:
    """The highest memory use of one run, in MB."""
    reset_peak_memory(device)
    run()
    return peak_memory_mb(device)


def prefill_rows(contenders: Sequence[Contender], repeats: int) -> list[dict[str, Any]]:
    """Time the contenders, the matrix products of each schedule and the drop points of each method."""
    first = contenders[0].workload
    peaks = {contender.name: peak_of(contender.prefill, first.device) for contender in contenders}
    runs: dict[str, Run] = {contender.name: contender.prefill for contender in contenders}
    for each in contenders:
        products = gemm_products(each.workload.decoder, each.workload.tokens_per_layer(each.schedule))
        runs.setdefault(products_name(each), gemm_run(products, each.workload.packed.inputs_embeds))
        runs[f"drop points {each.name}"] = drop_points_run(each.workload, each.dropper) if each.dropper else list
    if first.plain is not None:
        runs["plain products"] = plain_gemm_run(first.plain, first.packed.inputs_embeds)
    seconds = time_rounds(runs, repeats, first.device)
    plain_ms = 1e3 * median(seconds["plain products"]) if "plain products" in seconds else None
    shared = {"plain_gemm_ms": plain_ms}
    return [{**prefill_row(each, seconds), "peak_memory_mb": peaks[each.name], **shared} for each in contenders]


def products_name(contender: Contender) -> str:
    return f"products {contender.workload.prefix}{contender.schedule}"


def prefill_row(contender: Contender, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    names, workload = (contender.name, DENSE, f"drop points {contender.name}", products_name(contender)), contender.workload
    own, dense, drop_points, products = (seconds[name] for name in names)
    flops, dense_flops = (each.prefill_flops(*workload.sizes) for each in (contender.schedule, DropSchedule({})))
    config, _, vision_tokens = workload.sizes
    return {
        "prefill": contender.name,
        "schedule": {str(layer): ratio for layer, ratio in contender.schedule.items()},
        "mean_vision_tokens": contender.schedule.mean_tokens(vision_tokens, config.num_hidden_layers),
        "prefill_ms": 1e3 * median(own),
        "fastest_ms": 1e3 * min(own),
        "gemm_ms": 1e3 * median(products),
        "gemm_percent": 100 * median_ratio(products, own),
        "tflop_per_s": flops / median(own) / 1e12,
        "speedup": median_ratio(dense, own),
        "flops_ratio": dense_flops / flops,
        "achieved_percent": 100 * median_ratio(dense, own) * flops / dense_flops,
        "drop_points_ms": 1e3 * median(drop_points),
        "drop_points_percent": 100 * median_ratio(drop_points, own),
        "kv_cache_mb": contender.cache_bytes() / 1e6,
        "rounds_ms": [1e3 * value for value in own],
    }


def decode_rows(contenders: Sequence[Contender], repeats: int) -> list[dict[str, Any]]:
    """Time the decoding of each contender from the cache of its own prefill, and one reading of the first one's weights.

    The matrix products of one token are timed alone too, for each dtype of the weights.
    """
    runs: dict[str, Run] = {contender.name: contender.decoding(contender.prefill()) for contender in contenders}
    for workload in {contender.workload.precision.name: contender.workload for contender in reversed(contenders)}.values():
        products = gemm_products(workload.decoder, [1] * len(workload.decoder.layers))
        runs[token_products_name(workload)] = gemm_run(products, workload.packed.inputs_embeds)
    read_bytes, device = min(contenders[0].weight_bytes, READ_BYTES), contenders[0].workload.device
    runs["read"] = read_run(read_bytes, device)
    seconds = time_rounds(runs, repeats, device)
    first = token_products_name(contenders[0].workload)
    return [decode_row(contender, seconds, read_bytes, seconds[first]) for contender in contenders]


def token_products_name(workload: Workload) -> str:
    return f"products of a token in {workload.precision.name}"


def decode_row(
    contender: Contender, seconds: Mapping[str, list[float]], read_bytes: int, first_products: Sequence[float]
) -> dict[str, Any]:
    workload, products = contender.workload, seconds[token_products_name(contender.workload)]
    speedup, kernel_speedup = median_ratio(seconds[DENSE], seconds[contender.name]), median_ratio(first_products, products)
    own = [value / workload.decode_steps for value in seconds[contender.name]]
    # The cache grows by one token per step, so the mean over all steps is the mean of the first and the last step.
    cache = fmean(map(contender.cache_bytes, (1, workload.decode_steps)))
    touched = contender.weight_bytes + cache
    return {
        "decode": contender.name,
        "decode_ms_per_token": 1e3 * median(own),
        "fastest_ms": 1e3 * min(own),
        "touched_mb": touched / 1e6,
        "gb_per_s": touched / median(own) / 1e9,
        "read_gb_per_s": read_bytes / median(seconds["read"]) / 1e9,
        "bandwidth_percent": 100 * median_ratio(seconds["read"], own) * touched / read_bytes,
        "speedup": speedup,
        "products_ms": 1e3 * median(products),
        "products_percent": 100 * median_ratio(products, own),
        "kernel_speedup": kernel_speedup,
        "of_kernel_percent": 100 * speedup / kernel_speedup,
        "rounds_ms": [1e3 * value for value in own],
    }
