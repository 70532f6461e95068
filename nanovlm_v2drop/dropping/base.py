"""The seam between prefill and a dropping method: the common part of all methods.

Shapes: T tokens of all sequences packed, D hidden_size.
"""

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..models.decoder import ModuleOutputs
from ..models.kv_cache import DecodePruning
from .schedule import LEANEST_RATIOS, PAPER_DEPTHS, PAPER_LAYERS, DropSchedule, layers_at_depths
from .state import MERGED as MERGED
from .state import PrefillState as PrefillState


class Published(NamedTuple):
    """A setting of the authors' released code. Counts are for the 576 vision tokens of LLaVA-1.5-7B."""

    schedule: DropSchedule
    options: Mapping[str, Any] = MappingProxyType({})  # further arguments of the method
    num_layers: int = PAPER_LAYERS  # layers of the decoder that the schedule was made for


class NotANumber(RuntimeError):
    """A method gave a vision token the score NaN; the message names the method."""


class TokenDropper:
    """A dropping method: the schedule, the top-k of each sequence, the return to reading order. Text never leaves.

    A method overrides `score`. A method that does not rank overrides `select`, and one that changes kept rows overrides
    `compress`.
    """

    name: str
    published: ClassVar[Mapping[str, Published]] = {}  # `official` takes the first by default
    earliest_layer: ClassVar[int] = 0
    latest_layer: ClassVar[int | None] = None
    reads_attention: ClassVar[bool] = False  # needs queries and keys of the layer before each drop point
    renumbers: bool = False  # closes the gaps in the position ids
    merges: bool = False  # averages tokens or makes new ones, so kept rows are not rows of the prompt
    seeded: ClassVar[bool] = False  # draws at random: takes `seed`
    depths: ClassVar[tuple[float, ...]] = PAPER_DEPTHS  # where it drops, as shares of the decoder's layers
    layers: ClassVar[tuple[int, ...] | None] = None  # where it drops in place of `depths`; set by the option `layers`
    leanest: ClassVar[tuple[float, ...]] = LEANEST_RATIOS  # the smallest shares kept there; see DropSchedule.for_mean_tokens
    minimum: ClassVar[int] = 1
    cut_cache: bool = False  # the default of the option

    def __init__(self, schedule: DropSchedule, *, cut_cache: bool | None = None) -> None:
        """`cut_cache`: after a drop, the caches of earlier layers lose the dropped rows too, so decoded tokens never see them.

        Raises TypeError for a schedule of another type, such as a number or a dictionary, and ValueError for `cut_cache` with a
        method that averages tokens inside the decoder: caches of earlier layers have no row for an average.
        """
        if not isinstance(schedule, DropSchedule):
            raise TypeError(
                f"{type(self).__name__} takes a DropSchedule, not {schedule!r}: DropSchedule({{3: 0.5}}) keeps half of the "
                "vision tokens from layer 3 on, and schedule_for(...) finds the schedule of a mean number of tokens"
            )
        self.schedule = schedule
        self.cut_cache = self.cut_cache if cut_cache is None else cut_cache
        self.check_cut(self.cut_cache)

    @property
    def layers_read(self) -> frozenset[int]:
        """The layers whose queries and keys it reads: the layer before each drop point, if it reads attention."""
        return frozenset(layer - 1 for layer in self.schedule) if self.reads_attention else frozenset()

    @property
    def layers_observed(self) -> frozenset[int]:
        """The layers that show it their module outputs; see `observe`."""
        return frozenset()

    @property
    def acts(self) -> str:
        """Where tokens leave: before the decoder, in it, or both, by the drop points; and while decoding."""
        places = [place for place, found in (("before", 0 in self.schedule), ("in", any(self.schedule))) if found]
        return " and ".join(places) + " the decoder" * bool(places) + ", while decoding" * self.prunes_while_decoding()

    @classmethod
    def prunes_while_decoding(cls) -> bool:
        """Whether it may hide cache slots from decoded tokens; see `decode_pruning`."""
        return cls.decode_pruning is not TokenDropper.decode_pruning

    @classmethod
    def official(cls, setting: str | None = None, **options: Any) -> Self:
        """The method as in its authors' released code. `setting` is a name in `published`; None means the first.

        `options` are the method's own and replace those of the setting.
        """
        if not cls.published:
            raise NotImplementedError(f"{cls.__name__} has no released code to follow; give it a DropSchedule")
        if setting is not None and setting not in cls.published:
            raise ValueError(f"{cls.name} has no published setting {setting!r}; it has: {', '.join(cls.published)}")
        schedule, published, _ = cls.published[setting or next(iter(cls.published))]
        return cls(schedule, **{**published, **options})

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """The options that its constructor takes besides the schedule, and those of `configured`, with their defaults.

        `layers` is one of them unless the method chooses its layers by the budget.
        """
        defaults: dict[str, Any] = {"cut_cache": False}
        if cls.schedule_for.__func__ is TokenDropper.schedule_for.__func__:  # type: ignore[attr-defined]
            defaults["layers"] = None
        for ancestor in (item for item in cls.__mro__[:-1] if "__init__" in vars(item)):
            parameters = list(inspect.signature(vars(ancestor)["__init__"]).parameters.values())[2:]
            own = {each.name: each.default for each in parameters if each.kind is not each.VAR_KEYWORD}
            defaults = {**own, **defaults}
            if len(own) == len(parameters):  # it passes no further options to its parent
                break
        return defaults

    @classmethod
    def configured(cls, **options: Any) -> type[Self]:
        """The method with some options fixed, as a class with the name "method:option=value", for tables and `Chain.of`.

        `layers` are where it drops at a budget, such as "3/16/22", or those of a setting in `published`, by its name.
        Raises ValueError for an unknown option, and for a value of another type than the default.
        """
        defaults = cls.option_defaults()
        for option, value in options.items():
            if option not in defaults:
                raise ValueError(f"{cls.name} has no option {option}; it has: {', '.join(sorted(defaults))}")
            if not has_type_of(value, defaults[option]):
                raise ValueError(f"{cls.name}: {option} must be a value like {defaults[option]}, not {value!r}")

        def fixed(self: Any, schedule: DropSchedule, **more: Any) -> None:
            cls.__init__(self, schedule, **{**given, **more})  # type: ignore[misc]

        name = ":".join([cls.name, *(f"{option}={value}" for option, value in options.items())])
        given = {option: value for option, value in options.items() if option not in ("cut_cache", "layers")}
        published = {
            setting: one._replace(options={**{name: one.options[name] for name in one.options if name not in options}, **given})
            for setting, one in cls.published.items()
        }
        places = {} if options.get("layers") is None else places_of(cls, options["layers"])
        return type(cls.__name__, (cls,), {
            "name": name, "published": published, "cut_cache": options.get("cut_cache", cls.cut_cache), **places,
            "__init__": fixed, "__module__": cls.__module__,
        })  # fmt: skip

    @classmethod
    def schedule_for(
        cls, mean_tokens: float, num_vision_tokens: int, num_layers: int, frames: int = 1
    ) -> DropSchedule:
        """The schedule for a mean number of vision tokens a layer. Raises OutOfReach with the method's floor.

        `frames`: frames of the prompt's video, for methods that keep whole frames.
        """
        layers = cls.layers or layers_at_depths(num_layers, cls.depths)
        return DropSchedule.for_mean_tokens(
            mean_tokens, num_vision_tokens, num_layers, layers=layers, leanest=cls.leanest, minimum=cls.minimum
        )

    def check_cut(self, cut_cache: bool) -> None:
        """Raise ValueError where earlier caches cannot be cut to the rows that this method leaves."""
        if cut_cache and self.merges and self.latest_layer != 0:
            raise ValueError(f"{self.name} averages tokens, which earlier caches do not hold: use it without cut_cache")

    def check(self, num_layers: int) -> None:
        """Raise ValueError for a drop point that cannot act in a decoder of `num_layers`."""
        self.schedule.check(num_layers, self.earliest_layer, self.latest_layer)

    def score(self, state: PrefillState) -> Tensor:
        """(T,) one number a token; higher numbers are kept. The numbers of text tokens are ignored."""
        raise NotImplementedError(f"{type(self).__name__} must have a score, or a select or compress of its own")

    def begin(self, state: PrefillState) -> PrefillState:
        """Read the input of layer 0, before any drop. May set `marks`: one number a row, which follows its row."""
        return state

    def observe(self, state: PrefillState, outputs: ModuleOutputs) -> None:
        """Read the module outputs of a layer in `layers_observed`, while it runs. May set `state.marks`."""

    def __call__(self, state: PrefillState) -> PrefillState:
        """The state after this drop point. Where nothing leaves, it is the same object."""
        counts = self.kept_counts(state)
        if counts == state.vision_counts:
            return state
        after = self.compress(state, counts)
        changed = [before != left for before, left in zip(state.vision_counts, counts, strict=True)]
        return after.renumbered(changed) if self.renumbers else after

    def kept_counts(self, state: PrefillState) -> tuple[int, ...]:
        """Vision tokens of each sequence that stay at this drop point."""
        return self.schedule.kept_counts(state.layer_idx, state.vision_counts, state.prompt_vision_counts)

    def compress(self, state: PrefillState, vision_counts: Sequence[int]) -> PrefillState:
        """The state with `vision_counts` vision tokens in each sequence."""
        return state.take(self.select(state, vision_counts), vision_counts)

    def select(self, state: PrefillState, vision_counts: Sequence[int]) -> Tensor:
        """(T',) rows that stay, in reading order: all text, and the `vision_counts` best vision tokens of each sequence."""
        scores, kept = self.finite_scores(state).masked_fill(~state.vision_mask, torch.inf), []
        for (start, end), before, after in zip(state.spans, state.vision_counts, vision_counts, strict=True):
            best = scores[start:end].topk(end - start - before + after, sorted=False).indices
            kept.append(best.sort().values + start)
        return torch.cat(kept)

    def finite_scores(self, state: PrefillState) -> Tensor:
        """(T,) finite float32 scores, so that no vision token can push a text token out of the top k.

        Raises ValueError for a wrong shape, and NotANumber for NaN at a vision token (on a GPU as `require`).
        """
        scores: Any = self.score(state)
        if not isinstance(scores, Tensor) or scores.shape != state.vision_mask.shape:
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            wanted = tuple(state.vision_mask.shape)
            raise ValueError(f"the score of {self.name} must be one number for each token, text too: {wanted}, not {found}")
        check_numbers(self.name, scores.masked_fill(~state.vision_mask, 0.0))
        return scores.float().nan_to_num()

    def decode_pruning(self, state: PrefillState) -> DecodePruning | None:
        """The function that chooses the cache slots of a decoded token, from the end of prefill; None for all slots."""
        return None


