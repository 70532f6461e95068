"""DyCoke: dynamic compression of tokens for fast video large language models (CVPR 2025, arXiv 2411.15024).

Before the decoder the frames of a video are taken in fours. The first of four stays whole; of the others those tokens stay
that are least like the token at the same place of an earlier frame: the frame just before for the second and the fourth, the
first for the third. Position ids are counted anew. While decoding, a new token sees in the later layers only the vision tokens
that it looks at most, unless it looks where the token before it looked.
Source: github.com/KD-TAO/DyCoke, llava/model/llava_arch.py and llava/model/language_model/modeling_qwen2.py.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from math import ceil, prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.attention import attention_weights
from ..models.kv_cache import DecodePruning
from .base import PrefillState, Published, TokenDropper, check_numbers
from .schedule import PAPER_LAYERS, DropSchedule, OutOfReach

Grid = tuple[int, int, int]  # frames, rows, columns
NEWLINE = 1  # token that LLaVA-OneVision puts behind a video, in no frame: it stays
FRAMES_BACK = (0, 1, 2, 1)  # how far before it lies the frame that each of four is compared with; 0: it stays whole


def compared_frames(frames: int) -> dict[int, int]:
    """Each frame that is left, and the frame that it is compared with: itself where it stays whole."""
    return {frame: frame - FRAMES_BACK[frame % 4] for frame in range(frames)}


def released_frames(frames: int) -> dict[int, int]:
    """The same as the released code has it: an odd last frame is lost, and the last four's third frame stays whole."""
    if frames < 2:
        return compared_frames(frames)
    compared = compared_frames(frames - frames % 2)
    return compared if frames % 4 else {**compared, frames - 2: frames - 2}


class ReleasedFrames(DropSchedule):
    """The count of the released code, which keeps `share` of each reduced frame; for prompts with one video.

    Any other number of tokens than whole frames, with or without a newline behind them, is one of pictures, which stay. The
    released code stops with an error at four frames and fewer; here its rule goes on: the second and the fourth are reduced,
    the third of three is lost, the third of four stays whole, and a single frame is a picture.
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
        """The same share of each reduced frame of a video, however many tokens its frames have; of pictures nothing changes."""
        return type(self)(self[0], num_vision_tokens // frames if frames > 1 else self.tokens_per_frame)

    def mapping_note(self, num_layers: int, num_vision_tokens: int, from_layers: int = PAPER_LAYERS, frames: int = 1) -> str:
        if frames == 1:
            return "for videos: drops nothing from a picture"
        is_same = num_vision_tokens // frames == self.tokens_per_frame
        return "" if is_same else f"mapped from frames of {self.tokens_per_frame} tokens"

    def with_values(self, keep_ratios: Mapping[int, float], scale: float) -> "ReleasedFrames":
        return type(self)(keep_ratios[0], self.tokens_per_frame)

    def check_prompt(self, grids: Sequence[Grid]) -> None:
        """Raise ValueError for a prompt that `kept_count`, which knows only how many tokens there are, takes for another."""
        current = sum(map(prod, grids))
        pictures = all(frames == 1 for frames, _, _ in grids) and self.kept_count(0, current) == current
        sizes = [rows * columns for _, rows, columns in grids[:1]]
        one_video = sizes == [self.tokens_per_frame] and tuple(grids[1:]) in ((), ((1, 1, NEWLINE),))
        if not pictures and not one_video:
            raise ValueError(f"the released setting is for one video of {self.tokens_per_frame} tokens a frame, not {grids}")


class DyCoke(TokenDropper):
    """Drop from a video what an earlier frame shows at the same place; while decoding, hide what is hardly looked at.

    With a DropSchedule the number asked for is kept exactly: pictures and first frames whole, the other frames of a prompt an
    equal share of the rest. Less than what stays whole is a ValueError, and so is any drop from a prompt of pictures.
    Decoding: layer `layer` and later ones (the last alone in a shallower decoder) see the share 1 - `prune` of the vision
    tokens, those that layer `layer` - 1 looks at most for the new token. `prune` = 0 turns this off. It frees no memory:
    nothing leaves the cache. And where the cosine between this attention and that of the token before is `similarity` or
    more, nothing is hidden: a choice is never kept for the next token, the opposite of a cache.
    Deviations from the released code: kept tokens stay in reading order (there, in order of similarity, a plain bug); only
    ReleasedFrames skips and loses frames; several videos and pictures work, and batches, in which every sample decides for
    itself (there, batch 1); each generation starts afresh (there, it is compared with the sample before); all vision tokens
    can be hidden (there, all but the last); attention is compared in float32. The released evaluation prunes 0.8 while
    decoding, its README 0.7.
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

    def __init__(self, schedule: DropSchedule, layer: int = 3, prune: float = 0.7, similarity: float = 0.9) -> None:
        super().__init__(schedule)
        if layer < 1 or not 0.0 <= prune <= 1.0:
            raise ValueError(f"layer {layer} must be 1 or more, for the attention before it, and prune {prune} in [0, 1]")
        self.layer, self.prune, self.similarity = layer, prune, similarity

    @classmethod
    def schedule_for(cls, mean_tokens: float, num_vision_tokens: int, num_layers: int, frames: int = 1) -> DropSchedule:
        """One share before the decoder, for a video of `frames`; a picture, which is one frame, stays as it is.

        What no frame holds, as LLaVA-OneVision's newline, stays too.
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
        if isinstance(self.schedule, ReleasedFrames):
            for grids in state.vision_grids:
                self.schedule.check_prompt(grids)
        return state

    def frames(self, rows: Tensor, grids: Sequence[Grid]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Rows of a sequence's whole frames, and of its other frames, each with those of its earlier frame."""
        compared = released_frames if isinstance(self.schedule, ReleasedFrames) else compared_frames
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
        for rows, text, grids, count in sequences:
            whole, reduced = self.frames(rows, grids)
            whole_count = sum(map(len, whole))
            if count < whole_count:
                raise ValueError(f"{self.name} cannot keep {count} of {len(rows)} tokens: {whole_count} stand in whole frames")
            shares = equal_shares([len(frame) for frame, _ in reduced], count - whole_count)
            best = [least_like(state, *pair, share) for pair, share in zip(reduced, shares, strict=True)]
            kept.append(torch.cat([text, *whole, *best]).sort().values)
        return torch.cat(kept)

    def decode_pruning(self, state: PrefillState) -> DecodePruning | None:
        if not self.prune or not any(state.vision_counts):
            return None
        return DynamicPruning(state, min(self.layer, state.layer_idx), self.prune, self.similarity)


