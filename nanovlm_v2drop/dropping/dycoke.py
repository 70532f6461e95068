"""DyCoke: dynamic compression of tokens for fast video large language models (CVPR 2025, arXiv 2411.15024).

Before the decoder, the frames of a video form groups of four. The first frame of a group stays whole. Each other frame keeps
the tokens that are least similar to the token at the same place of an earlier frame: the previous frame for the second and the
fourth, the first frame for the third. Position ids are renumbered. During decoding, a new token sees in the later layers only
the vision tokens to which it pays most attention, unless its attention is similar to that of the previous token. Source:
github.com/KD-TAO/DyCoke, llava/model/llava_arch.py and llava/model/language_model/modeling_qwen2.py.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from math import ceil, prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.attention import attention_weights
from ..models.kv_cache import DecodePruning
from .base import PrefillState, Published, TokenDropper, check_numbers
from .schedule import PAPER_LAYERS, DropSchedule, OutOfReach
from .state import Grid

NEWLINE = 1  # LLaVA-OneVision's token behind a video; it belongs to no frame and stays
FRAMES_BACK = (0, 1, 2, 1)  # distance from each frame of a group to the frame that it is compared with; 0: it stays whole


def compared_frames(frames: int) -> dict[int, int]:
    """Each kept frame, and the frame that it is compared with: itself where it stays whole."""
    return {frame: frame - FRAMES_BACK[frame % 4] for frame in range(frames)}


def released_frames(frames: int) -> dict[int, int]:
    """The same as in the released code: an odd last frame is lost, and the third frame of the last group stays whole."""
    if frames < 2:
        return compared_frames(frames)
    compared = compared_frames(frames - frames % 2)
    return compared if frames % 4 else {**compared, frames - 2: frames - 2}


class ReleasedFrames(DropSchedule):
    """The count of the released code, which keeps `share` of each reduced frame; for prompts with one video.

    A number of tokens that is not whole frames, with or without a newline behind them, means pictures, which stay. The released
    code fails with four frames or fewer. Here its rule continues: the second and the fourth frame are reduced, the third of
    three is lost, the third of four stays whole, and a single frame is a picture.
    """

    def __init__(self, share: float, tokens_per_frame: int = 196) -> None:
        super().__init__({0: share})
        self.tokens_per_frame = tokens_per_frame

    def kept_count(self, layer_idx: int, current: int) -> int:
        frames, rest = divmod(current, self.tokens_per_frame)
        if rest > NEWLINE:
            return current
        reduced = int(self[layer_idx] * self.tokens_per_frame)
        compared = released_frames(frames).items()
        return sum(self.tokens_per_frame if frame == earlier else reduced for frame, earlier in compared) + rest

    def mapped(
        self, num_layers: int, num_vision_tokens: int, from_layers: int = PAPER_LAYERS, frames: int = 1
    ) -> "ReleasedFrames":
        """The same share of each reduced frame of a video, with frames of any size. Pictures stay."""
        return type(self)(self[0], num_vision_tokens // frames if frames > 1 else self.tokens_per_frame)

    def mapping_note(self, num_layers: int, num_vision_tokens: int, from_layers: int = PAPER_LAYERS, frames: int = 1) -> str:
        if frames == 1:
            return "for videos: drops nothing from a picture"
        is_same = num_vision_tokens // frames == self.tokens_per_frame
        return "" if is_same else f"mapped from frames of {self.tokens_per_frame} tokens"

    def with_values(self, keep_ratios: Mapping[int, float], scale: float) -> "ReleasedFrames":
        return type(self)(keep_ratios[0], self.tokens_per_frame)

    def check_prompt(self, grids: Sequence[Grid]) -> None:
        """Raise ValueError for a prompt that `kept_count` would mistake for another: it knows the number of tokens only."""
        current = sum(map(prod, grids))
        pictures = all(frames == 1 for frames, _, _ in grids) and self.kept_count(0, current) == current
        sizes = [rows * columns for _, rows, columns in grids[:1]]
        one_video = sizes == [self.tokens_per_frame] and tuple(grids[1:]) in ((), ((1, 1, NEWLINE),))
        if not pictures and not one_video:
            raise ValueError(f"the released setting is for one video of {self.tokens_per_frame} tokens a frame, not {grids}")


class DyCoke(TokenDropper):
    """Drop the tokens of a video that repeat an earlier frame; during decoding, hide the tokens that receive little attention.

    With a DropSchedule, exactly the asked number is kept: pictures and first frames stay whole, and the other frames of a
    prompt keep an equal share of the rest. A number smaller than what stays whole is a ValueError. A prompt without a frame to
    reduce (pictures, a video of one frame) keeps all its tokens. Decoding: layer `layer` and later layers (only the last layer
    of a shallower decoder) see the share 1 - `prune` of the vision tokens, those with most attention from the new token in
    layer `layer` - 1. `prune` = 0 turns this off. It frees no memory, because nothing leaves the cache. Where the cosine
    between this attention and that of the previous token is `similarity` or more, nothing is hidden. Deviations from the
    released code:
    - Kept tokens stay in reading order. The released code orders them by similarity, which is a bug.
    - Only ReleasedFrames skips and loses frames.
    - Several videos and pictures work, and so do batches, in which every sample decides for itself. The released code runs with
      batch 1 only.
    - Each generation starts without history. The released code compares with the previous sample.
    - All vision tokens can be hidden. The released code always shows the last one.
    - Attention is compared in float32.
    The released evaluation uses `prune` 0.8, its README 0.7.
    """

    name = "dycoke"
    published: ClassVar[Mapping[str, Published]] = {
        "K=0.7": Published(ReleasedFrames(1 - 0.7)),
        "K=0.5": Published(ReleasedFrames(1 - 0.5)),
        "K=0.9": Published(ReleasedFrames(1 - 0.9)),
    }
    latest_layer = 0
    renumbers = True
    depths = (0.0,)

    def __init__(
        self, schedule: DropSchedule, layer: int = 3, prune: float = 0.7, similarity: float = 0.9, **options: Any
    ) -> None:
        super().__init__(schedule, **options)
        if layer < 1 or not 0.0 <= prune <= 1.0:
            raise ValueError(f"layer {layer} must be 1 or more, for the attention before it, and prune {prune} in [0, 1]")
        self.layer, self.prune, self.similarity = layer, prune, similarity

    @classmethod
    def schedule_for(cls, mean_tokens: float, num_vision_tokens: int, num_layers: int, frames: int = 1) -> DropSchedule:
        """One share before the decoder, for a video of `frames`. A picture is one frame and stays as it is.

        Tokens outside the frames, such as LLaVA-OneVision's newline, stay too.
        """
        in_frames = num_vision_tokens // frames
        whole = ceil(frames / 4) * in_frames + num_vision_tokens - frames * in_frames
        if not whole - 0.5 <= mean_tokens <= num_vision_tokens:
            raise OutOfReach(
                f"a mean of {mean_tokens:g} vision tokens is out of reach: with {frames} frames of together "
                f"{num_vision_tokens} vision tokens it lies between {whole} and {num_vision_tokens}",
                keeping(whole, num_vision_tokens),
            )
        return keeping(max(whole, round(mean_tokens)), num_vision_tokens)

    def begin(self, state: PrefillState) -> PrefillState:
        for index, grids in enumerate(state.vision_grids):
            if isinstance(schedule := self.schedule.of(index), ReleasedFrames):
                schedule.check_prompt(grids)
        return state

    def kept_counts(self, state: PrefillState) -> tuple[int, ...]:
        """The schedule's counts, but a prompt of single frames has no frame to reduce and keeps all its tokens."""
        counts = super().kept_counts(state)
        has_video = [any(frames > 1 for frames, _, _ in grids) for grids in state.vision_grids]
        return tuple(
            count if video else before for count, before, video in zip(counts, state.vision_counts, has_video, strict=True)
        )

    def frames(
        self, rows: Tensor, grids: Sequence[Grid], schedule: DropSchedule
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The rows of a sequence's whole frames, and of its other frames, each with the rows of its earlier frame."""
        compared = released_frames if isinstance(schedule, ReleasedFrames) else compared_frames
        whole, reduced = [], []
        for (count, _, _), video in zip(grids, rows.split([prod(grid) for grid in grids]), strict=True):
            frames = video.unflatten(0, (count, -1))
            pairs = compared(count).items()
            whole += [frames[frame] for frame, earlier in pairs if frame == earlier]
            reduced += [(frames[frame], frames[earlier]) for frame, earlier in pairs if frame != earlier]
        return whole, reduced

    def select(self, state: PrefillState, vision_counts: Sequence[int]) -> Tensor:
        kept = []
        sequences = zip(state.vision_rows(), state.text_rows(), state.vision_grids, vision_counts, strict=True)
        for index, (rows, text, grids, count) in enumerate(sequences):
            whole, reduced = self.frames(rows, grids, self.schedule.of(index))
            whole_count = sum(map(len, whole))
            if count < whole_count:
                raise ValueError(
                    f"{self.name} cannot keep {count} of {len(rows)} tokens: {whole_count} stand in pictures and whole frames; "
                    "keep at least these"
                )
            shares = equal_shares([len(frame) for frame, _ in reduced], count - whole_count)
            best = [least_like(state, *pair, share) for pair, share in zip(reduced, shares, strict=True)]
            kept.append(torch.cat([text, *whole, *best]).sort().values)
        return torch.cat(kept)

    def decode_pruning(self, state: PrefillState) -> DecodePruning | None:
        if not self.prune or not any(state.vision_counts):
            return None
        return DynamicPruning(state, min(self.layer, state.layer_idx), self.prune, self.similarity)


def keeping(count: int, num_vision_tokens: int) -> DropSchedule:
    """A share half a token above the wanted count, so that truncation gives exactly that count."""
    return DropSchedule({0: min(1.0, (count + 0.5) / num_vision_tokens)})


def least_like(state: PrefillState, frame: Tensor, earlier: Tensor, count: int) -> Tensor:
    """The `count` rows of `frame` that are least similar to the row of `earlier` at the same place."""
    now, before = state.hidden_states[frame].float(), state.hidden_states[earlier].float()
    similarities = F.cosine_similarity(now, before, dim=-1)
    check_numbers(DyCoke.name, similarities)
    return frame[similarities.topk(count, largest=False).indices]


def equal_shares(sizes: Sequence[int], total: int) -> list[int]:
    """`total` tokens from frames of these sizes: the same share of each frame, to within one token."""
    bounds = [total * size // max(sum(sizes), 1) for size in accumulate(sizes, initial=0)]
    return [end - start for start, end in pairwise(bounds)]


class DynamicPruning:
    """Chooses the cache slots that the new tokens of one generation see; holds the attention of the previous token."""

    def __init__(self, state: PrefillState, layer: int, prune: float, similarity: float) -> None:
        self.layer, self.similarity, self.all_heads = layer, similarity, state.all_heads
        self.seqlens = state.seqlens
        self.kept_counts = [int(count * (1 - prune)) for count in state.vision_counts]
        self.vision_slots = [rows - start for rows, (start, _) in zip(state.vision_rows(), state.spans, strict=True)]
        self.text_slots = [rows - start for rows, (start, _) in zip(state.text_rows(), state.spans, strict=True)]
        self.attention: list[Tensor] = []
        self.visible: list[Tensor] | None = None

    def __call__(self, layer_idx: int, q: Tensor, keys: Tensor, seqlens: Sequence[int]) -> list[Tensor] | None:
        if layer_idx == self.layer - 1:
            self.visible = self.choose(self.vision_attention(self.all_heads(q), self.all_heads(keys), seqlens), seqlens)
        return self.visible if layer_idx >= self.layer else None

    def vision_attention(self, q: Tensor, keys: Tensor, seqlens: Sequence[int]) -> list[Tensor]:
        """The new token's attention to each sequence's vision tokens, averaged over heads."""
        attention = []
        for query, slots, length, vision in zip(q, keys, seqlens, self.vision_slots, strict=True):
            newest = torch.full((1,), length - 1, device=q.device)
            attention.append(attention_weights(query[None], slots[:length], newest)[:, 0].mean(0)[vision])
        return attention

    def choose(self, attention: list[Tensor], seqlens: Sequence[int]) -> list[Tensor] | None:
        """The slots that each sequence sees, given its attention; None where all sequences see all slots."""
        pruned = [similarity < self.similarity for similarity in self.similarities(attention)]
        self.attention = attention
        if not any(pruned):
            return None
        return [
            self.best_slots(index, length) if prunes else torch.arange(length, device=attention[index].device)
            for index, (prunes, length) in enumerate(zip(pruned, seqlens, strict=True))
        ]

    def similarities(self, attention: list[Tensor]) -> list[float]:
        """The cosine between each sequence's attention and that of the previous token; 0 for the first new token."""
        if not self.attention:
            return [0.0] * len(attention)
        pairs = zip(attention, self.attention, strict=True)
        # The host must know how many slots are read, so every decoded token waits for the GPU once.
        return torch.stack([F.cosine_similarity(now, before, dim=0) for now, before in pairs]).tolist()

    def best_slots(self, index: int, length: int) -> Tensor:
        best = self.attention[index].topk(self.kept_counts[index]).indices
        new = torch.arange(self.seqlens[index], length, device=best.device)
        return torch.cat([self.text_slots[index], self.vision_slots[index][best], new]).sort().values
