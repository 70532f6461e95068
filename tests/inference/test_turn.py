"""A later turn over a cache, against its slow twin: one masked full forward over all turns."""

import pytest
import torch
from tiny import (
    FAMILIES,
    META,
    NoWaiting,
    changed_prompt,
    masked_forward,
    one_prompt,
    pack_together,
    tiny_decoder,
    tiny_prompts,
)
from tiny_methods import SCHEDULE, every_method, make
from torch import Tensor

from nanovlm_v2drop.dropping import DROPPERS, V2Drop
from nanovlm_v2drop.inference import decode_one_token, prefill, prefill_loop, prefill_turn, turn
from nanovlm_v2drop.models.decoder import Decoder
from nanovlm_v2drop.models.vlm import PackedInputs

every_family = pytest.mark.parametrize("family", FAMILIES)
every_method_that_only_drops = pytest.mark.parametrize("name", [name for name in DROPPERS if not DROPPERS[name].merges])
ANSWER, QUESTION = [7, 11, 42], [3, 1, 4, 1, 5]


def text_turn(decoder: Decoder, *sequences: list[int]) -> PackedInputs:
    """A turn without pictures; positions begin at zero in each sequence."""
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    nowhere = torch.zeros(len(tokens), dtype=torch.bool)
    return PackedInputs(decoder.embed_tokens(tokens).detach(), positions, nowhere, [len(own) for own in sequences])


def all_turns(first: PackedInputs, second: PackedInputs) -> PackedInputs:
    """Two turns of one sequence as one prompt."""
    behind = second.position_ids + first.position_ids.max() + 1
    return PackedInputs(
        torch.cat([first.inputs_embeds, second.inputs_embeds]),
        torch.cat([first.position_ids, behind.expand(*first.position_ids.shape[:-1], -1)], dim=-1),
        torch.cat([first.vision_mask, second.vision_mask]),
        [len(first.inputs_embeds) + len(second.inputs_embeds)],
        deepstack=None if first.deepstack is None else torch.cat([first.deepstack, second.deepstack]),
    )


def both_kept(first: list, second: list, count: int) -> list:
    """What is left of both turns at each drop point, numbered through; the first turn had `count` vision tokens."""
    return [(layer, [torch.cat([one, other + count])]) for (layer, (one,)), (_, (other,)) in zip(first, second, strict=True)]


@every_family
def test_a_turn_over_a_whole_cache_equals_one_forward_over_all_turns(family: str) -> None:
    decoder, first = tiny_decoder(**FAMILIES[family]), one_prompt(5, 24, 7, family=family)
    second = one_prompt(3, 12, 4, seed=2, family=family)
    whole = all_turns(first, second)
    out = prefill_turn(decoder, second, prefill(decoder, first).cache)
    logits = [out.logits[0], *(decode_one_token(decoder, torch.tensor([token]), out.cache)[0] for token in QUESTION)]
    wanted = masked_forward(decoder, whole, more_tokens=QUESTION)[-1 - len(QUESTION) :]
    torch.testing.assert_close(torch.stack(logits), wanted, atol=1e-4, rtol=0)


@every_family
@every_method_that_only_drops
@pytest.mark.parametrize("cut", [False, True])
def test_a_question_after_dropping_equals_a_masked_forward(name: str, family: str, cut: bool) -> None:
    decoder, first, dropper = tiny_decoder(**FAMILIES[family]), one_prompt(5, 24, 7, family=family), make(name, cut_cache=cut)
    out = prefill(decoder, first, dropper, max_new_tokens=1)
    out.cache.pruning = None
    for token in ANSWER:
        decode_one_token(decoder, torch.tensor([token]), out.cache)
    second = prefill_turn(decoder, text_turn(decoder, QUESTION), out.cache)
    logits = [second.logits[0], decode_one_token(decoder, torch.tensor([9]), out.cache)[0]]
    wanted = masked_forward(decoder, first, out.kept, [*ANSWER, *QUESTION, 9], dropper.renumbers, cut=cut)[-2:]
    torch.testing.assert_close(torch.stack(logits), wanted, atol=1e-4, rtol=0)


