"""The paper's ablations, mapped to a model of another size."""

import pytest

from nanovlm_v2drop.dropping.budget import Shape
from nanovlm_v2drop.research.ablations import ABLATIONS, ablation_plans

DEMO, LLAVA_7B = Shape(144, 12), Shape(576, 32)


def test_every_ablation_of_the_paper_has_its_rows_at_its_size():
    plans = ablation_plans([name for name in ABLATIONS if name != "ranking"], LLAVA_7B)
    assert len({plan.key for plan in plans}) == len(plans) == 1 + 3 + 6 + 2 + 3
    assert all(plan.paper for plan in plans[1:])
    by_label = {plan.label: plan for plan in plans}
    assert [by_label[f"v2drop {metric}"].dropper.metric for metric in ("l2", "l1", "cosine")] == ["l2", "l1", "cosine"]
    assert list(by_label["v2drop 4/14/30"].schedule) == [4, 14, 30]
    assert dict(by_label["v2drop paper-64"].schedule) == {3: 0.05, 17: 0.05, 22: 0.0}
    assert len(by_label["v2drop one-shot"].schedule) == 1


@pytest.mark.parametrize("shape", [DEMO, LLAVA_7B])
def test_rows_of_one_ablation_have_the_same_mean(shape):
    for name in ("metric", "layers", "steps"):
        schedules = [plan.schedule for plan in ablation_plans([name], shape)[1:]]
        means = [schedule.mean_tokens(shape.num_vision_tokens, shape.num_layers) for schedule in schedules]
        assert max(means) - min(means) <= 1


def test_layers_that_fall_together_in_a_shallow_model_are_one_row_that_says_so():
    plans = {plan.label: plan for plan in ablation_plans(["layers"], DEMO)}
    assert len(plans) == 1 + 5
    assert plans["v2drop 3/17/22"].note == "drops at layers 1/6/8 here; 2/16/21 falls on the same layers here"


def test_the_ranking_of_three_methods_is_asked_at_every_layer_that_has_one_before_it():
    plans = ablation_plans(["ranking"], DEMO)[1:]
    assert len({plan.key for plan in plans}) == len(plans) == 3 * 11
    assert {plan.method for plan in plans} == {"v2drop", "v2drop-plus", "random"}
    counts = [plan.schedule.vision_tokens_per_layer(144, 12) for plan in plans]
    assert counts == [[144] * layer + [12] * (12 - layer) for layer in range(1, 12) for _ in range(3)]


def test_an_unknown_ablation_is_refused():
    with pytest.raises(ValueError, match="unknown ablation 'size'; choose from: metric, layers, steps, schedules, ranking"):
        ablation_plans(["size"], DEMO)
