"""Which rows a table has, and that they cost what was asked for."""

import warnings

import pytest
from tiny import one_prompt, pack_together, tiny_decoder, tiny_prompts

from nanovlm_v2drop.dropping import DROPPERS, TokenDropper
from nanovlm_v2drop.dropping.budget import Budget, Shape
from nanovlm_v2drop.evaluation.plans import equal_budget_plans, makers, official_plans
from nanovlm_v2drop.inference import prefill

DEMO, LLAVA_7B = Shape(144, 12), Shape(576, 32)


def mean_tokens(plan, shape):
    return plan.schedule_for(shape).mean_tokens(shape.num_vision_tokens, shape.num_layers)


def tokens(*counts):
    return [Budget(tokens=count) for count in counts]


def test_dense_is_planned_once_every_other_method_at_every_budget_and_a_drawing_one_with_every_seed():
    plans = equal_budget_plans(["dense", "v2drop", "random", "v2drop"], tokens(48, 16, 48), DEMO, seeds=[3, 4])
    assert [plan.key for plan in plans] == [
        "dense", "v2drop 48", "random 48 seed 3", "random 48 seed 4", "v2drop 16", "random 16 seed 3", "random 16 seed 4",
    ]  # fmt: skip
    assert [plan.row for plan in plans[2:4]] == ["random 48"] * 2
    assert mean_tokens(plans[0], DEMO) == 144
    assert [plan.dropper.seed for plan in plans[2:4]] == [plan.seed for plan in plans[2:4]] == [3, 4]


@pytest.mark.parametrize(("shape", "budgets"), [(DEMO, [48, 32, 16]), (LLAVA_7B, [192, 128, 64])])
def test_all_methods_meet_a_budget_within_one_token_or_say_their_floor(shape, budgets):
    plans = equal_budget_plans(["all"], tokens(*budgets), shape, seeds=[0])
    assert {plan.method for plan in plans} == {"dense", *DROPPERS}
    for plan in plans[1:]:
        plan.schedule.check(shape.num_layers, plan.dropper.earliest_layer, plan.dropper.latest_layer)
        if note := plan.note_on([shape]):
            assert note.startswith(f"cannot go below {mean_tokens(plan, shape):.1f} mean tokens")
            assert mean_tokens(plan, shape) > plan.asked_tokens + 0.5
        else:
            assert mean_tokens(plan, shape) == pytest.approx(plan.asked_tokens, abs=1)
    at_budget = {(plan.method, plan.asked_tokens) for plan in plans if not plan.is_at_floor(shape)}
    for method in ("v2drop", "random", "random-grid", "fastv", "sparsevlm", "sparsevlm-plus", "dart", "visionzip", "tome"):
        assert {(method, budget) for budget in budgets} <= at_budget


def test_published_settings_cost_what_the_reference_says():
    """Mean vision tokens entering a layer at 576 tokens and 32 layers, worked out by hand from the released settings."""
    means = {plan.label: mean_tokens(plan, LLAVA_7B) for plan in official_plans(["all"], LLAVA_7B, seeds=[0])}
    wanted = {
        "v2drop released-code": 202.8, "v2drop paper-192": 193.75, "v2drop paper-128": 131.0, "v2drop paper-64": 66.7,
        "fastv K=2 R=50%": 306, "fastv K=3 R=50%": 315, "pdrop 8/16/24 lambda 0.5": 270,
        "sparsevlm 192": 206.5, "sparsevlm 128": 145.4, "sparsevlm 64": 82.3, "sparsevlm-plus 192": 206.8,
        "dart 192": 219.8, "dart 128": 159.8, "dart 64": 99.8, "visionzip 192": 192, "visionzip 128": 128, "visionzip 64": 64,
    }  # fmt: skip
    assert {name: means[name] for name in wanted} == pytest.approx(wanted, abs=0.06)