def keeping(count: int, num_vision_tokens: int) -> DropSchedule:
    """Half a token above the wanted count, so that truncation gives exactly that count."""
    return DropSchedule({0: min(1.0, (count + 0.5) / num_vision_tokens)})


def least_like(state: PrefillState, frame: Tensor, earlier: Tensor, count: int) -> Tensor:
    """`count` of the rows `frame` that are least like the rows `earlier`, each like the one at its own place."""
    now, before = state.hidden_states[frame].float(), state.hidden_states[earlier].float()
    similarities = F.cosine_similarity(now, before, dim=-1)
    check_numbers(DyCoke.name, similarities)
    return frame[similarities.topk(count, largest=False).indices]


def equal_shares(sizes: Sequence[int], total: int) -> list[int]:
    """`total` tokens from frames of these sizes: the same share of each, to within one token."""
    bounds = [total * size // max(sum(sizes), 1) for size in accumulate(sizes, initial=0)]
    return [end - start for start, end in pairwise(bounds)]


class DynamicPruning:
    """Which slots of the cache the new tokens of one generation see; holds the attention of the token before."""

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
        """The new token's attention to each sequence's vision tokens, mean over heads."""
        attention = []
        for query, slots, length, vision in zip(q, keys, seqlens, self.vision_slots, strict=True):
            newest = torch.full((1,), length - 1, device=q.device)
            attention.append(attention_weights(query[None], slots[:length], newest)[:, 0].mean(0)[vision])
        return attention

    def choose(self, attention: list[Tensor], seqlens: Sequence[int]) -> list[Tensor] | None:
        """The slots that each sequence sees, given its attention; None where all see all."""
        pruned = [similarity < self.similarity for similarity in self.similarities(attention)]
        self.attention = attention
        if not any(pruned):
            return None
        return [
            self.best_slots(index, length) if prunes else torch.arange(length, device=attention[index].device)
            for index, (prunes, length) in enumerate(zip(pruned, seqlens, strict=True))
        ]

    def similarities(self, attention: list[Tensor]) -> list[float]:
        """Of each sequence's attention to that of the token before; 0 for the first new token."""
        if not self.attention:
            return [0.0] * len(attention)
        pairs = zip(attention, self.attention, strict=True)
        # Whether slots are hidden decides how many are read, which the host must know: one wait for the GPU a token.
        return torch.stack([F.cosine_similarity(now, before, dim=0) for now, before in pairs]).tolist()

    def best_slots(self, index: int, length: int) -> Tensor:
        best = self.attention[index].topk(self.kept_counts[index]).indices
        new = torch.arange(self.seqlens[index], length, device=best.device)
        return torch.cat([self.text_slots[index], self.vision_slots[index][best], new]).sort().values
