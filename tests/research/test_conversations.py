"""Conversations about scenes: what is drawn, what is counted, and what the differences are paired by."""

import numpy as np
import pytest

from nanovlm_v2drop import DROPPERS, load
from nanovlm_v2drop.demo.data import CLIPS, SCENES
from nanovlm_v2drop.dropping.budget import Budget
from nanovlm_v2drop.inference import HISTORIES
from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.research.conversations import (
    TURNS,
    Measured,
    dialogue,
    dialogues_for,
    histories_of,
    measure_all,
    paired,
    rows_of,
)

KEEP, CUT, RE_PREFILL = HISTORIES
BUDGET = Budget(tokens=48)


@pytest.fixture(scope="module")
def demo() -> VisionLanguageModel:
    return load("demo")


@pytest.mark.parametrize(("world", "media"), [(SCENES, (1, 0)), (CLIPS, (0, 8))])
def test_a_conversation_has_three_questions_of_three_kinds_and_is_the_same_whenever_it_is_drawn(world, media) -> None:
    for number in range(12):
        one, again = dialogue(world, number), dialogue(world, number)
        assert one.questions == again.questions
        assert len({question.kind for question in one.questions}) == TURNS
        assert (len(one.request.images), len(one.request.video or ())) == media
    assert dialogue(world, 0).questions != dialogue(world, 1).questions


def test_every_kind_of_question_comes_at_every_turn() -> None:
    drawn = [dialogue(SCENES, number).questions for number in range(60)]
    for turn in range(TURNS):
        assert {questions[turn].kind for questions in drawn} == set(SCENES.turn_weights)


def test_the_batch_changes_no_answer_and_no_count(demo: VisionLanguageModel) -> None:
    methods = [None, DROPPERS["v2drop"]]
    one, other = (list(measure_all(demo, methods, [BUDGET], dialogues_for("demo", 3), batch_size=size)) for size in (1, 2))
    assert [row.history for row in one] == [KEEP, RE_PREFILL, *HISTORIES]
    for own, same in zip(one, other, strict=True):
        assert np.array_equal(own.correct, same.correct)
        assert (own.prefilled_tokens, own.cache_bytes) == (same.prefilled_tokens, same.cache_bytes)


def test_dense_answers_are_the_same_with_every_history_and_the_kept_cache_costs_less(demo: VisionLanguageModel) -> None:
    for forget in (False, True):
        kept, again = measure_all(demo, [None], [], dialogues_for("demo", 4), batch_size=4, forget=forget)
        assert np.array_equal(kept.correct, again.correct)
        assert kept.correct[:, 0].mean() > 0.8
        assert kept.prefilled_tokens < 40 < 2 * 144 < again.prefilled_tokens
        assert kept.cache_bytes == again.cache_bytes


def test_only_what_differs_is_measured() -> None:
    assert histories_of(None) == (KEEP, RE_PREFILL)
    assert histories_of(DROPPERS["v2drop"]) == HISTORIES
    for name in ("divprune", "sparsevlm", "tome"):  # before the decoder; averages
        assert histories_of(DROPPERS[name]) == (KEEP, RE_PREFILL)
    assert histories_of(DROPPERS["v2drop"].configured(cut_cache=True)) == (KEEP, RE_PREFILL)


def test_a_budget_below_the_floor_of_a_method_is_left_out(demo: VisionLanguageModel) -> None:
    budgets = [Budget(tokens=3), BUDGET]
    rows = list(measure_all(demo, [DROPPERS["v2drop"]], budgets, dialogues_for("demo", 2), batch_size=2))
    assert [row.budget for row in rows] == [BUDGET] * 3


def test_a_model_that_is_no_demo_has_no_conversations() -> None:
    with pytest.raises(ValueError, match="drawn for demo and demo-video, not for llava"):
        dialogues_for("llava-1.5-7b", 2)


def test_differences_are_paired_by_conversation() -> None:
    right = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 0, 0]], dtype=bool)
    wrong = right.copy()
    wrong[:, 2] = False
    rows = rows_of([
        Measured("dense", None, RE_PREFILL, right, 300, 9.0, 4e6),
        Measured("v2drop", BUDGET, KEEP, wrong, 20, 1.0, 2e6),
        Measured("v2drop", BUDGET, RE_PREFILL, right, 300, 5.0, 2e6),
    ])  # fmt: skip
    assert [row["accuracy"] for row in rows] == [[75, 50, 50], [75, 50, 0], [75, 50, 50]]
    assert rows[1]["to_re_prefill"] == rows[1]["to_dense"] == paired(wrong[:, 1:].mean(1), right[:, 1:].mean(1))
    assert rows[1]["to_re_prefill"][0] == -25
    assert rows[2]["to_dense"] == (0, [0, 0])
    assert rows[0]["to_dense"] is rows[0]["to_re_prefill"] is rows[2]["to_re_prefill"] is None