@every_family
@every_method_that_only_drops
def test_pictures_of_a_later_turn_are_dropped_by_the_same_method(name: str, family: str) -> None:
    decoder, first = tiny_decoder(**FAMILIES[family]), one_prompt(5, 24, 7, family=family)
    dropper, second = make(name), one_prompt(3, 12, 4, seed=2, family=family)
    before = prefill(decoder, first, dropper)
    before.cache.pruning = None
    out = prefill_turn(decoder, second, before.cache, dropper)
    kept = both_kept(before.kept, out.kept, 24)
    assert [len(own[0]) for _, own in out.kept] == [6, 1, 1][: len(dropper.schedule)]
    wanted = masked_forward(decoder, all_turns(first, second), kept, [9], renumbers=dropper.renumbers)[-2:]
    logits = [out.logits[0], decode_one_token(decoder, torch.tensor([9]), out.cache)[0]]
    torch.testing.assert_close(torch.stack(logits), wanted, atol=1e-4, rtol=0)


def test_each_layer_of_the_cache_grows_by_what_is_left_of_the_turn_there() -> None:
    decoder, first, second = tiny_decoder(), one_prompt(5, 24, 7), one_prompt(3, 12, 4)
    cache = prefill(decoder, first, V2Drop(SCHEDULE)).cache
    assert cache.seqlens == [(36,), (24,), (24,), (15,), (13,), (13,)]
    prefill_turn(decoder, second, cache, V2Drop(SCHEDULE))
    assert cache.seqlens == [(36 + 19,), (24 + 13,), (24 + 13,), (15 + 8,), (13 + 8,), (13 + 8,)]
    assert cache.position_ids.flatten().tolist() == [36 + 19] * 6
    cut = prefill(decoder, first, V2Drop(SCHEDULE, cut_cache=True)).cache
    prefill_turn(decoder, second, cut, V2Drop(SCHEDULE, cut_cache=True))
    assert cut.seqlens == [(13 + 8,)] * 6


@every_method
def test_turns_of_a_batch_equal_those_of_its_conversations_one_by_one(name: str) -> None:
    decoder, parts = tiny_decoder(), tiny_prompts()
    questions = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    together = prefill(decoder, pack_together(parts), make(name))
    decode_one_token(decoder, torch.tensor([3, 1, 4]), together.cache)
    together.cache.crop([0, 1, 0])
    out = prefill_turn(decoder, text_turn(decoder, *questions), together.cache)
    for index, (part, question) in enumerate(zip(parts, questions, strict=True)):
        alone = prefill(decoder, part, make(name) if any(part.vision_counts) else None)
        if index != 1:
            decode_one_token(decoder, torch.tensor([(3, 1, 4)[index]]), alone.cache)
        own = prefill_turn(decoder, text_turn(decoder, question), alone.cache)
        torch.testing.assert_close(own.logits[0], out.logits[index], atol=1e-4, rtol=0)
        assert [lengths[index] for lengths in out.cache.seqlens] == [lengths[0] for lengths in own.cache.seqlens]


def test_a_turn_that_is_cropped_from_the_cache_was_never_there() -> None:
    decoder, first = tiny_decoder(), one_prompt(5, 24, 7)
    cache = prefill(decoder, first, V2Drop(SCHEDULE)).cache
    wanted = prefill_turn(decoder, text_turn(decoder, QUESTION), cache).logits
    cache.crop(len(QUESTION))
    prefill_turn(decoder, text_turn(decoder, ANSWER), cache)
    cache.crop(len(ANSWER))
    assert torch.equal(prefill_turn(decoder, text_turn(decoder, QUESTION), cache).logits, wanted)


