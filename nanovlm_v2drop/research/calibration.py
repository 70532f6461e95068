"""Which layers V2Drop should drop at in a model: what a few prompts show, and the layers that follow from it.

    python train_free_eval.py --calibrate

V2Drop ranks by the change of one layer, so a layer suits it where the next layer would rank alike, and where the answer does
not need what leaves. Both are measured here on the dense model's own answers; no ground truth is read. The change of an answer
is the Kullback-Leibler divergence from the dense model's next-token distribution to that with dropping, in nats, as a mean over
the tokens of the dense model's answer.

Shapes: B prompts of a packed batch, N tokens of the longest answer, V vocabulary.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random as Dice
from statistics import fmean

import torch
from torch import Tensor

from ..dropping import DropSchedule, PrefillState, Random, TokenDropper, V2Drop
from ..dropping.budget import Budget, Shape, for_batch, shapes_of
from ..dropping.schedule import OutOfReach, layers_at_depths
from ..inference import NothingDropped, decode_tokens, decode_until, padded_answers, prefill, teacher_forced
from ..loading.zoo import VisionLanguageModel
from ..models.decoder import Decoder
from ..models.vlm import PackedInputs
from ..processing.prompts import Request
from .theory import kl_divergence, mean_interval, spearman, top_overlap

ANSWER_TOKENS = 8  # of the dense model's answer; later tokens follow from these more than from the picture
ROUNDS = 3  # of the search; it ends earlier where nothing improves
STABLE = 0.8  # rank correlation with the next layer from which on a ranking counts as stable
Layers = tuple[int, ...]


@dataclass(frozen=True)
class Prompts:
    """A packed batch of prompts with the dense model's answers (B, N) and log-probabilities (B, N, V).

    `counted` (B, N): the tokens that belong to an answer; shorter answers end with repetitions.
    """

    packed: PackedInputs
    shapes: Sequence[Shape]
    answers: Tensor
    counted: Tensor
    dense: Tensor


@dataclass(frozen=True)
class LayerRow:
    """What the prompts show at one layer, as means over the prompts.

    `correlation` and `overlap`: Spearman's rank correlation of the variations at this layer with those at the next one, and the
    part of the highest share that both have; None at the last layer. `by_variation`, `at_random`, `none_kept`: the change of
    the answer where tokens leave at this layer only, down to that share by either ranking, or all of them.
    """

    layer: int
    correlation: float | None
    overlap: float | None
    by_variation: float
    at_random: float
    none_kept: float


@dataclass(frozen=True)
class Proposal:
    """Drop layers for one budget, and the changes of the answers with them and with the depth rule's, on other prompts.

    `measured`: how many schedules were tried in the search.
    """

    budget: Budget
    layers: Layers
    rule: Layers
    changes: Sequence[float]
    changes_by_rule: Sequence[float]
    measured: int

    @property
    def gain_interval(self) -> list[float] | None:
        """95 % interval of the mean gain of the proposed layers over the rule's; None without two other prompts."""
        return mean_interval(gains(self.changes, self.changes_by_rule)) if len(self.changes) > 1 else None

    @property
    def recommended(self) -> Layers:
        """The proposed layers where they are better than the rule's on other prompts beyond doubt, else the rule's."""
        return self.layers if self.gain_interval is not None and self.gain_interval[0] > 0 else self.rule


class Variations(TokenDropper):
    """Drops nothing and reads the variations: for every layer and prompt the scores (n,) of V2Drop."""

    name = "variations"

    def __init__(self, num_layers: int) -> None:
        super().__init__(DropSchedule(dict.fromkeys(range(1, num_layers), 1.0)))
        self.seen: dict[int, list[Tensor]] = {}
        self.ranks = V2Drop(DropSchedule({}))

    def __call__(self, state: PrefillState) -> PrefillState:
        scores = self.ranks.score(state)
        self.seen[state.layer_idx] = [scores[rows] for rows in state.vision_rows()]
        return state


def dense_answers(vlm: VisionLanguageModel, requests: Sequence[Request]) -> Prompts:
    """The requests as one batch, answered greedily by the dense model; raises ValueError as `vlm.prepare`."""
    packed, decoder = vlm.prepare(requests), vlm.model.language_model
    tokens = decode_until(decode_tokens(decoder, prefill(decoder, packed)), vlm.config.eos_token_ids, ANSWER_TOKENS)
    answers = padded_answers(tokens, packed.inputs_embeds.device)
    lengths = torch.tensor([len(ids) for ids in tokens], device=answers.device)
    counted = torch.arange(answers.shape[1], device=answers.device) < lengths[:, None]
    shapes = shapes_of(packed, decoder.config.num_hidden_layers)
    return Prompts(packed, shapes, answers, counted, log_probabilities(decoder, packed, answers, None))


