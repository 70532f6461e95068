"""Where tokens are dropped, how many stay, and the one accounting for all methods.

A count is the number of tokens that *enter* a layer: a drop point at layer l shortens the input of layer l itself. "192 tokens"
in the V2Drop paper is the mean of these counts over the layers.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import ClassVar

from ..models.config import TextConfig

PAPER_LAYERS, PAPER_VISION_TOKENS = 32, 576  # LLaVA-1.5-7B
PAPER_DEPTHS = (3 / 32, 17 / 32, 22 / 32)  # V2Drop drops at layers 3, 17 and 22 of LLaVA-1.5-7B's 32
LEANEST_RATIOS = (0.0, 0.3, 0.0)  # the solver starts from these shares and raises them; the later ones are the paper's


class DropSchedule(Mapping[int, float]):
    """Layer -> share of the current vision tokens that is kept; an empty schedule is the dense model.

    The kept count is truncated as in the authors' code, int(n * share), but is never below `minimum`. "Drop 100 %" in that code
    keeps one token (V2Drop.py, max(1, ...)); `minimum=0` drops all tokens.
    """

    shown_as: ClassVar[str] = ".4g"  # the format of a value

    def __init__(self, keep_ratios: Mapping[int, float], minimum: int = 1) -> None:
        """Raises ValueError for layers out of order or negative, ratios outside [0, 1], a negative minimum.

        Raises TypeError for anything else than numbers by whole numbers.
        """
        kinds = isinstance(keep_ratios, Mapping) and isinstance(minimum, Integral)
        if not kinds or not all(isinstance(one, Integral) and isinstance(two, Real) for one, two in keep_ratios.items()):
            way = "give layers and shares, such as DropSchedule({3: 0.5, 17: 0.3}, minimum=1)"
            raise TypeError(f"{keep_ratios!r} with minimum {minimum!r} is no schedule: {way}")
        layers = list(keep_ratios)
        if layers != sorted(layers) or any(layer < 0 for layer in layers):
            raise ValueError(f"drop layers {layers} must be in rising order and not negative")
        for layer, ratio in keep_ratios.items():
            if not 0.0 <= ratio <= 1.0:
                raise ValueError(f"keep ratio {ratio} at layer {layer} is outside [0, 1]")
        if minimum < 0:
            raise ValueError(f"minimum {minimum} must be 0 or more")
        self.keep_ratios, self.minimum = dict(keep_ratios), minimum

    def __getitem__(self, layer_idx: int) -> float:
        return self.keep_ratios[layer_idx]

    def __iter__(self) -> Iterator[int]:
        return iter(self.keep_ratios)

    def __len__(self) -> int:
        return len(self.keep_ratios)

    def __eq__(self, other: object) -> bool:
        """Whether both keep the same tokens. Mapping's own comparison would take the share 1.0 for the number 1."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        ratios = ", ".join(f"{layer}: {ratio:{self.shown_as}}" for layer, ratio in self.items())
        return f"{type(self).__name__}({{{ratios}}}{'' if self.minimum == 1 else f', minimum={self.minimum}'})"

    def check(self, num_layers: int, earliest: int = 0, latest: int | None = None) -> None:
        """Raise ValueError for a drop point that cannot act in a decoder of `num_layers`, or outside `earliest` to `latest`."""
        latest = num_layers - 1 if latest is None else latest
        if self and earliest >= num_layers:
            layers = "1 layer runs" if num_layers == 1 else f"{num_layers} layers run"
            raise ValueError(f"this method works from layer {earliest} on, but {layers}; run at least {earliest + 1}")
        for layer in self:
            if not earliest <= layer <= latest:
                raise ValueError(
                    f"drop layer {layer} cannot act: this method works at layers {earliest} to {latest} of this "
                    f"{num_layers}-layer decoder; DropSchedule.for_mean_tokens maps a schedule to any depth"
                )

    def mapped(
        self, num_layers: int, num_vision_tokens: int, from_layers: int = PAPER_LAYERS, frames: int = 1
    ) -> "DropSchedule":
        """This schedule for another decoder, at the same depths. It was made for `from_layers` layers and 576 vision tokens.

        `frames`: frames of the prompt's video, for schedules that count them. Raises ValueError where two drop points would
        fall on one layer.
        """
        layers = [layers_at_depths(num_layers, [layer / from_layers])[0] for layer in self]
        if len(set(layers)) < len(layers):
            raise ValueError(f"drop layers {list(self)} of {from_layers} fall on layers {layers} of {num_layers}: too shallow")
        return self.with_values(dict(zip(layers, self.values(), strict=True)), num_vision_tokens / PAPER_VISION_TOKENS)

    def mapping_note(self, num_layers: int, num_vision_tokens: int, from_layers: int = PAPER_LAYERS, frames: int = 1) -> str:
        """The origin of `mapped` for the same arguments, in words; empty where decoder and prompt are the same."""
        is_same = (num_layers, num_vision_tokens) == (from_layers, PAPER_VISION_TOKENS)
        return "" if is_same else f"mapped from {from_layers} layers and {PAPER_VISION_TOKENS} tokens"

    def with_values(self, keep_ratios: Mapping[int, float], scale: float) -> "DropSchedule":
        """A schedule of the same kind with other values, for pictures with `scale` times as many tokens."""
        return type(self)(keep_ratios, self.minimum)

    def of(self, index: int) -> "DropSchedule":
        """The schedule of one prompt of a batch."""
        return self

    def kept_count(self, layer_idx: int, current: int) -> int:
        """Vision tokens of one sequence that stay at a drop point which `current` tokens enter."""
        return max(min(self.minimum, current), int(current * self[layer_idx]))

    def kept_of(self, layer_idx: int, current: int, prompt: int) -> int:
        """The same, for schedules that also depend on the number of tokens in the prompt, before any drop."""
        return self.kept_count(layer_idx, current)

    def kept_counts(self, layer_idx: int, current: Sequence[int], prompts: Sequence[int]) -> tuple[int, ...]:
        """The same for every sequence of a packed batch."""
        return tuple(self.kept_of(layer_idx, *counts) for counts in zip(current, prompts, strict=True))

    def vision_tokens_per_layer(self, num_vision_tokens: int, num_layers: int) -> list[int]:
        """Vision tokens entering each layer."""
        self.check(num_layers)
        counts, current = [], num_vision_tokens
        for layer_idx in range(num_layers):
            current = self.kept_of(layer_idx, current, num_vision_tokens) if layer_idx in self else current
            counts.append(current)
        return counts

    def mean_tokens(self, num_vision_tokens: int, num_layers: int) -> float:
        """Mean number of vision tokens that enter a layer. Methods are compared at equal means."""
        return sum(self.vision_tokens_per_layer(num_vision_tokens, num_layers)) / num_layers

    def prefill_flops(self, config: TextConfig, num_text_tokens: int, num_vision_tokens: int) -> int:
        """Floating-point operations of the decoder's prefill of one prompt; a multiply-add counts as 2.

        Matrix products and causal attention are counted. Norms, rotary embedding and scoring are left out (below 0.1 %). Only
        the last row goes through the head.
        """
        query_size = config.num_attention_heads * config.head_dim
        weights = 2 * config.hidden_size * (query_size + config.num_key_value_heads * config.head_dim)
        weights += 3 * config.hidden_size * config.intermediate_size
        total = 2 * config.hidden_size * config.vocab_size
        for vision_tokens in self.vision_tokens_per_layer(num_vision_tokens, config.num_hidden_layers):
            tokens = num_text_tokens + vision_tokens
            total += 2 * tokens * weights + 2 * query_size * tokens * (tokens + 1)
        return total

    def kv_cache_bytes(
        self,
        config: TextConfig,
        num_text_tokens: int,
        num_vision_tokens: int,
        bytes_per_value: int,
        *,
        cut_cache: bool = False,
    ) -> int:
        """Size of the key/value cache after the prefill of one prompt; `cut_cache` as the option of a method."""
        counts = self.vision_tokens_per_layer(num_vision_tokens, config.num_hidden_layers)
        counts = [counts[-1]] * len(counts) if cut_cache else counts
        tokens = sum(counts) + num_text_tokens * config.num_hidden_layers
        return tokens * 2 * config.num_key_value_heads * config.head_dim * bytes_per_value

    @classmethod
    def for_mean_tokens(
        cls,
        target: float,
        num_vision_tokens: int,
        num_layers: int,
        *,
        layers: Sequence[int] | None = None,
        leanest: Sequence[float] = LEANEST_RATIOS,
        minimum: int = 1,
    ) -> "DropSchedule":
        """The schedule whose mean is within half a token of `target`, for a decoder of any depth.

        `layers` default to the paper's depths. The solver starts from the `leanest` shares and raises the share of the first
        drop point; once that keeps all tokens, it raises the second, and so on. Raises OutOfReach where no such schedule
        exists. A floor exists because the layers before the first drop point always see all tokens.
        """
        layers = layers_at_depths(num_layers) if layers is None else layers
        ratios = dict(zip(layers, (*leanest, *[leanest[-1]] * len(layers)), strict=False))
        leanest_schedule = cls(ratios, minimum)
        floor = leanest_schedule.mean_tokens(num_vision_tokens, num_layers)
        if not floor - 0.5 <= target <= num_vision_tokens:
            raise OutOfReach(
                f"a mean of {target:g} vision tokens is out of reach: with drop layers {list(layers)} of {num_layers} and "
                f"{num_vision_tokens} vision tokens it lies between {floor:.1f} and {num_vision_tokens}",
                leanest_schedule,
            )
        return cls(raise_ratios(cls, ratios, target, num_vision_tokens, num_layers, minimum), minimum)


