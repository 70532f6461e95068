"""`--model_args` as lmms-eval passes them, without lmms-eval."""

import re
from typing import Any

import pytest

from nanovlm_v2drop.evaluation.lmms_eval.arguments import parse_model_arguments

GIVEN = {"pretrained": "demo", "batch_size": 1}


def plan_of(**given: Any) -> Any:
    return parse_model_arguments({**GIVEN, **given}).plan()


@pytest.mark.parametrize(
    ("given", "row"),
    [
        ({}, "dense"),
        ({"method": "v2drop", "retain": "1/3"}, "v2drop 33.33%"),
        ({"method": "v2drop", "retain": 0.333}, "v2drop 33.3%"),
        ({"method": "v2drop", "retain": 1}, "v2drop 100%"),
        ({"method": "random", "tokens": 48}, "random 48"),
        ({"method": "v2drop:metric=cosine", "retain": "2/9"}, "v2drop:metric=cosine 22.22%"),
        ({"method": "divprune+v2drop:share=0.5", "tokens": 60.5}, "divprune+v2drop:share=0.5 60.5"),
        ({"method": "v2drop", "setting": "paper-192"}, "v2drop paper-192"),
    ],
)
def test_a_method_is_written_as_on_the_command_line(given: dict[str, Any], row: str) -> None:
    assert plan_of(**given).row == row


def test_a_seed_is_that_of_a_method_that_draws() -> None:
    assert plan_of(method="random", retain=0.5, seed=7).make.keywords == {"seed": 7}


def test_the_model_is_loaded_with_the_options_of_the_command_line() -> None:
    given = {"pretrained": "demo-video", "dtype": "bfloat16", "attention": "sdpa", "frames": 4}
    arguments = parse_model_arguments({**given, "device": "cpu", "batch_size": "8"})
    vlm = arguments.load()
    assert (vlm.name, str(vlm.dtype), vlm.model.language_model.attention) == ("demo-video", "torch.bfloat16", "sdpa")
    assert vlm.sampling.max_frames == 4
    assert arguments.batch_size == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"retian": 0.5, "methd": "v2drop"}, "unknown model_args 'retian', 'methd'; choose from: pretrained, method, tokens"),
        ({"tensor_parallel": 2}, "unknown model_args 'tensor_parallel'"),
        ({"max_batch_size": 8}, "unknown model_args 'max_batch_size'"),
        ({"retain": 0.5}, "retain has no meaning without a method that drops; add one, such as method=v2drop"),
        ({"method": "v2drop"}, "method=v2drop needs one budget: retain=1/3 or tokens=192, or setting= with one of"),
        ({"method": "v2drop", "retain": 0.5, "tokens": 9}, "method=v2drop needs one budget"),
        ({"method": "v2drop", "setting": "best"}, "v2drop has no published setting 'best'; it has: released-code, paper-192"),
        ({"method": "v2drop", "retain": "a third"}, "retain=a third: 'a third' is no number"),
        ({"method": "v2drop", "retain": "1/0"}, "retain=1/0: '1/0' is no number"),
        ({"method": "v2drop", "retain": 1.5}, "retain 1.5 must be above 0 and at most 1"),
        ({"method": "v2drop", "tokens": "nan"}, "a budget of nan tokens must be 0 or more, and finite"),
        ({"method": "all", "retain": 0.5}, "method=all stands for"),
        ({"method": "v2dorp", "retain": 0.5}, "unknown method 'v2dorp'"),
        ({"batch_size": "auto"}, "batch_size=auto must be a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"frames": 2.5}, "frames=2.5 must be a whole number of at least 1"),
        ({"compile": "yes"}, "compile=yes must be true or false"),
        ({"dtype": ""}, "dtype= is empty; give it a value or leave it out"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        plan_of(**given)
    assert "\n" not in str(caught.value)


def test_a_run_must_name_its_model() -> None:
    with pytest.raises(ValueError, match="model_args names no model: add pretrained=NAME, one of demo, "):
        parse_model_arguments({"method": "v2drop"})


@pytest.mark.parametrize(
    "given",
    [{"dtype": "int3"}, {"attention": "fast"}, {"template": "mine"}, {"sampling": "all"}, {"image_aspect_ratio": "wide"},
     {"pretrained": "lava"}, {"device": "tpu"}, {"weights": "nowhere"}],
)  # fmt: skip
def test_an_unknown_value_is_refused_before_weights_are_read(given: dict[str, Any]) -> None:
    (value,) = given.values()
    with pytest.raises((ValueError, OSError), match=value):
        parse_model_arguments({"device": "cpu", **GIVEN, **given}).load()