def test_published_settings_are_mapped_by_depth_and_share_and_say_so():
    plans = {plan.label: plan for plan in official_plans(["all"], DEMO, seeds=[0])}
    assert list(plans["fastv K=2 R=50%"].schedule) == [1]
    assert list(plans["pdrop 8/16/24 lambda 0.5"].schedule) == [3, 6, 9]
    assert plans["visionzip 64"].schedule.mean_tokens(144, 12) == 16
    assert plans["visionzip 64"].note == "mapped from 32 layers and 576 tokens"
    assert plans["v2drop released-qwen2-vl"].note == "mapped from 28 layers and 576 tokens"


def test_dycokes_settings_are_mapped_by_the_tokens_of_a_frame_and_say_so():
    """Three of eight frames stay whole by the released rule; the newline stays too."""
    (plan, *_), (own, *_), (picture, *_) = (
        official_plans(["dycoke"], shape, seeds=[0]) for shape in (Shape(289, 12, 8), Shape(6273, 28, 32), DEMO)
    )
    assert mean_tokens(plan, Shape(289, 12, 8)) == 3 * 36 + 5 * 10 + 1
    assert plan.note == "mapped from frames of 196 tokens"
    assert (mean_tokens(own, Shape(6273, 28, 32)), own.note) == (3098 + 1, "")
    assert (mean_tokens(picture, DEMO), picture.note) == (144, "for videos: drops nothing from a picture")


def test_the_setting_for_qwen2_vl_keeps_its_layers_on_28():
    plans = {plan.label: plan for plan in official_plans(["v2drop"], Shape(391, 28), seeds=[0])}
    assert dict(plans["v2drop released-qwen2-vl"].schedule) == {3: 0.25, 16: 0.05, 22: 0.0}


def test_the_papers_video_budgets_are_met_at_28_layers():
    for share in (0.25, 0.2, 0.15):
        (plan,) = equal_budget_plans(["v2drop"], [Budget(retain=share)], Shape(6273, 28, 32), seeds=[0])
        assert list(plan.schedule) == [3, 15, 19]
        assert plan.schedule.mean_tokens(6273, 28) == pytest.approx(share * 6273, abs=0.5)


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown method 'fastest'; choose from: dense, .*or give your own as FILE\.py:CLASS"):
        equal_budget_plans(["dense", "fastest"], tokens(48), DEMO, seeds=[0])


@pytest.mark.parametrize("budget", [2, 145])
def test_a_budget_that_no_method_reaches_is_refused(budget):
    with pytest.raises(ValueError, match=f"a mean of {budget} vision tokens is out of reach"):
        equal_budget_plans(["v2drop", "random"], tokens(budget), DEMO, seeds=[0])


def test_methods_that_reach_none_of_the_budgets_run_once_at_their_floors_where_floors_are_taken():
    """A picture of 64 tokens, 224 x 224 pixels, in the 28 layers of Qwen2-VL: three whole layers are 10.7 % already."""
    budgets = [Budget(retain=share) for share in (1 / 3, 1 / 9, 1 / 10)]
    with pytest.raises(ValueError, match=r"it lies between 7\.8 and 64"):
        equal_budget_plans(["dense", "v2drop"], budgets, Shape(64, 28, alike=False), seeds=[0])
    plans = equal_budget_plans(["dense", "v2drop"], budgets, Shape(64, 28, alike=False), seeds=[0], floors=True)
    assert [plan.row for plan in plans] == ["dense", "v2drop 33.33%", "v2drop 11.11%"]
    assert plans[2].note_on([plans[2].shape]) == "cannot go below 7.8 mean tokens: shown at its floor, once"


def test_a_users_method_that_asks_for_more_than_a_schedule_is_refused():
    class Needs(TokenDropper):
        name = "needs"

        def __init__(self, schedule, strength):
            super().__init__(schedule)

    with pytest.raises(ValueError, match=r"Needs is made with a schedule and nothing more: .*strength"):
        makers(Needs, [0])


# A schedule for every prompt


SIZES = [Shape(count, 28, alike=False) for count in (120, 391, 64, 1000, 777)]