@torch.no_grad()
def log_probabilities(decoder: Decoder, packed: PackedInputs, answers: Tensor, dropper: TokenDropper | None) -> Tensor:
    """(B, N, V) of the next token before each token of the answers (B, N), with dropping."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingDropped)  # a prompt may have no picture, and a share may be 1
        prefilled = prefill(decoder, packed, dropper, max_new_tokens=answers.shape[1])
    return torch.stack(list(teacher_forced(decoder, prefilled, answers)), 1).float().log_softmax(-1)


def answer_changes(
    decoder: Decoder,
    batches: Sequence[Prompts],
    make: Callable[[DropSchedule], TokenDropper],
    solve: Callable[[Shape], DropSchedule],
) -> list[float]:
    """The change of the answer to each prompt, in nats a token; `solve` gives the schedule of a prompt."""
    changes: list[float] = []
    for batch in batches:
        dropper = make(for_batch([solve(shape) for shape in batch.shapes]))
        dropped = log_probabilities(decoder, batch.packed, batch.answers, dropper)
        divergences = kl_divergence(batch.dense, dropped)
        changes += ((divergences * batch.counted).sum(1) / batch.counted.sum(1)).tolist()
    return changes


def layer_rows(decoder: Decoder, batches: Sequence[Prompts], share: float) -> Iterator[LayerRow]:
    """One row for every layer at which V2Drop can act; `share` is what single drops keep, and how many count as the highest."""
    num_layers = decoder.config.num_hidden_layers
    seen = [variations for batch in batches for variations in prompt_variations(decoder, batch)]
    for layer in range(1, num_layers):
        pairs = [(scores[layer], scores[layer + 1]) for scores in seen if layer + 1 in scores]
        single, none = DropSchedule({layer: share}), DropSchedule({layer: 0.0}, minimum=0)
        yield LayerRow(
            layer,
            fmean(spearman(*pair) for pair in pairs) if pairs else None,
            fmean(top_overlap(*pair, share) for pair in pairs) if pairs else None,
            *(mean_change(decoder, batches, *drop) for drop in ((V2Drop, single), (Random, single), (V2Drop, none))),
        )


def mean_change(decoder: Decoder, batches: Sequence[Prompts], method: type[TokenDropper], schedule: DropSchedule) -> float:
    """The mean change of the answers with one schedule for all prompts."""
    return fmean(answer_changes(decoder, batches, method, lambda _: schedule))


def prompt_variations(decoder: Decoder, batch: Prompts) -> list[dict[int, Tensor]]:
    """For each prompt with a picture the variations (n,) of its vision tokens by layer."""
    watcher = Variations(decoder.config.num_hidden_layers)
    log_probabilities(decoder, batch.packed, batch.answers[:, :1], watcher)
    numbers = [index for index, shape in enumerate(batch.shapes) if shape.num_vision_tokens > 1]
    return [{layer: scores[index] for layer, scores in watcher.seen.items()} for index in numbers]


def stable_from(rows: Sequence[LayerRow]) -> int | None:
    """The first layer whose ranking the next layer repeats; None where no layer's is repeated."""
    return next((row.layer for row in rows if row.correlation is not None and row.correlation >= STABLE), None)


def propose(decoder: Decoder, batches: Sequence[Prompts], others: Sequence[Prompts], budget: Budget) -> Proposal:
    """Search drop layers on `batches`, from the depth rule's on, and check them on `others`.

    Raises OutOfReach where the rule cannot reach the budget.
    """
    num_layers = decoder.config.num_hidden_layers
    rule, tried = layers_at_depths(num_layers), dict[Layers, list[float] | None]()

    def measure(layers: Layers) -> list[float] | None:
        if layers not in tried:
            try:
                tried[layers] = changes_at(decoder, batches, budget, layers)
            except OutOfReach:
                tried[layers] = None
        return tried[layers]

    if measure(rule) is None:
        changes_at(decoder, batches, budget, rule)  # raises
    found = search(measure, rule, num_layers)
    ours, theirs = (changes_at(decoder, others, budget, layers) for layers in (found, rule))
    return Proposal(budget, found, rule, ours, theirs, sum(changes is not None for changes in tried.values()))


def changes_at(decoder: Decoder, batches: Sequence[Prompts], budget: Budget, layers: Layers) -> list[float]:
    """The change of each answer where V2Drop meets the budget with these drop layers; raises OutOfReach."""
    method = V2Drop.configured(layers="/".join(map(str, layers)))
    return answer_changes(decoder, batches, method, lambda shape: budget.schedule(method, shape))


def search(measure: Callable[[Layers], list[float] | None], start: Layers, num_layers: int) -> Layers:
    """The layers that coordinate descent finds, one drop layer at a time.

    `measure` gives one number for each prompt, lower is better, or None where the layers cannot reach the budget. A drop layer
    moves to where the mean is smallest, if the prompts agree that this is better than before: by the paired 95 % interval.
    """
    best = start
    for _ in range(ROUNDS):
        before = best
        for place in range(len(best)):
            measured = {
                layers: changes for layers in moved(best, place, num_layers) if (changes := measure(layers)) is not None
            }
            lowest = min(measured, key=lambda layers: fmean(measured[layers]))
            if mean_interval(gains(measured[lowest], measured[best]))[0] > 0:
                best = lowest
        if best == before:
            break
    return best


def moved(layers: Layers, place: int, num_layers: int) -> list[Layers]:
    """The same layers with one of them anywhere between its neighbours."""
    ends = (0, *layers, num_layers)
    return [(*layers[:place], layer, *layers[place + 1 :]) for layer in range(ends[place] + 1, ends[place + 2])]


def gains(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """How much lower ours is, prompt by prompt."""
    return [other - own for own, other in zip(ours, theirs, strict=True)]


def halves(requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """Prompts to search with and prompts to check with, drawn always alike; a single one is only searched with."""
    order = list(range(len(requests)))
    Dice(0).shuffle(order)  # kinds of questions may take turns
    middle = (len(order) + 1) // 2
    searching, checking = ([requests[index] for index in sorted(part)] for part in (order[:middle], order[middle:]))
    return searching, checking
