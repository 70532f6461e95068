"""Tiny random decoders and packed prompts, the same in every run, and Pillow's resizing from the time of training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nanovlm_v2drop.models.attention import sdpa_attention
from nanovlm_v2drop.models.config import TextConfig
from nanovlm_v2drop.models.decoder import Decoder, rotary_table
from nanovlm_v2drop.models.vision import VisionTrace
from nanovlm_v2drop.models.vision_qwen2 import multimodal_positions
from nanovlm_v2drop.models.vlm import LlavaModel, PackedInputs

PROMPTS = ((5, 24, 7), (3, 12, 4), (6, 0, 9))  # text before, vision tokens, text behind
# The differences of the families after the splice: the decoder's arithmetic, the positions, and the grids of a prompt.
FAMILIES: dict[str, dict[str, object]] = {
    "llava-1.5": {},
    "llava-onevision": {"qkv_bias": True},
    "qwen2-vl": {"qkv_bias": True, "mrope_section": (1, 1, 2)},
    "qwen3-vl": {"qk_norm": True, "head_dim": 12, "mrope_section": (3, 2, 1), "mrope_interleaved": True},
}
DEEPSTACK_LEVELS = 3  # of Qwen3-VL

META = torch.device("meta")  # has shapes, dtypes and devices but no values, like a GPU that is still computing them


class NoWaiting(TorchFunctionMode):
    """A context in which every operation that makes the host wait for a GPU is an error on the meta device.

    Meta itself has no value to give away, whoever asks. Here it takes none either but by a copy that does not wait, and works
    with nothing that lies elsewhere (single numbers may: they travel with the launch).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if kwargs.get("non_blocking"):
            return result
        held = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        made = func in (torch.tensor, torch.as_tensor) and isinstance(result, Tensor) and result.is_meta
        if made or len({tensor.device for tensor in held}) > 1:
            raise AssertionError(f"{func} takes values from the host to the device and waits; use attention.sent")
        return result


def changed_trace(trace: VisionTrace, change: Callable[[Tensor], Tensor]) -> VisionTrace:
    """The trace with changed values, computed at once."""
    hidden_states, received, keys = map(change, (trace.hidden_states, trace.received_attention(), trace.keys()))
    return replace(trace, hidden_states=hidden_states, received_attention=lambda: received, keys=lambda: keys)


def changed_prompt(packed: PackedInputs, change: Callable[[Tensor], Tensor]) -> PackedInputs:
    """The prompt with all tensors changed, including those of its traces."""
    names = ("inputs_embeds", "position_ids", "vision_mask", "deepstack")
    fields = {name: change(value) for name in names if (value := getattr(packed, name)) is not None}
    return replace(packed, vision=tuple(changed_trace(trace, change) for trace in packed.vision), **fields)


