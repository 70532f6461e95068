"""Answers and losses of packed batches, as the plug-in for lmms-eval computes them, without lmms-eval."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch

from nanovlm_v2drop import DROPPERS, Request, VisionLanguageModel, generate, load
from nanovlm_v2drop.dropping.schedule import OutOfReach
from nanovlm_v2drop.evaluation.lmms_eval.answers import Answering, Option, continuation_tokens
from nanovlm_v2drop.evaluation.lmms_eval.arguments import parse_model_arguments
from nanovlm_v2drop.evaluation.lmms_eval.requests import Decoding
from nanovlm_v2drop.inference import prefill
from nanovlm_v2drop.inference.conversation import common_length
from nanovlm_v2drop.processing.prompts import build_prompt
from nanovlm_v2drop.tasks import load_task

SHORT = Decoding(max_new_tokens=8)
# DyCoke keeps whole frames, so it drops nothing from a picture. Fast tests take the first; `-m slow` takes all.
OF_PICTURES = [name for name in DROPPERS if name != "dycoke"]
METHODS = ["v2drop", *(pytest.param(name, marks=pytest.mark.slow) for name in OF_PICTURES if name != "v2drop")]
COLOURS = [" red", " blue", " yes", " two blue", " orange orange red"]


@cache
def vlm() -> VisionLanguageModel:
    return load("demo")


def answering(**given: Any) -> Answering:
    return Answering(vlm(), parse_model_arguments({"pretrained": "demo", **given}).plan())


def unequal_requests(count: int = 5) -> list[Request]:
    """With one picture, none, two, ..."""
    requests = [sample.request for sample in load_task("demo").samples(count)]
    several = Request(text=requests[2].text, images=[*requests[2].images, *requests[0].images])
    return [requests[0], Request(text="What colour is grass?"), several, *requests[3:]]


def greedy_loss(request: Request, answer: str) -> tuple[float, bool]:
    """The slow twin: one prefill of a longer prompt for each token."""
    prompt = build_prompt(request, vlm().conversation, vlm().config.marks)
    ids, media = vlm().tokens_and_media(request)
    whole = vlm().tokens_and_media(Request(prompt=prompt + answer, images=request.images))[0]
    start, losses, hits = common_length(ids, whole), [], []
    for end in range(start, len(whole)):
        logits = prefill(vlm().model.language_model, vlm().pack([whole[:end]], [media])).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(whole[end])).item())
        hits.append(logits.argmax().item() == whole[end])
    return sum(losses) / len(losses), all(hits)


@pytest.mark.parametrize("name", [None, *METHODS])
def test_unequal_prompts_are_answered_as_generate_answers_them(name: str | None) -> None:
    requests = unequal_requests()
    own = answering(method=name, retain=0.5) if name else answering()
    options: dict[str, Any] = {"dropper": DROPPERS[name], "retain": 0.5} if name else {}
    expected = generate(vlm(), requests, max_new_tokens=8, **options)
    found = own.generate(requests, SHORT)
    assert [(each.text, each.num_tokens) for each in found] == [(each.text, len(each.token_ids)) for each in expected]
    assert [each.prompt.vision_tokens for each in found] == [144, 0, 288, 144, 144]
    for each in found:
        wanted = each.prompt.vision_tokens * (0.5 if name else 1)
        assert each.prompt.mean_vision_tokens == pytest.approx(wanted, abs=1)


def test_the_loss_of_an_answer_is_that_of_the_longer_prompts() -> None:
    requests = unequal_requests(3)
    for request, found in zip(requests, answering().options([(request, COLOURS) for request in requests]), strict=True):
        for answer, option in zip(COLOURS, found, strict=True):
            loss, is_greedy = greedy_loss(request, answer)
            assert option.loss == pytest.approx(loss, rel=1e-4, abs=1e-5)
            assert option.is_greedy == is_greedy


@pytest.mark.parametrize("name", METHODS)
def test_options_of_a_batch_are_those_of_one_prompt_and_one_option_alone(name: str) -> None:
    asked: Sequence[tuple[Request, list[str]]] = [
        (request, COLOURS[: 2 + number]) for number, request in enumerate(unequal_requests(4))
    ]
    together = answering(method=name, retain=0.4).options(asked)
    for (request, answers), found in zip(asked, together, strict=True):
        alone = [answering(method=name, retain=0.4).options([(request, [answer])])[0][0] for answer in answers]
        assert [option.loss for option in found] == pytest.approx([option.loss for option in alone], rel=1e-3, abs=1e-4)
        assert [option.is_greedy for option in found] == [option.is_greedy for option in alone]


@pytest.mark.parametrize("name", METHODS)
def test_the_answer_that_a_method_generates_is_the_greedy_option_with_the_smallest_loss(name: str) -> None:
    requests = [sample.request for sample in load_task("demo").samples(6)]
    own = answering(method=name, retain=0.4)
    answers = [f" {each.text}" for each in own.generate(requests, SHORT)]
    options = sorted(set(answers))
    for answer, found in zip(answers, own.options([(request, options) for request in requests]), strict=True):
        best = min(found, key=lambda option: option.loss)
        assert options[found.index(best)] == answer
        assert [option.is_greedy for option in found] == [option is best for option in found]


def test_a_method_that_prunes_while_decoding_scores_each_option_anew() -> None:
    video, samples = load("demo-video"), list(load_task("demo-video").samples(2))
    plan = parse_model_arguments({"pretrained": "demo-video", "method": "dycoke", "retain": 0.5}).plan()
    asked = [(sample.request, COLOURS) for sample in samples]
    together = Answering(video, plan)
    for (request, answers), found in zip(asked, together.options(asked), strict=True):
        alone = [Answering(video, plan).options([(request, [answer])])[0][0].loss for answer in answers]
        assert [option.loss for option in found] == pytest.approx(alone, rel=1e-3, abs=1e-4)
    assert len(together.shapes) == len(asked)  # the report counts each prompt once


def test_an_answer_that_changes_the_end_of_the_prompt_replaces_it() -> None:
    class Joining:
        """A tokenizer with a token for "::"."""

        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text.replace("::", "\N{PROPORTION}")]

    class Words(VisionLanguageModel):
        def __init__(self) -> None:
            vars(self).update({**vars(vlm()), "tokenizer": Joining()})

    surplus, options = continuation_tokens(Words(), Request(text="?"), [": a", " b"])
    assert surplus == 1
    assert ["".join(map(chr, ids)) for ids in options] == ["\N{PROPORTION} a", ": b"]


def test_an_answer_without_tokens_has_no_loss() -> None:
    with pytest.raises(ValueError, match="the answer '' has no tokens, so it has no loss"):
        answering().options([(Request(text="?"), ["", " a"])])


def test_stop_strings_and_limits_end_an_answer() -> None:
    request = Request(text="?")
    one = answering().generate([request], Decoding(max_new_tokens=3))[0]
    assert one.num_tokens <= 3
    long = answering().generate([request] * 2, Decoding(max_new_tokens=100, temperature=5.0))
    assert max(each.num_tokens for each in long) > 64  # the cache has grown
    assert long[0] != long[1]  # the rows of a batch draw apart


def test_decoding_ends_at_a_stop_string_with_the_text_of_the_whole_answer() -> None:
    requests = [Request(text="?"), Request(text="What colour is grass?")]
    sampled = Decoding(max_new_tokens=60, temperature=5.0)
    whole = answering().generate(requests, sampled)
    assert [each.num_tokens for each in whole] == [60, 60]
    for stop in ("e", " ", "ow"):
        assert all(stop in each.text for each in whole)
        stopped = answering().generate(requests, replace(sampled, until=("\N{SNOWMAN}", stop)))
        assert [each.text for each in stopped] == [each.text.partition(stop)[0].strip() for each in whole]
        assert max(each.num_tokens for each in stopped) < 60


def test_sampled_answers_of_the_next_batch_are_others() -> None:
    own, request = answering(), Request(text="?")
    answers = [own.generate([request], Decoding(max_new_tokens=20, temperature=5.0), seed)[0].text for seed in (0, 1, 0)]
    assert answers[0] == answers[2] != answers[1]


@pytest.mark.parametrize("budget", [{"tokens": 1}, {"retain": 0.001}, {"tokens": 1000}])
def test_a_budget_that_the_first_picture_cannot_meet_is_refused(budget: dict[str, float]) -> None:
    with pytest.raises(OutOfReach):
        answering(method="v2drop", **budget).generate(unequal_requests(), SHORT)


def test_options_hold_plain_numbers() -> None:
    ((option,),) = answering().options([(Request(text="?"), [" a"])])
    assert isinstance(option, Option)
    assert [type(value) for value in asdict(option).values()] == [float, bool, dict]