def places_of(method: type[TokenDropper], layers: Any) -> dict[str, Any]:
    """The attributes that the option `layers` replaces: a published setting stands for depths, numbers for themselves.

    Its published settings are no longer those of the method. Raises ValueError for anything else.
    """
    if layers in method.published:
        setting = method.published[layers]
        return {"published": {}, "depths": tuple(layer / setting.num_layers for layer in setting.schedule)}
    numbers = str(layers).split("/")
    found = tuple(int(number) for number in numbers if number.isascii() and number.isdecimal())
    if len(found) < len(numbers) or list(found) != sorted(set(found)):
        known = f", or one of {', '.join(method.published)}" if method.published else ""
        raise ValueError(f"{method.name}: layers must be rising numbers such as 3/16/22{known}, not {layers!r}")
    latest = found[-1] if method.latest_layer is None else method.latest_layer
    if not method.earliest_layer <= found[0] <= found[-1] <= latest:
        ends = f"from layer {method.earliest_layer} on" if method.latest_layer is None else f"at layer {latest} only"
        raise ValueError(f"{method.name}: layers {layers} cannot act: this method works {ends}")
    return {"published": {}, "layers": found}


def has_type_of(value: Any, default: Any) -> bool:
    """Whether an option's value has the type of its default. Options without a default, or with None, take any value."""
    if default is None or default is inspect.Parameter.empty:
        return True
    wanted = (int, float) if type(default) is float else type(default)
    return isinstance(value, wanted) and isinstance(value, bool) == isinstance(default, bool)


def check_numbers(name: str, ranked: Tensor) -> None:
    """Raise NotANumber if the numbers that rank vision tokens hold NaN; on a GPU as `require`."""
    message = f"{name} scored a vision token NaN: it divides by zero, or activations overflow"
    require(ranked.isnan().any().logical_not(), NotANumber, message, "try --dtype float32, and if it stays, ")


def require(holds: Tensor, error: type[Exception], message: str, remedy: str = "") -> None:
    """Raise `error` where `holds` (one boolean) is false.

    A GPU is not waited for: it prints the message and the way out, and RuntimeError follows at the next wait.
    """
    if holds.device.type == "cpu":
        if not holds:
            raise error(message)
        return
    torch._assert_async(holds, f"{message}; {remedy}run it again with --device cpu, which stops at the line of the error")