def tiny_decoder(**changes: object) -> Decoder:
    """Six layers with grouped-query attention and random norms, so that a test notices a wrong norm."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    torch.manual_seed(0)
    decoder = Decoder(TextConfig(**{"vocab_size": 61, "num_key_value_heads": 2, **sizes, **changes}))
    for name, parameter in decoder.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1 if "norm" in name else 0.3)
    return decoder.eval()


def tiny_prompts(prompts=PROMPTS, hidden_size: int = 32, family: str = "llava-1.5") -> list[PackedInputs]:
    """One PackedInputs a prompt."""
    sizes = {"hidden_size": hidden_size, "family": family}
    return [one_prompt(*prompt, seed=seed, **sizes) for seed, prompt in enumerate(prompts, 1)]


def one_prompt(
    before: int, vision: int, behind: int, seed: int = 1, hidden_size: int = 32, family: str = "llava-1.5"
) -> PackedInputs:
    """One prompt whose vision tokens are a video of four frames if their number allows it, with the traces of a tower.

    LLaVA-OneVision's has four tokens of another grid behind it, as newlines and tiles are; Qwen2-VL's has places in a grid, and
    Qwen3-VL's has deepstack besides.
    """
    length = before + vision + behind
    embeds = torch.randn(length, hidden_size, generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(length)
    mask = (rows >= before) & (rows < before + vision)
    grids = tiny_grids(vision, family)
    traces = tuple(tiny_trace(part, seed) for part in embeds[mask].split([prod(grid) for grid in grids]))
    pictures = {"vision_grids": (grids,), "vision": traces} if vision else {}
    token_ids = [0] * before + [1] * vision + [0] * behind
    positions = multimodal_positions(token_ids, grids if vision else (), {1}) if family.startswith("qwen") else rows
    if family == "qwen3-vl" and vision:
        levels = torch.randn(length, DEEPSTACK_LEVELS, hidden_size, generator=torch.Generator().manual_seed(100 + seed))
        pictures["deepstack"] = levels * mask[:, None, None]
    return PackedInputs(embeds, positions, mask, [length], seeds=(seed,), **pictures)


def tiny_grids(vision: int, family: str) -> tuple[tuple[int, int, int], ...]:
    apart = 4 if family == "llava-onevision" and vision > 8 else 0
    frames = 1 if (vision - apart) % 4 else 4
    tokens = (vision - apart) // frames
    video = (frames, 2, tokens // 2) if tokens % 2 == 0 else (frames, 1, tokens)
    return (video, (1, 2, 2)) if apart else (video,)


def tiny_trace(features: Tensor, seed: int) -> VisionTrace:
    """The trace of a tower and a projector that give `features` (P, D)."""
    generator = torch.Generator().manual_seed(seed)
    count, width = features.shape
    attention = torch.randn(2, count, generator=generator).softmax(-1)
    keys = torch.randn(2, count + 1, width // 2, generator=generator)
    class_token = torch.randn(1, width, generator=generator)
    return VisionTrace(torch.cat([class_token, features]) - 1, lambda: attention, lambda: keys, lambda hidden: hidden + 1, 1)


def pack_together(parts: list[PackedInputs]) -> PackedInputs:
    shape = next((part.deepstack.shape[1:] for part in parts if part.deepstack is not None), None)
    levels = [torch.zeros(sum(part.seqlens), *shape) if part.deepstack is None else part.deepstack for part in parts if shape]
    return PackedInputs(
        torch.cat([part.inputs_embeds for part in parts]),
        torch.cat([part.position_ids for part in parts], dim=-1),
        torch.cat([part.vision_mask for part in parts]),
        [length for part in parts for length in part.seqlens],
        seeds=tuple(seed for part in parts for seed in part.seeds),
        vision_grids=tuple(grids for part in parts for grids in part.vision_grids),
        vision=tuple(trace for part in parts for trace in part.vision),
        deepstack=torch.cat(levels) if levels else None,
    )


@contextmanager
def resizing_horizontally_first() -> Iterator[None]:
    """Pillow 13 chooses the order of its two passes by the shape and rounds between. The models were trained with one order."""
    resize = Image.Image.resize

    def horizontal_first(picture: Image.Image, size: tuple[int, int], resample: int, **_: object) -> Image.Image:
        return resize(resize(picture, (size[0], picture.height), resample), size, resample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", horizontal_first)
        yield


def logits_of(model: LlavaModel, packed: PackedInputs) -> Tensor:
    """The decoder without cache or dropping: (T, vocab_size)."""
    decoder, hidden_states = model.language_model, packed.inputs_embeds
    rotary = rotary_table(model.config.text_config, packed.position_ids, hidden_states.dtype)
    for layer in decoder.layers:
        hidden_states = layer(hidden_states, rotary, lambda q, k, v: sdpa_attention(q, k, v, packed.seqlens))
    return decoder.lm_head(decoder.norm(hidden_states))


def masked_forward(decoder, packed, kept=(), more_tokens=(), renumbers=False, cut=False):
    """The slow twin: every token goes through every layer, and dropped tokens are hidden as keys from their drop point on.

    Returns the logits of every position of one sequence, prompt and `more_tokens`, without any cache. With `renumbers`,
    the positions in a layer count only the tokens that are left there, unless they are places in a grid. With `cut`, tokens
    behind the prompt see in every layer only what the last drop point has left.
    """
    renumbers = renumbers and packed.position_ids.dim() == 1
    embeds = torch.cat([packed.inputs_embeds, decoder.embed_tokens(torch.tensor(more_tokens, dtype=torch.long))])
    length = len(embeds)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    alive = torch.ones(length, dtype=torch.long)
    hidden, vision_rows = embeds, packed.vision_mask.nonzero().flatten()
    kept = dict(kept)
    if cut:
        gone = set(range(len(vision_rows))) - set(kept[max(kept)][0].tolist())
        visible[len(packed.inputs_embeds) :, vision_rows[sorted(gone)]] = False
    for layer_idx, layer in enumerate(decoder.layers):
        if layer_idx in kept:
            gone = set(range(len(vision_rows))) - set(kept[layer_idx][0].tolist())
            visible[:, vision_rows[sorted(gone)]] = False
            visible.fill_diagonal_(True)  # a dropped row may see itself, because no other row reads it
            alive[vision_rows[sorted(gone)]] = 0 if renumbers else 1
        positions = alive.cumsum(0) - 1 if packed.position_ids.dim() == 1 else places_and_more(packed, length)
        rotary = rotary_table(decoder.config, positions, embeds.dtype)

        def attend(q, k, v):
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            weights = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
            weights = weights.masked_fill(~visible, -torch.inf).softmax(-1)
            return torch.einsum("hqk,khd->qhd", weights, v)

        hidden = layer(hidden, rotary, attend)
        if packed.deepstack is not None and layer_idx < packed.deepstack.shape[1]:
            hidden = hidden + torch.cat([packed.deepstack[:, layer_idx], torch.zeros(len(more_tokens), hidden.shape[1])])
    return decoder.lm_head(decoder.norm(hidden))


def places_and_more(packed, length):
    """(3, length): the prompt's places in a grid, followed by positions that rise from the largest one on all axes."""
    positions = packed.position_ids
    more = positions.max() + 1 + torch.arange(length - positions.shape[-1])
    return torch.cat([positions, more.expand(3, -1)], dim=-1)