@pytest.mark.parametrize("share", [0.5, 1 / 3, 0.2])
@pytest.mark.parametrize("method", [name for name in DROPPERS if name != "dycoke"])
def test_a_share_is_kept_of_every_prompt_whatever_its_size(method, share):
    plan = equal_budget_plans([method, "visionzip"], [Budget(retain=share)], SIZES[0], seeds=[0])[0]
    assert plan.row == f"{method} {100 * share:.4g}%"
    for shape in SIZES:
        asked = share * shape.num_vision_tokens
        if plan.is_at_floor(shape):
            assert mean_tokens(plan, shape) > asked
        else:
            assert mean_tokens(plan, shape) == pytest.approx(asked, abs=max(1, 0.005 * asked))
    assert bool(plan.note_on(SIZES)) == any(map(plan.is_at_floor, SIZES))
    if method in ("v2drop", "random", "visionzip", "tome"):
        assert not plan.note_on(SIZES)


def test_a_number_of_tokens_is_kept_of_every_prompt_that_has_as_many():
    (plan,) = equal_budget_plans(["v2drop"], tokens(100), SIZES[0], seeds=[0])
    assert [round(mean_tokens(plan, shape)) for shape in SIZES[:3]] == [100, 100, 64]
    assert [plan.is_at_floor(shape) for shape in SIZES] == [False, False, False, True, False]
    assert plan.note_on(SIZES).startswith("at its floor in 1 of 5 prompts, with ")
    assert plan.note_on(SIZES).endswith("mean tokens over all; 1 of 5 prompts have fewer vision tokens and keep all")
    assert mean_tokens(plan, Shape(0, 28)) == 0


def test_a_first_prompt_that_is_smaller_than_a_budget_is_no_error_where_others_are_larger():
    with pytest.raises(ValueError, match="a mean of 100 vision tokens is out of reach"):
        equal_budget_plans(["v2drop"], tokens(100), Shape(64, 28), seeds=[0])
    (plan,) = equal_budget_plans(["v2drop"], tokens(100), Shape(64, 28, alike=False), seeds=[0])
    assert mean_tokens(plan, SIZES[1]) == pytest.approx(100, abs=0.5)


def test_published_settings_are_mapped_to_every_prompt_by_its_own_size():
    plans = {plan.label: plan for plan in official_plans(["visionzip"], Shape(576, 32), seeds=[0])}
    assert [mean_tokens(plans["visionzip 64"], Shape(count, 32)) for count in (576, 1152, 288)] == [64, 128, 32]


@pytest.mark.parametrize("name", ["v2drop", "sparsevlm", "visionzip", "dart"])
def test_the_dropper_of_a_batch_keeps_what_each_prompt_alone_keeps(name):
    (plan,) = equal_budget_plans([name], [Budget(retain=0.4)], Shape(24, 6), seeds=[0])
    parts = tiny_prompts(((5, 24, 7), (3, 12, 4), (6, 0, 9)))
    schedule = plan.dropper_for(pack_together(parts), 6).schedule
    for index, part in enumerate(parts):
        assert schedule.of(index) == plan.dropper_for(part, 6).schedule
    alike = pack_together([parts[0], parts[0]])
    assert plan.dropper_for(alike, 6).schedule == plan.schedule  # no schedule of a batch where one does


def test_nothing_dropped_is_told_only_where_no_row_of_the_table_tells_it():
    (plan,) = equal_budget_plans(["v2drop"], tokens(12), Shape(12, 6), seeds=[0])
    with warnings.catch_warnings(record=True) as told, plan.answering():
        prefill(tiny_decoder(), one_prompt(3, 12, 4), plan.dropper)
    assert not told


def test_a_method_that_misses_its_budget_says_so():
    shape = Shape(144, 12)
    (plan,) = equal_budget_plans(["transprune+v2drop-plus"], [Budget(retain=0.2)], shape, [0])
    found = plan.schedule.mean_tokens(144, 12)
    assert found < 28.8 - 1
    assert plan.note_on([shape]) == f"has {found:.1f} mean tokens, not the 28.8 that were asked for"