@pytest.mark.parametrize("counts", [-1, 14, [14], [-1]])
def test_no_more_tokens_are_cropped_than_are_there(counts: int | list[int]) -> None:
    cache = prefill(tiny_decoder(), one_prompt(5, 24, 7), V2Drop(SCHEDULE)).cache
    with pytest.raises(ValueError, match=r"cannot remove \[-?\d+\] tokens from sequences of \[13\] tokens"):
        cache.crop(counts)


@pytest.mark.parametrize("name", ["dense", *DROPPERS])
def test_an_attention_matrix_written_out_gives_the_same_turn(name: str) -> None:
    decoder, dropper = tiny_decoder(), None if name == "dense" else make(name)
    logits = []
    for backend in ("sdpa", "eager"):
        decoder.attention = backend
        cache = prefill(decoder, one_prompt(5, 24, 7), dropper).cache
        logits.append(prefill_turn(decoder, one_prompt(3, 12, 4, seed=2), cache, dropper).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)


def test_a_turn_in_bfloat16_on_a_cpu_is_near_to_one_in_float32() -> None:
    decoder, first, second = tiny_decoder(), one_prompt(5, 24, 7), one_prompt(3, 12, 4, seed=2)
    wanted = prefill_turn(decoder, second, prefill(decoder, first).cache).logits
    half = [changed_prompt(packed, lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
            for packed in (first, second)]  # fmt: skip
    decoder.bfloat16()
    out = prefill_turn(decoder, half[1], prefill(decoder, half[0]).cache)
    torch.testing.assert_close(out.logits.float(), wanted, atol=0.1 * float(wanted.abs().max()), rtol=0)


def test_an_error_in_a_turn_leaves_the_cache_as_it_was() -> None:
    class Failing(V2Drop):
        def score(self, state: object) -> Tensor:
            raise ZeroDivisionError

    decoder, cache = tiny_decoder(), prefill(tiny_decoder(), one_prompt(5, 24, 7), V2Drop(SCHEDULE)).cache
    lengths, keys = list(cache.seqlens), [one.clone() for one in cache.keys]
    with pytest.raises(ZeroDivisionError):
        prefill_turn(decoder, one_prompt(3, 12, 4), cache, Failing(SCHEDULE))
    assert cache.seqlens == lengths
    assert all(map(torch.equal, cache.keys, keys))


def test_a_turn_has_a_part_for_each_sequence_of_the_cache() -> None:
    decoder = tiny_decoder()
    cache = prefill(decoder, pack_together(tiny_prompts())).cache
    with pytest.raises(ValueError, match="the turn has 1 sequences, but the cache has 3"):
        prefill_turn(decoder, text_turn(decoder, QUESTION), cache)


def test_a_turn_is_refused_where_tokens_are_decoded_by_a_cuda_graph() -> None:
    decoder = tiny_decoder()
    cache = prefill(decoder, one_prompt(5, 24, 7)).cache
    decoder.cuda_graph = True
    with pytest.raises(ValueError, match="without a CUDA graph"):
        prefill_turn(decoder, text_turn(decoder, QUESTION), cache)


def test_a_turn_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prefill_loop, turn):
        monkeypatch.setattr(module, "resolve_backend", lambda *_: "varlen")
    decoder = tiny_decoder().to(META, torch.bfloat16)
    first, second = (on_meta(one_prompt(*sizes)) for sizes in ((5, 24, 7), (3, 12, 4)))
    with NoWaiting():
        cache = prefill(decoder, first, V2Drop(SCHEDULE)).cache
        cache.crop(2)
        prefill_turn(decoder, second, cache, V2Drop(SCHEDULE, cut_cache=True))


def on_meta(packed: PackedInputs) -> PackedInputs:
    """The prompt in bfloat16 on a device that has no values."""
    return changed_prompt(packed, lambda one: one.to(META, torch.bfloat16 if one.is_floating_point() else one.dtype))
