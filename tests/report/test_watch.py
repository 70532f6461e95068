"""Watching changes nothing, and what is noted is what a plain loop over the layers computes."""

import warnings
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovlm_v2drop import DROPPERS, DropSchedule, Request, TokenDropper, V2Drop, generate, load, prefill, watch
from nanovlm_v2drop.demo.clips import any_clip, draw_clip
from nanovlm_v2drop.dropping import Chain
from nanovlm_v2drop.dropping.schedule import OutOfReach
from nanovlm_v2drop.models.decoder import rotary_table
from nanovlm_v2drop.tasks.demo import held_out

SCHEDULE = DropSchedule({1: 0.5, 6: 0.3, 8: 0.0})


@pytest.fixture(scope="module")
def vlm():
    return load("demo")


@pytest.fixture(scope="module")
def request_():
    sample = held_out(227)
    return Request(text=sample.text, images=sample.images)


def slow_loop(vlm, request, schedule: DropSchedule) -> tuple[list[Tensor], list[Tensor], list[Tensor], dict, Tensor]:
    """Inputs of every layer, weights of the last token, variations, kept numbers and logits; attention written out."""
    decoder, packed = vlm.model.language_model, vlm.prepare([request])
    hidden, positions = packed.inputs_embeds, packed.position_ids
    numbers = torch.full((len(hidden),), -1)
    numbers[packed.vision_mask] = torch.arange(int(packed.vision_mask.sum()))
    inputs, weights, variations, kept = [], [], [], {}
    previous = None
    for layer_idx, layer in enumerate(decoder.layers):
        inputs.append(hidden[numbers >= 0])
        if previous is not None:
            variations.append((hidden - previous)[numbers >= 0].norm(dim=-1))
        if layer_idx in schedule:
            count = max(1, int((numbers >= 0).sum() * schedule[layer_idx]))
            best = numbers[numbers >= 0][variations[-1].topk(count).indices].sort().values
            keep = (numbers < 0) | torch.isin(numbers, best)
            hidden, positions, numbers, kept[layer_idx] = hidden[keep], positions[keep], numbers[keep], best
        length = len(hidden)
        hidden_before = hidden

        def attend(q, k, v, length=length):
            scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
            matrix = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
            weights.append(matrix[:, -1])
            return torch.einsum("hqk,khd->qhd", matrix, v)

        hidden = layer(hidden, rotary_table(decoder.config, positions, hidden.dtype), attend)
        previous = hidden_before
    inputs.append(hidden[numbers >= 0])
    variations.append((hidden - previous)[numbers >= 0].norm(dim=-1))
    return inputs, weights, variations, kept, decoder.lm_head(decoder.norm(hidden[-1]))


