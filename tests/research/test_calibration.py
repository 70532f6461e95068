"""Calibration of drop layers: what it measures, what its search finds, and that its check is on other prompts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import masked_forward

from nanovlm_v2drop import DropSchedule, Request, V2Drop, load, prefill
from nanovlm_v2drop.dropping.budget import Budget
from nanovlm_v2drop.dropping.schedule import OutOfReach
from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.research import calibration
from nanovlm_v2drop.research.calibration import (
    LayerRow,
    Prompts,
    Proposal,
    answer_changes,
    changes_at,
    dense_answers,
    halves,
    layer_rows,
    moved,
    propose,
    search,
    stable_from,
)
from nanovlm_v2drop.research.theory import drop_point, spearman, top_overlap

HALF = Budget(retain=0.5)


def noise(number: int) -> Request:
    pixels = np.random.default_rng(number).integers(0, 256, (42, 42, 3), dtype=np.uint8)
    return Request("What colour is the digit?" if number % 2 else "yes?", images=[Image.fromarray(pixels)])


REQUESTS, OTHERS = ([noise(number) for number in numbers] for numbers in (range(4), range(4, 8)))


@pytest.fixture(scope="module")
def vlm(tiny_llava_folder: Path) -> VisionLanguageModel:
    """Six layers with random weights, 36 vision tokens a picture; the depth rule drops at 1, 3 and 4."""
    return load(tiny_llava_folder)


@pytest.fixture(scope="module")
def prompts(vlm: VisionLanguageModel) -> Prompts:
    return dense_answers(vlm, REQUESTS)


# What is measured


def test_the_change_of_an_answer_is_that_of_a_full_forward_with_the_dropped_tokens_hidden(
    vlm: VisionLanguageModel, prompts: Prompts
) -> None:
    decoder, schedule = vlm.model.language_model, DropSchedule({2: 0.3, 4: 0.1})
    found = answer_changes(decoder, [prompts], V2Drop, lambda shape: schedule)
    for index, request in enumerate(REQUESTS):
        packed = vlm.prepare([request])
        answer = prompts.answers[index][prompts.counted[index]].tolist()
        assert answer[-1] in vlm.config.eos_token_ids or len(answer) == calibration.ANSWER_TOKENS
        kept = prefill(decoder, packed, V2Drop(schedule)).kept
        with torch.no_grad():
            dense, dropped = (
                masked_forward(decoder, packed, stages, answer[:-1])[-len(answer) :].log_softmax(-1) for stages in ((), kept)
            )
        assert dense.argmax(-1).tolist() == answer
        expected = (dense.exp() * (dense - dropped)).sum(-1).mean()
        assert found[index] == pytest.approx(expected.item(), abs=1e-4)


def test_a_batch_is_measured_as_its_prompts_one_by_one(vlm: VisionLanguageModel, prompts: Prompts) -> None:
    decoder = vlm.model.language_model
    alone = [dense_answers(vlm, [request]) for request in REQUESTS]
    together, apart = (changes_at(decoder, batches, HALF, (2, 3, 5)) for batches in ([prompts], alone))
    assert together == pytest.approx(apart, abs=1e-4)


def test_an_answer_without_dropping_does_not_change(vlm: VisionLanguageModel, prompts: Prompts) -> None:
    kept = answer_changes(vlm.model.language_model, [prompts], V2Drop, lambda shape: DropSchedule({3: 1.0}))
    assert kept == pytest.approx([0.0] * 4, abs=1e-6)


def test_every_layer_has_a_row_whose_agreement_is_that_of_the_variations(vlm: VisionLanguageModel, prompts: Prompts) -> None:
    decoder, share = vlm.model.language_model, 0.25
    rows = list(layer_rows(decoder, [prompts], share))
    assert [row.layer for row in rows] == [1, 2, 3, 4, 5]
    points = [[drop_point(decoder, vlm.prepare([request]), layer).variations for layer in (3, 4)] for request in REQUESTS]
    assert rows[2].correlation == pytest.approx(sum(spearman(*pair) for pair in points) / 4, abs=1e-3)
    assert rows[2].overlap == pytest.approx(sum(top_overlap(*pair, share) for pair in points) / 4, abs=0.03)
    assert (rows[-1].correlation, rows[-1].overlap) == (None, None)
    single, none = DropSchedule({3: share}), DropSchedule({3: 0.0}, minimum=0)
    for found, schedule in ((rows[2].by_variation, single), (rows[2].none_kept, none)):
        changes = answer_changes(decoder, [prompts], V2Drop, lambda shape, schedule=schedule: schedule)
        assert found == pytest.approx(sum(changes) / 4)
    assert rows[0].none_kept > rows[-1].none_kept > 0


def test_a_ranking_is_stable_from_the_first_layer_that_the_next_one_repeats() -> None:
    def row(layer: int, correlation: float | None) -> LayerRow:
        return LayerRow(layer, correlation, 0.5, 0.0, 0.0, 0.0)

    assert stable_from([row(1, 0.3), row(2, 0.79), row(3, 0.8), row(4, 0.2), row(5, None)]) == 3
    assert stable_from([row(1, 0.3), row(2, None)]) is None


# The search


def costs(target: tuple[int, ...]) -> Callable[[tuple[int, ...]], list[float]]:
    """Changes of three prompts that grow with the distance from `target`."""

    def measure(layers: tuple[int, ...]) -> list[float]:
        distance = sum(abs(layer - wanted) for layer, wanted in zip(layers, target, strict=True))
        return [distance * scale for scale in (0.9, 1.0, 1.1)]

    return measure


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 31), min_size=1, max_size=3, unique=True).map(sorted))
def test_the_search_moves_every_drop_layer_to_where_all_prompts_are_better(target: list[int]) -> None:
    start = (3, 17, 22)[: len(target)]
    found = search(costs(tuple(target)), start, 32)
    assert list(found) == sorted(set(found))
    after, before = (sum(costs(tuple(target))(layers)) for layers in (found, start))
    assert after <= before
    if all(low < wanted < high for low, wanted, high in zip((0, *target), target, (*start[1:], 32), strict=False)):
        assert list(found) == target


def test_the_search_stays_where_the_prompts_disagree() -> None:
    def measure(layers: tuple[int, ...]) -> list[float]:
        return [1.0, 1.0, 1.0, 1.0] if layers == (1, 6, 8) else [0.0, 1.1, 1.2, 0.9]

    assert search(measure, (1, 6, 8), 12) == (1, 6, 8)


def test_layers_that_cannot_reach_the_budget_are_never_found() -> None:
    def measure(layers: tuple[int, ...]) -> list[float] | None:
        return None if layers[0] > 2 else [10.0 - layers[0], 10.0 - layers[0]]

    assert search(measure, (1, 6), 12) == (2, 6)


def test_a_drop_layer_moves_between_its_neighbours_only() -> None:
    assert moved((1, 6, 8), 0, 12) == [(layer, 6, 8) for layer in range(1, 6)]
    assert moved((1, 6, 8), 1, 12) == [(1, layer, 8) for layer in range(2, 8)]
    assert moved((1, 6, 8), 2, 12) == [(1, 6, layer) for layer in range(7, 12)]


def test_prompts_to_check_with_are_others_and_of_all_kinds() -> None:
    requests = [noise(number) for number in range(24)]
    searching, checking = halves(requests)
    assert (len(searching), len(checking)) == (12, 12)
    assert {id(one) for one in searching} | {id(one) for one in checking} == set(map(id, requests))
    assert [requests.index(one) for one in searching] != list(range(0, 24, 2))
    assert halves(requests[:1]) == (requests[:1], [])


# The proposal


def test_a_proposal_is_checked_with_the_other_prompts(vlm: VisionLanguageModel, prompts: Prompts) -> None:
    others = dense_answers(vlm, OTHERS)
    decoder = vlm.model.language_model
    proposal = propose(decoder, [prompts], [others], HALF)
    assert proposal.rule == (1, 3, 4)
    assert proposal.changes == changes_at(decoder, [others], HALF, proposal.layers)
    assert proposal.changes_by_rule == changes_at(decoder, [others], HALF, proposal.rule)
    assert proposal.measured >= 3
    ours, theirs = (sum(changes_at(decoder, [prompts], HALF, layers)) for layers in (proposal.layers, proposal.rule))
    assert ours <= theirs


def test_proposed_layers_are_recommended_only_where_other_prompts_agree() -> None:
    def proposal(changes: list[float], by_rule: list[float]) -> Proposal:
        return Proposal(HALF, (2, 5, 7), (1, 6, 8), changes, by_rule, 9)

    assert proposal([0.1, 0.2, 0.1], [0.5, 0.6, 0.4]).recommended == (2, 5, 7)
    assert proposal([0.1, 0.9, 0.1], [0.5, 0.2, 0.2]).recommended == (1, 6, 8)
    assert proposal([], []).recommended == proposal([0.1], [0.5]).recommended == (1, 6, 8)


def test_a_budget_that_the_rule_cannot_reach_is_refused(vlm: VisionLanguageModel, prompts: Prompts) -> None:
    with pytest.raises(OutOfReach, match=r"out of reach: with drop layers \[1, 3, 4\] of 6"):
        propose(vlm.model.language_model, [prompts], [], Budget(retain=0.01))