class CountSchedule(DropSchedule):
    """Layer -> number of vision tokens that are kept, for settings that are published as numbers."""

    shown_as = ""

    def __init__(self, counts: Mapping[int, float], minimum: int = 1) -> None:
        """Raises ValueError as DropSchedule, and for a negative number."""
        super().__init__(dict.fromkeys(counts, 0.0), minimum)
        if any(count < 0 for count in counts.values()):
            raise ValueError(f"kept counts {list(counts.values())} must not be negative")
        self.keep_ratios = dict(counts)

    def kept_count(self, layer_idx: int, current: int) -> int:
        return min(current, max(self.minimum, int(self[layer_idx])))

    def with_values(self, keep_ratios: Mapping[int, float], scale: float) -> "CountSchedule":
        return type(self)({layer: round(count * scale) for layer, count in keep_ratios.items()}, self.minimum)


class PromptShares(DropSchedule):
    """Layer -> share of the vision tokens that the prompt had before any drop, for settings that are published so."""

    def kept_of(self, layer_idx: int, current: int, prompt: int) -> int:
        return min(current, max(self.minimum, int(prompt * self[layer_idx])))

    def kept_count(self, layer_idx: int, current: int) -> int:
        raise TypeError("shares of the prompt's tokens need the prompt's count; ask kept_of")

    def mapped(
        self, num_layers: int, num_vision_tokens: int, from_layers: int = PAPER_LAYERS, frames: int = 1
    ) -> "PromptShares":
        """As for DropSchedule. Drop points that would fall on one layer act on neighbouring layers."""
        layers: list[int] = []
        for layer in self:
            (place,) = layers_at_depths(num_layers, [layer / from_layers])
            layers.append(max(place, layers[-1] + 1) if layers else place)
        return type(self)(dict(zip(layers, self.values(), strict=True)), self.minimum)

    def mapping_note(self, num_layers: int, num_vision_tokens: int, from_layers: int = PAPER_LAYERS, frames: int = 1) -> str:
        return "" if num_layers == from_layers else f"mapped from {from_layers} layers"


