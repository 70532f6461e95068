"""The inputs of the goldens of newer methods, drawn from the seeds in each file's header: golden_NAME(seed, ...)."""

import json
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from golden import fingerprint
from safetensors import safe_open
from torch import Tensor, nn

from nanovlm_v2drop.dropping import TokenDropper
from nanovlm_v2drop.inference import initial_state
from nanovlm_v2drop.models.vision import VisionTrace
from nanovlm_v2drop.models.vlm import PackedInputs

FOLDER = Path(__file__).parent / "goldens"


def drawn(call: list[Any]) -> Tensor:
    """The tensor of a call such as ["golden_tokens", seed, count, width]."""
    name, *arguments = call
    return {
        "golden_tokens": tokens, "golden_repeats": repeats, "golden_attention": attention, "golden_video": video,
        "golden_prompt": prompt, "golden_embeds": embeds,
    }[name](*arguments)  # fmt: skip


def open_parts(name: str) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Of a routine's golden: the header's parts, the inputs of each part (checked by sha256), and its outputs."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    inputs = {part: {key: drawn(call) for key, call in about["inputs"].items()} for part, about in meta["parts"].items()}
    flat = {f"{part}.{key}": tensor for part, tensors in inputs.items() for key, tensor in tensors.items()}
    assert fingerprint(flat) == meta["inputs_sha256"]
    outputs: dict[str, dict[str, Tensor]] = {part: {} for part in inputs}
    for key, tensor in stored.items():
        part, _, output = key.partition(".")
        outputs[part][output] = tensor
    return meta["parts"], inputs, outputs


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(seed: int, count: int, width: int, clusters: int = 24) -> Tensor:
    """(count, width) in clusters around a common direction, with different lengths."""
    draws = generator(seed)
    common, centres = torch.randn(width, generator=draws), torch.randn(clusters, width, generator=draws)
    labels = torch.randint(clusters, (count,), generator=draws)
    noise, lengths = torch.randn(count, width, generator=draws), torch.rand(count, 1, generator=draws)
    return (0.5 + 1.5 * lengths) * (0.7 * common + 0.6 * centres[labels] + 0.5 * noise)


def repeats(seed: int, count: int, width: int, distinct: int) -> Tensor:
    """(count, width) with `distinct` different rows, the last of which is at all other places."""
    labels = torch.arange(distinct - 1).tolist() + [distinct - 1] * (count - distinct + 1)
    return tokens(seed, distinct, width)[torch.tensor(labels)[torch.randperm(count, generator=generator(seed + 1))]]


def attention(seed: int, heads: int, count: int, peak: int = 3, tilt: int = 0) -> Tensor:
    """(heads, count) positive weights; `tilt` favours the first tokens."""
    draws = torch.rand(heads, count, generator=generator(seed))
    weights, slope = draws.clone(), 1 - torch.arange(count) / count
    for _ in range(peak):
        weights = weights * draws
    for _ in range(tilt):
        weights = weights * slope
    return weights / count


def video(seed: int, frames: int, size: int, width: int) -> Tensor:
    """(frames * size, width): frames differ from a common scene by different amounts."""
    draws = generator(seed)
    scene, common = torch.randn(size, width, generator=draws), torch.randn(width, generator=draws)
    shifts, amounts = torch.randn(frames, 1, width, generator=draws), torch.rand(frames, 1, 1, generator=draws)
    noise = torch.randn(frames, size, width, generator=draws)
    scales = 0.2 + 1.6 * torch.rand(width, generator=draws)
    return ((common + 0.6 * scene + 0.35 * amounts * shifts + 0.5 * noise) * scales).reshape(frames * size, width)


def prompt(seed: int, start: int, grid: list[int], text: int, width: int, size: float = 1.0, coarse: int = 4) -> Tensor:
    """(1, T, width): text of noise around a picture of coarse blocks with texture of different strengths."""
    draws = generator(seed)
    rows, columns = grid
    blocks = torch.randn(-(-rows // coarse), -(-columns // coarse), width, generator=draws)
    picture = blocks.repeat_interleave(coarse, 0)[:rows].repeat_interleave(coarse, 1)[:, :columns]
    texture, strength = torch.randn(rows, columns, width, generator=draws), torch.rand(rows, columns, 1, generator=draws)
    words = torch.randn(start + text, width, generator=draws)
    vision = size * (0.8 * picture + (0.2 + strength) * texture).reshape(rows * columns, width)
    return torch.cat([words[:start], vision, words[start:]])[None]


def embeds(seed: int, length: int, hidden_size: int) -> Tensor:
    return torch.randn(1, length, hidden_size, generator=generator(seed))


def in_a_prompt(
    features: Tensor,
    grids: list[tuple[int, int, int]],
    attention: Tensor | None = None,
    before: Tensor | None = None,
    behind: Tensor | None = None,
) -> PackedInputs:
    """A prompt with the features (n, D) of pictures, one trace a grid with a class token; the text is random by default."""
    width = features.shape[1]
    before = tokens(1, 5, width) if before is None else before
    behind = tokens(2, 4, width) if behind is None else behind
    embeds = torch.cat([before, features, behind])
    rows = torch.arange(len(embeds))
    mask = (rows >= len(before)) & (rows < len(before) + len(features))
    traces, first = [], 0
    for size in map(prod, grids):
        own = features[first : first + size]
        received = torch.zeros(1, size) if attention is None else attention[:, first : first + size]
        hidden, keys = torch.cat([own.new_zeros(1, width), own]), torch.zeros(1, 1 + size, 2)
        traces.append(VisionTrace(hidden, partial(Tensor.clone, received), partial(Tensor.clone, keys), nn.Identity(), 1))
        first += size
    return PackedInputs(embeds, rows, mask, [len(embeds)], vision_grids=(tuple(grids),), vision=tuple(traces))


def vision_after(dropper: TokenDropper, packed: PackedInputs) -> tuple[list[int], Tensor]:
    """Numbers (-2 for new tokens) and features of the vision tokens of one prompt behind a drop point at layer 0."""
    after = dropper(dropper.begin(initial_state(packed)))
    return after.vision_indices[after.vision_mask].tolist(), after.hidden_states[after.vision_mask]
