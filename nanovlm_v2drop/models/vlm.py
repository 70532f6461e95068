"""The LLaVA models, and the splice of all families: token ids and vision features become one packed sequence of embeddings.

Shapes: T tokens of all sequences packed, B sequences, N pictures or tiles or frames, P patches of one of them, V width of the
tower, D hidden_size of the decoder, n vision tokens of one picture or video.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arrange import arrange_picture, arrange_single, arrange_video, select_best_resolution
from .attention import sent
from .config import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig, SiglipVisionConfig, VLMConfig
from .decoder import Decoder
from .vision import CLIPVisionTower, SiglipVisionTower, VisionTrace


@dataclass(frozen=True, eq=False)
class VisionInput:
    """One picture or video as its model's tower reads it.

    `pixel_values` float32. LLaVA-1.5: (1, 3, S, S); LLaVA-OneVision: (tiles, 3, S, S) with the whole picture first, or
    (frames, 3, S, S); Qwen2-VL: (patches, 3 * temporal_patch_size * patch_size ** 2). `grids`: frames, rows and columns of its
    vision tokens in the decoder, including newline tokens. `size`: height and width in pixels before any resizing. `text`: how
    it is written in a prompt where words stand between its tiles or frames: the model's vision token once for each frame of
    each grid. Where it is empty, a single vision token stands for all. `overview`: the number of the grid that shows the whole
    picture. `seconds_per_grid`: the time from one frame of the grid to the next, for models whose positions tell it.
    """

    pixel_values: Tensor
    grids: tuple[tuple[int, int, int], ...]
    size: tuple[int, int]
    is_video: bool = False
    seconds_per_grid: float = 0.0
    text: str = ""
    overview: int = 0

    @property
    def overview_grid(self) -> tuple[int, int, int]:
        return self.grids[self.overview]

    @property
    def num_tokens(self) -> int:
        return sum(map(prod, self.grids))


@dataclass
class PackedInputs:
    """The input of prefill: B prompts packed without padding.

    inputs_embeds (T, D); position_ids (T,) or (3, T); vision_mask (T,) True for vision tokens; seqlens: B host integers that
    sum to T. Optional: `vision_counts` (vision tokens of each prompt); `vision_grids` (frames, rows and columns of each picture
    or video of each prompt, including newline tokens; by default, a prompt's vision tokens are one row); `seeds` (one number a
    prompt, the same in every batch, for methods that draw at random); `vision` (one trace a grid, for methods that choose
    tokens before the decoder); `question_counts` (text tokens behind the last vision token of each prompt); `deepstack`
    ((T, S, D), what the tower adds to the rows behind the decoder's first S layers; zeros for text).
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    vision_mask: Tensor
    seqlens: Sequence[int]
    vision_counts: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    vision_grids: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    vision: tuple[VisionTrace, ...] = ()
    question_counts: tuple[int, ...] = ()
    deepstack: Tensor | None = None

    def __post_init__(self) -> None:
        self.seqlens = tuple(int(length) for length in self.seqlens)
        self.check_lengths()
        if not self.vision_counts:  # counted once, here, so that no drop point waits for the GPU
            self.vision_counts = tuple(int(part.sum()) for part in self.vision_mask.split(self.seqlens))
        if not self.question_counts:
            self.question_counts = tuple(text_behind(part.tolist()) for part in self.vision_mask.split(self.seqlens))
        self.seeds = self.seeds or (0,) * len(self.seqlens)
        self.vision_grids = self.vision_grids or tuple(((1, 1, count),) if count else () for count in self.vision_counts)
        self.check_grids()

    def check_lengths(self) -> None:
        """Raise ValueError unless all fields have the same number of tokens T."""
        lengths = {
            "sum(seqlens)": sum(self.seqlens),
            "inputs_embeds": self.inputs_embeds.shape[0],
            "position_ids": self.position_ids.shape[-1],
            "vision_mask": self.vision_mask.shape[0],
            **({} if self.deepstack is None else {"deepstack": self.deepstack.shape[0]}),
        }
        if len(set(lengths.values())) > 1 or not self.seqlens or min(self.seqlens) < 1:
            raise ValueError(f"packed inputs disagree on the number of tokens: {lengths}, seqlens {self.seqlens}")

    def check_grids(self) -> None:
        """Raise ValueError unless the grids of each prompt match its vision tokens."""
        held = tuple(sum(prod(grid) for grid in grids) for grids in self.vision_grids)
        if held != self.vision_counts:
            raise ValueError(f"vision grids {self.vision_grids} hold {held} tokens, the prompts {self.vision_counts}")


def text_behind(is_vision: Sequence[bool]) -> int:
    """The number of text tokens behind the last vision token of a prompt."""
    return next((count for count, vision in enumerate(reversed(is_vision)) if vision), len(is_vision))


class Projector(nn.Module):
    """LLaVA's mlp2x_gelu: from the tower's width to the decoder's. The GELU is the exact one (erf)."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


@dataclass(frozen=True)
class Encoded:
    """The decoder's input for one picture or video: features (n, D), and a trace for each of its grids.

    `deepstack` (n, S, D): what is added to the tokens behind the decoder's first S layers, for families that have it.
    """

    features: Tensor
    traces: tuple[VisionTrace, ...]
    deepstack: Tensor | None = None


Encode = Callable[[Sequence[VisionInput]], list[Encoded]]  # pictures and videos through the tower


class VLM(nn.Module):
    """The common part of all families: the splice. Each family has a `language_model` and its own `encode`."""

    config: VLMConfig
    language_model: Decoder

    @abstractmethod
    def encode(self, media: Sequence[VisionInput]) -> list[Encoded]:
        """Run all pictures and videos through the tower in one batch."""

    def position_ids(self, token_ids: Sequence[int], media: Sequence[VisionInput]) -> Tensor:
        """(T,) of one prompt, or (3, T) where positions are places in a grid."""
        return torch.arange(len(token_ids))

    def on_device(self, values: Tensor) -> Tensor:
        """On the model's device and in its dtype."""
        like = self.language_model.embed_tokens.weight
        return sent(values, like.device).to(like.dtype)

    def pack(
        self,
        prompts: Sequence[Sequence[int]],
        media: Sequence[Sequence[VisionInput]],
        seeds: tuple[int, ...],
        encode: Encode | None = None,
    ) -> PackedInputs:
        """Embed the prompts' token ids and put the vision features at the places of the vision tokens, in reading order.

        `prompts`: token ids of each sequence, with an image or video token repeated once for each feature. `media`: pictures
        and videos of each prompt, in order. `encode` stands in for the method of that name. Raises ValueError where the
        numbers of vision tokens and features differ.
        """
        vision_tokens = frozenset(self.config.vision_tokens.values())
        is_vision = [token in vision_tokens for prompt in prompts for token in prompt]
        for prompt, held in zip(prompts, media, strict=True):
            check_counts(sum(token in vision_tokens for token in prompt), sum(medium.num_tokens for medium in held))
        device = self.language_model.embed_tokens.weight.device
        encoded = (encode or self.encode)([medium for held in media for medium in held]) if any(map(len, media)) else []
        inputs_embeds, deepstack = self.embedded([token for prompt in prompts for token in prompt], is_vision, encoded)
        return PackedInputs(
            inputs_embeds,
            sent(torch.cat([self.position_ids(*prompt) for prompt in zip(prompts, media, strict=True)], dim=-1), device),
            sent(torch.tensor(is_vision), device),
            tuple(map(len, prompts)),
            tuple(sum(medium.num_tokens for medium in held) for held in media),
            seeds,
            tuple(tuple(grid for medium in held for grid in medium.grids) for held in media),
            tuple(trace for picture in encoded for trace in picture.traces),
            tuple(text_behind([token in vision_tokens for token in prompt]) for prompt in prompts),
            deepstack,
        )

    def embedded(
        self, token_ids: Sequence[int], is_vision: Sequence[bool], encoded: Sequence[Encoded]
    ) -> tuple[Tensor, Tensor | None]:
        """(T, D) embeddings of the token ids, with the pictures' features at the places of the vision tokens; and deepstack."""
        # A vision token's id can lie outside the embedding table: the original LLaVA vocabulary has no row for it.
        flat = [0 if vision else token for token, vision in zip(token_ids, is_vision, strict=True)]
        embed_tokens = self.language_model.embed_tokens
        inputs_embeds = embed_tokens(sent(torch.tensor(flat), embed_tokens.weight.device))
        if not encoded:
            return inputs_embeds, None
        rows = sent(torch.tensor([row for row, vision in enumerate(is_vision) if vision]), inputs_embeds.device)
        features = torch.cat([picture.features for picture in encoded]).to(inputs_embeds.dtype)
        levels = [picture.deepstack for picture in encoded if picture.deepstack is not None]
        deepstack = None
        if levels and levels[0].shape[1]:
            deepstack = features.new_zeros(len(inputs_embeds), *levels[0].shape[1:]).index_copy(0, rows, torch.cat(levels))
        return inputs_embeds.index_copy(0, rows, features), deepstack


class LlavaModel(VLM):
    """LLaVA-1.5: CLIP tower, projector, LLaMA decoder. Source: transformers models/llava/modeling_llava.py."""

    config: LlavaConfig
    vision_tower: CLIPVisionTower | SiglipVisionTower

    def __init__(self, config: LlavaConfig, attention: str = "auto") -> None:
        super().__init__()
        self.config = config
        tower = SiglipVisionTower if isinstance(config.vision_config, SiglipVisionConfig) else CLIPVisionTower
        self.vision_tower = tower(config.vision_config, config.vision_layers_run, attention)
        self.multi_modal_projector = Projector(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = Decoder(config.text_config, attention)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, image_size, image_size) -> (N, P, D)"""
        return self.multi_modal_projector(self.vision_tower(pixel_values))

    def encode(self, media: Sequence[VisionInput]) -> list[Encoded]:
        block_inputs, outputs = self.vision_tower.encode(self.on_device(torch.cat([each.pixel_values for each in media])))
        features = self.multi_modal_projector(outputs[:, self.vision_tower.num_class_tokens :])
        sizes = [len(medium.pixel_values) for medium in media]
        parts = zip(media, block_inputs.split(sizes), outputs.split(sizes), features.split(sizes), strict=True)
        return [self.arranged(*part) for part in parts]

    def arranged(self, medium: VisionInput, block_input: Tensor, output: Tensor, features: Tensor) -> Encoded:
        """One picture, from the input and output of the tower's last block (1, 1 + P, V) and its features (1, P, D)."""
        tower = self.vision_tower
        trace = VisionTrace(
            output[0],
            lambda: tower.received_attention(block_input)[0],
            lambda: tower.keys(block_input)[0],
            self.multi_modal_projector,
            tower.num_class_tokens,
        )
        return Encoded(features[0], (trace,))


class LlavaNextModel(LlavaModel):
    """LLaVA-1.6: LLaVA-1.5 with pictures in tiles. Source: transformers models/llava_next/modeling_llava_next.py."""

    config: LlavaNextConfig

    def __init__(self, config: LlavaNextConfig, attention: str = "auto") -> None:
        super().__init__(config, attention)
        self.image_newline = nn.Parameter(torch.randn(config.text_config.hidden_size))

    def arranged(self, medium: VisionInput, block_input: Tensor, output: Tensor, features: Tensor) -> Encoded:
        """One picture or video, from its tiles or frames (N, P, ...), in the order of the decoder's tokens."""
        tower = self.vision_tower

        def like_features(values: Tensor) -> Tensor:
            """(N, C, P) of the tower -> (C, n), arranged like the features, with zeros for newlines."""
            return self.arrange(medium, values.transpose(1, 2), values.new_zeros(values.shape[1])).T

        def keys() -> Tensor:
            found = tower.keys(block_input)[:, :, tower.num_class_tokens :]  # (N, heads, P, head_dim)
            flat = like_features(found.transpose(2, 3).flatten(1, 2))
            return flat.unflatten(0, (found.shape[1], -1)).transpose(1, 2)

        def attention() -> Tensor:
            return like_features(tower.received_attention(block_input))

        arranged = self.arrange(medium, features, self.image_newline)
        return Encoded(arranged, traces_of(medium, arranged, attention, keys))

    def arrange(self, medium: VisionInput, values: Tensor, newline: Tensor) -> Tensor:
        """(N, P, C) of a medium's tiles or frames -> (n, C) in reading order, with `newline` (C,) at the ends of rows."""
        if len(values) == 1:
            return arrange_single(values, newline)
        height, width = select_best_resolution(medium.size, self.config.image_grid_pinpoints)
        side = self.config.vision_config.image_size
        return arrange_picture(values, medium.size, (height // side, width // side), newline, self.config.max_tiles)


class LlavaOnevisionModel(LlavaNextModel):
    """LLaVA-OneVision: SigLIP tower, projector, Qwen2 decoder; pictures in tiles, several pictures, video.

    Source: transformers models/llava_onevision/modeling_llava_onevision.py.
    """

    config: LlavaOnevisionConfig

    def arrange(self, medium: VisionInput, values: Tensor, newline: Tensor) -> Tensor:
        if medium.is_video:
            return arrange_video(values, newline, *self.config.video_layout)
        return super().arrange(medium, values, newline)


def traces_of(
    medium: VisionInput, features: Tensor, attention: Callable[[], Tensor], keys: Callable[[], Tensor]
) -> tuple[VisionTrace, ...]:
    """A trace for each grid of a picture whose tokens are made after the tower. The features (n, D) are projected already.

    `attention` gives (heads, n), `keys` (heads, n, head_dim). Each is computed once, when one of the grids first needs it.
    """
    attention, keys = cache(attention), cache(keys)
    sizes = [prod(grid) for grid in medium.grids]
    spans = [slice(start, start + size) for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False)]

    def part(values: Callable[[], Tensor], rows: slice) -> Tensor:
        return values()[:, rows]

    return tuple(
        VisionTrace(features[rows], partial(part, attention, rows), partial(part, keys, rows), nn.Identity()) for rows in spans
    )


def check_counts(num_placeholders: int, num_features: int) -> None:
    """Raise ValueError unless every image and video token has its feature."""
    if num_placeholders != num_features:
        raise ValueError(
            f"a prompt holds {num_placeholders} image and video tokens but its pictures give {num_features} vision features; "
            "repeat each token once for each feature (encode_prompt does) and pass every picture"
        )