class BatchSchedule(DropSchedule):
    """One schedule for each prompt of a packed batch, so that budgets can differ within the batch.

    Its layers are those of all its schedules. A prompt whose own schedule has no drop point at a layer keeps everything there.
    The single schedules count tokens and costs.
    """

    def __init__(self, schedules: Sequence[DropSchedule]) -> None:
        super().__init__(dict.fromkeys(sorted({layer for schedule in schedules for layer in schedule}), 1.0))
        self.schedules = tuple(schedules)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.schedules)})"

    def of(self, index: int) -> DropSchedule:
        return self.schedules[index]

    def kept_counts(self, layer_idx: int, current: Sequence[int], prompts: Sequence[int]) -> tuple[int, ...]:
        if len(current) != len(self.schedules):
            raise ValueError(f"{len(self.schedules)} schedules for a batch of {len(current)} prompts; give one for each")
        counts = zip(self.schedules, current, prompts, strict=True)
        return tuple(
            schedule.kept_of(layer_idx, count, prompt) if layer_idx in schedule else count for schedule, count, prompt in counts
        )

    def kept_count(self, layer_idx: int, current: int) -> int:
        raise TypeError("prompts of a batch keep different counts; ask one of `schedules`")


class OutOfReach(ValueError):
    """A mean that no schedule of a method reaches; `floor` is the schedule that comes nearest to it from above."""

    def __init__(self, message: str, floor: DropSchedule) -> None:
        super().__init__(message)
        self.floor = floor


def layers_at_depths(num_layers: int, depths: Sequence[float] = PAPER_DEPTHS) -> tuple[int, ...]:
    """Layer numbers at fractions of the depth, none twice. Only the depth 0 gives layer 0, which has no layer before it."""
    layers = {min(max(int(depth > 0), round(depth * num_layers)), num_layers - 1) for depth in depths}
    return tuple(sorted(layers))


def raise_ratios(
    schedule: type[DropSchedule],
    ratios: dict[int, float],
    target: float,
    num_vision_tokens: int,
    num_layers: int,
    minimum: int,
) -> dict[int, float]:
    """Raise the keep ratios, first drop point first, until the mean is as near to `target` as possible."""

    def mean(candidate: dict[int, float]) -> float:
        return schedule(candidate, minimum).mean_tokens(num_vision_tokens, num_layers)

    for layer in ratios:
        if mean({**ratios, layer: 1.0}) < target:
            ratios = {**ratios, layer: 1.0}
            continue
        entering = schedule(ratios, minimum).vision_tokens_per_layer(num_vision_tokens, num_layers)
        arriving = [num_vision_tokens, *entering][layer]
        # Each share is half a token above the wanted count, so that truncation gives exactly that count.
        candidates = [{**ratios, layer: min(1.0, (count + 0.5) / arriving)} for count in range(arriving + 1)]
        above = bisect_left(candidates, target, key=mean)
        return min(candidates[max(above - 1, 0) : above + 1], key=lambda candidate: abs(mean(candidate) - target))
    return ratios