@torch.no_grad()
@pytest.mark.parametrize("schedule", [DropSchedule({}), SCHEDULE])
def test_it_notes_what_a_plain_loop_over_the_layers_computes(vlm, request_, schedule):
    watched = watch(vlm, request_, V2Drop(schedule) if schedule else None)
    inputs, weights, variations, kept, logits = slow_loop(vlm, request_, schedule)
    layers = len(vlm.model.language_model.layers)
    assert len(watched.states) == layers + 1
    for layer in range(layers + 1):
        torch.testing.assert_close(watched.hidden_states(layer), inputs[layer], atol=1e-3, rtol=1e-3)
    for layer in range(layers):
        torch.testing.assert_close(watched.attention(layer), weights[layer], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(watched.variation(layer + 1), variations[layer], atol=1e-3, rtol=1e-3)
    assert {layer: numbers.tolist() for layer, numbers in watched.kept.items()} == {
        layer: numbers.tolist() for layer, numbers in kept.items()
    }
    torch.testing.assert_close(watched.logits, logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", sorted(DROPPERS))
def test_a_watched_method_keeps_and_answers_as_it_does_without_being_watched(vlm, request_, name):
    method = DROPPERS[name]
    try:
        schedule = method.schedule_for(48, 144, 12)
    except OutOfReach as error:  # methods for video
        schedule = error.floor
    check_same(vlm, request_, method(schedule))


def test_a_chain_and_a_method_that_cuts_earlier_caches_are_watched_too(vlm, request_):
    check_same(vlm, request_, V2Drop(SCHEDULE, cut_cache=True))
    check_same(vlm, request_, Chain([DROPPERS["divprune"](DropSchedule({0: 0.6})), V2Drop(SCHEDULE)]))


def check_same(vlm, request_, dropper: TokenDropper) -> None:
    """Fail unless watching a dropper gives the answer, logits and kept tokens that it has without a watcher."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (answer,) = generate(vlm, [request_], dropper)
        logits = prefill(vlm.model.language_model, vlm.prepare([request_]), dropper).logits[0]
    watched = watch(vlm, request_, dropper)
    assert watched.answer == answer.text
    assert torch.equal(watched.logits, logits)
    assert [(layer, numbers.tolist()) for layer, numbers in watched.kept.items()] == [
        (layer, numbers.tolist()) for layer, numbers in answer.kept
    ]


def test_a_pruned_and_renumbered_video_is_watched_too():
    vlm = load("demo-video")
    request = Request(text="What happens in the video?", video=draw_clip(any_clip(Random(0))))
    method = DROPPERS["dycoke"]
    dropper = method(method.schedule_for(133, 289, 12, frames=8))
    watched, (answer,) = watch(vlm, request, dropper), generate(vlm, [request], dropper)
    assert watched.answer == answer.text
    assert watched.grids == ((8, 6, 6), (1, 1, 1))
    assert len(watched.kept[0]) == 133
    assert watched.picture(0).size == (480, 240)  # two rows of four frames


def test_a_class_with_a_budget_is_watched_as_generate_runs_it(vlm, request_):
    watched, (answer,) = watch(vlm, request_, V2Drop, retain=1 / 3), generate(vlm, [request_], V2Drop, retain=1 / 3)
    assert [numbers.tolist() for numbers in watched.kept.values()] == [numbers.tolist() for _, numbers in answer.kept]
    with pytest.raises(TypeError, match="V2Drop"):
        watch(vlm, request_, V2Drop)


@pytest.mark.parametrize("name", ["fastv", "random"])
def test_scores_are_those_that_the_method_gives_at_that_layer(vlm, request_, name):
    """The best third of the scores at layer 1 is what the method keeps there."""
    scores = watch(vlm, request_).scores(DROPPERS[name](DropSchedule({})), 1)
    (answer,) = generate(vlm, [request_], DROPPERS[name](DropSchedule({1: 1 / 3})))
    assert scores.topk(48).indices.sort().values.tolist() == answer.kept[0][1].tolist()


def test_patches_that_have_left_are_faded_from_their_layer_on(vlm, request_):
    watched = watch(vlm, request_, V2Drop(SCHEDULE))
    pictures = [np.asarray(watched.picture(layer), dtype=float).reshape(12, 20, 12, 20, 3) for layer in (0, 1, 7)]
    whole, first, second = pictures
    for picture, layer in ((first, 1), (second, 6)):
        same = (picture == whole).all((1, 3, 4)).ravel()
        assert same.nonzero()[0].tolist() == watched.kept[layer].tolist()


def test_what_cannot_be_watched_is_refused_with_the_limit(vlm, request_):
    watched = watch(vlm, request_, max_new_tokens=1)
    with pytest.raises(ValueError, match="v2drop works at layers 1 to 12, not at 0"):
        watched.variation(0)
    with pytest.raises(ValueError, match="drop layer 12 cannot act"):
        watch(vlm, request_, V2Drop(DropSchedule({12: 0.5})))
    with pytest.raises(ValueError, match="max_new_tokens 0 must be at least 1"):
        watch(vlm, request_, max_new_tokens=0)
    with pytest.raises(ValueError, match="neither picture nor video"):
        watch(vlm, Request(text="Hello"), max_new_tokens=1).picture(0)
