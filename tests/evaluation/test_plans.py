"""Which rows a table has, and that they cost what was asked for."""

from pathlib import Path

import pytest
from tiny_tasks import OWN_METHOD

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule, TokenDropper
from nanovlm_v2drop.evaluation.plans import Shape, equal_budget_plans, find_methods, make_droppers, official_plans

DEMO, LLAVA_7B = Shape(144, 12), Shape(576, 32)


def mean_tokens(plan, shape):
    return plan.schedule.mean_tokens(shape.num_vision_tokens, shape.num_layers)


def test_dense_is_planned_once_every_other_method_at_every_budget_and_a_drawing_one_with_every_seed():
    plans = equal_budget_plans(["dense", "v2drop", "random", "v2drop"], [48, 16, 48], DEMO, seeds=[3, 4])
    assert [plan.key for plan in plans] == [
        "dense", "v2drop 48", "random 48 seed 3", "random 48 seed 4", "v2drop 16", "random 16 seed 3", "random 16 seed 4",
    ]  # fmt: skip
    assert [plan.row for plan in plans[2:4]] == ["random 48"] * 2
    assert mean_tokens(plans[0], DEMO) == 144
    assert [plan.dropper.seed for plan in plans[2:4]] == [plan.seed for plan in plans[2:4]] == [3, 4]


@pytest.mark.parametrize(("shape", "budgets"), [(DEMO, [48, 32, 16]), (LLAVA_7B, [192, 128, 64])])
def test_all_methods_meet_a_budget_within_one_token_or_say_their_floor(shape, budgets):
    plans = equal_budget_plans(["all"], budgets, shape, seeds=[0])
    assert {plan.method for plan in plans} == {"dense", *DROPPERS}
    for plan in plans[1:]:
        plan.schedule.check(shape.num_layers, plan.dropper.earliest_layer, plan.dropper.latest_layer)
        if plan.note:
            assert plan.note.startswith(f"cannot go below {mean_tokens(plan, shape):.1f} mean tokens")
            assert mean_tokens(plan, shape) > plan.asked_tokens + 0.5
        else:
            assert mean_tokens(plan, shape) == pytest.approx(plan.asked_tokens, abs=1)
    at_budget = {(plan.method, plan.asked_tokens) for plan in plans if not plan.note}
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
        (plan,) = equal_budget_plans(["v2drop"], [share * 6273], Shape(6273, 28, 32), seeds=[0])
        assert list(plan.schedule) == [3, 15, 19]
        assert plan.schedule.mean_tokens(6273, 28) == pytest.approx(share * 6273, abs=0.5)


def test_a_users_own_file_gives_a_method(tmp_path: Path):
    file = tmp_path / "my_method.py"
    file.write_text(OWN_METHOD)
    (plan,) = equal_budget_plans([f"{file}:Own"], [48], DEMO, seeds=[0])
    assert (plan.method, plan.key) == ("own", "own 48")
    with pytest.raises(ValueError, match="own has no published setting; compare it with --accounting equal"):
        official_plans([f"{file}:Own"], DEMO, seeds=[0])
    with pytest.raises(ValueError, match="has no class Missing that is a TokenDropper"):
        find_methods([f"{file}:Missing"])
    with pytest.raises(ValueError, match=r"Half in .* chooses nothing: it must have a score, a select or a compress method"):
        find_methods([f"{file}:Half"])
    with pytest.raises(ValueError, match="there is no file"):
        find_methods([f"{tmp_path}/nowhere.py:Own"])


def test_a_users_method_needs_a_name_that_no_other_has(tmp_path: Path):
    for number in (1, 2):
        (tmp_path / f"own_{number}.py").write_text(OWN_METHOD)
    with pytest.raises(ValueError, match="are both called 'own': give each a name of its own"):
        find_methods([f"{tmp_path}/own_1.py:Own", f"{tmp_path}/own_2.py:Own"])
    for taken in ("dense", "v2drop"):
        (tmp_path / "own_1.py").write_text(OWN_METHOD.replace('"own"', f'"{taken}"'))
        with pytest.raises(ValueError, match=f"is called '{taken}' as another method is: give it a name of its own"):
            find_methods([f"{tmp_path}/own_1.py:Own"])
    (tmp_path / "own_1.py").write_text("from nanovlm_v2drop import V2Drop\n\nclass Own(V2Drop):\n    pass\n")
    with pytest.raises(ValueError, match="is called 'v2drop'"):
        find_methods([f"{tmp_path}/own_1.py:Own"])


@pytest.mark.parametrize(("text", "message"), [("class Own(:", "invalid syntax"), ("import nowhere", "No module named")])
def test_a_users_file_that_does_not_run_is_named(text, message, tmp_path: Path):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ValueError, match=rf"own\.py cannot be read: {message}"):
        find_methods([f"{tmp_path}/own.py:Own"])


def test_a_users_file_may_hold_dataclasses(tmp_path: Path):
    imports = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    settings = "@dataclass\nclass Settings:\n    power: int = 2\n"
    (tmp_path / "own.py").write_text(imports + settings + OWN_METHOD)
    (method,) = find_methods([f"{tmp_path}/own.py:Own"])
    assert method.name == "own"


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown method 'fastest'; choose from: dense, .*or give your own as FILE\.py:CLASS"):
        equal_budget_plans(["dense", "fastest"], [48], DEMO, seeds=[0])


@pytest.mark.parametrize("budget", [2, 145])
def test_a_budget_that_no_method_reaches_is_refused(budget):
    with pytest.raises(ValueError, match=f"a mean of {budget} vision tokens is out of reach"):
        equal_budget_plans(["v2drop", "random"], [budget], DEMO, seeds=[0])


def test_a_users_method_that_asks_for_more_than_a_schedule_is_refused():
    class Needs(TokenDropper):
        name = "needs"

        def __init__(self, schedule, strength):
            super().__init__(schedule)

    with pytest.raises(ValueError, match=r"Needs is made with a schedule and nothing more: .*strength"):
        make_droppers(Needs, DropSchedule({1: 0.5}), [0])
