"""Two methods in one run: what each drops, the one accounting, and the solver for both together."""

import pytest
import torch
from golden_inputs import in_a_prompt, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import masked_forward, one_prompt, pack_together, tiny_decoder, tiny_prompts

from nanovlm_v2drop import DROPPERS, Chain, CountSchedule, DropSchedule, V2Drop, decode_one_token, prefill
from nanovlm_v2drop.dropping import BatchSchedule, ChainSchedule
from nanovlm_v2drop.dropping.schedule import OutOfReach
from nanovlm_v2drop.inference import initial_state
from nanovlm_v2drop.models.vlm import PackedInputs

DivPrune, Random, TransPrune, SparseVLM = (DROPPERS[name] for name in ("divprune", "random", "transprune", "sparsevlm"))
PAIRS = [("divprune", "v2drop"), ("visionzip", "v2drop"), ("vidcom2", "pdrop"), ("cdpruner", "transprune"),
         ("tome", "sparsevlm"), ("holov", "random"), ("fastv", "random-grid"), ("divprune", "clse")]  # fmt: skip
every_pair = pytest.mark.parametrize(("first", "second"), PAIRS, ids="+".join)


def chain(first, second):
    layer = 0 if DROPPERS[first].latest_layer == 0 else 1
    return Chain([DROPPERS[first](DropSchedule({layer: 0.5})), DROPPERS[second](DropSchedule({2: 0.7, 4: 0.5}))])


# Random draws for the whole prompt, and SparseVLM rates it before any drop.
@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if pair[1] not in ("random", "random-grid", "sparsevlm")])
def test_the_second_method_drops_what_it_would_drop_of_what_the_first_has_left(first, second):
    decoder, packed = tiny_decoder(), one_prompt(5, 24, 7)
    both = chain(first, second)
    after = both.droppers[0](initial_state(packed))
    left = PackedInputs(after.hidden_states, after.position_ids, after.vision_mask, after.seqlens)
    without_grid = {"mode": "attn"} if second == "clse" else {}
    alone = prefill(decoder, left, DROPPERS[second](both.droppers[1].schedule, **without_grid))
    out = prefill(decoder, packed, both)
    torch.testing.assert_close(out.logits, alone.logits, atol=1e-5, rtol=0)
    assert out.cache.seqlens == alone.cache.seqlens
    token = torch.tensor([7])
    torch.testing.assert_close(
        decode_one_token(decoder, token, out.cache), decode_one_token(decoder, token, alone.cache), atol=1e-5, rtol=0
    )


@every_pair
def test_a_packed_batch_equals_its_samples_one_by_one(first, second):
    decoder, parts = tiny_decoder(), tiny_prompts()
    together = prefill(decoder, pack_together(parts), chain(first, second))
    for index, part in enumerate(parts):
        alone = prefill(decoder, part, chain(first, second) if any(part.vision_counts) else None)
        torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-4, rtol=0)
        for (_, sequences), (_, (kept,)) in zip(together.kept, alone.kept, strict=False):
            assert sequences[index].tolist() == kept.tolist()


@pytest.mark.parametrize("second", ["pdrop", "transprune", "sparsevlm"])
def test_a_prompt_from_which_the_second_method_drops_nothing_keeps_its_positions_in_a_batch(second):
    def dropper(*shares):
        own = [DropSchedule({4: share} if share < 1 else {}) for share in shares]
        return Chain([DROPPERS["fastv"](DropSchedule({1: 0.5})), DROPPERS[second](BatchSchedule(own))])

    decoder, parts = tiny_decoder(), tiny_prompts()[:2]
    together = prefill(decoder, pack_together(parts), dropper(1.0, 0.5))
    alone = [prefill(decoder, part, dropper(share)) for part, share in zip(parts, (1.0, 0.5), strict=True)]
    for _ in range(2):
        logits = [decode_one_token(decoder, torch.tensor([7]), one.cache) for one in alone]
        torch.testing.assert_close(
            decode_one_token(decoder, torch.tensor([7, 7]), together.cache), torch.cat(logits), atol=1e-4, rtol=0
        )


@every_pair
def test_the_accounting_is_what_prefill_leaves(first, second):
    decoder, dropper = tiny_decoder(), chain(first, second)
    out = prefill(decoder, one_prompt(5, 24, 7), dropper)
    counts = [length - 12 for (length,) in out.cache.seqlens]
    assert counts == dropper.schedule.vision_tokens_per_layer(24, 6)
    assert list(dropper.schedule) == sorted([*dropper.droppers[0].schedule, 2, 4])
    assert dropper.name == f"{first}+{second}"


def test_a_chain_of_methods_that_only_drop_equals_masking_their_keys():
    decoder, packed = tiny_decoder(), one_prompt(5, 24, 7)
    dropper = Chain([DROPPERS["fastv"](DropSchedule({1: 0.5})), V2Drop(DropSchedule({3: 0.5}))])
    out = prefill(decoder, packed, dropper)
    torch.testing.assert_close(out.logits[0], masked_forward(decoder, packed, out.kept)[-1], atol=1e-4, rtol=0)


def test_each_method_has_marks_of_its_own():
    packed, decoder = one_prompt(5, 24, 7), tiny_decoder()
    rated, moved = SparseVLM(DropSchedule({2: 0.9})), TransPrune(DropSchedule({4: 0.5}))
    seen = {}

    class Watched(TransPrune):
        def score(self, state):
            seen["transitions"] = state.marks
            return super().score(state)

    out = prefill(decoder, packed, Chain([rated, Watched(DropSchedule({4: 0.5}))]))
    assert out.kept[0][1][0].tolist() == prefill(decoder, packed, rated).kept[0][1][0].tolist()
    assert len(seen["transitions"]) == out.cache.seqlens[3][0]
    alone = prefill(decoder, packed, Chain([rated, moved]))
    assert torch.equal(alone.logits, out.logits)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(PAIRS[:6]), st.floats(0.12, 1), st.floats(0.3, 0.9), st.integers(100, 700))
def test_the_solver_meets_a_mean_with_any_share(pair, retain, share, num_vision_tokens):
    method = Chain.of([DROPPERS[name] for name in pair], share)
    target = retain * num_vision_tokens
    try:
        schedule = method.schedule_for(target, num_vision_tokens, 32)
    except OutOfReach as error:
        schedule, target = error.floor, max(target, error.floor.mean_tokens(num_vision_tokens, 32))
    assert schedule.mean_tokens(num_vision_tokens, 32) == pytest.approx(target, abs=1)


@pytest.mark.parametrize(("share", "first"), [(0.5, 192), (0.0, 576), (1.0, 64), (0.25, 333)])
def test_the_share_divides_the_reduction_by_its_logarithm(share, first):
    schedule = Chain.of([DivPrune, V2Drop], share).schedule_for(64, 576, 32)
    per_layer = schedule.vision_tokens_per_layer(576, 32)
    assert per_layer[0] == first
    assert schedule.mean_tokens(576, 32) == pytest.approx(64, abs=0.5)


def test_behind_a_method_inside_the_decoder_the_mean_is_met_too():
    method = Chain.of([DROPPERS["fastv"], DROPPERS["pdrop"]])
    schedule = method.schedule_for(192, 576, 32)
    assert list(schedule) == [2, 8, 16, 24]
    assert schedule.mean_tokens(576, 32) == pytest.approx(192, abs=0.5)


@pytest.mark.parametrize(("first", "second"), [("v2drop", "clse"), ("v2drop", "pdrop"), ("clse", "dart"), ("pdrop", "random")])
def test_methods_whose_layers_lie_between_one_another_meet_the_mean_too(first, second):
    method = Chain.of([DROPPERS[first], DROPPERS[second]])
    schedule = method.schedule_for(192, 576, 32)
    assert schedule.mean_tokens(576, 32) == pytest.approx(192, abs=0.5)
    assert schedule.parts[0].mean_tokens(576, 32) == pytest.approx((576 * 192) ** 0.5, abs=0.5)


def test_a_method_that_goes_to_a_layer_of_the_first_for_small_budgets_has_a_floor_there():
    method = Chain.of([DROPPERS["dycoke"], DROPPERS["v2drop-plus"]])  # DyCoke keeps a picture whole
    assert method.schedule_for(48, 144, 12).mean_tokens(144, 12) == pytest.approx(48, abs=0.5)
    with pytest.raises(OutOfReach, match=r"dycoke\+v2drop-plus: a mean of 8 vision tokens is out of reach") as caught:
        method.schedule_for(8, 144, 12)
    assert list(caught.value.floor) == [0, 1, 6]


def test_three_methods_share_the_reduction_equally():
    method = Chain.of([DivPrune, DROPPERS["fastv"], V2Drop])
    assert method.levels == pytest.approx((1 / 3, 2 / 3, 1))
    schedule = method.schedule_for(72, 576, 32)
    assert schedule.vision_tokens_per_layer(576, 32)[0] == 288
    assert schedule.mean_tokens(576, 32) == pytest.approx(72, abs=0.5)


def test_a_chain_for_a_budget_is_used_as_any_method():
    method = Chain.of([DivPrune, Random.configured(cut_cache=True)])
    assert (method.name, method.seeded) == ("divprune+random:cut_cache=True", True)
    schedule = method.schedule_for(8, 24, 6)
    decoder, packed = tiny_decoder(), one_prompt(5, 24, 7)
    runs = [prefill(decoder, packed, method(schedule, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0].logits, runs[1].logits)
    assert not torch.equal(runs[0].logits, runs[2].logits)
    assert len(set(runs[0].cache.seqlens)) == 1  # cut
    batch = BatchSchedule([schedule, method.schedule_for(6, 12, 6), DropSchedule({})])
    together = prefill(decoder, pack_together(tiny_prompts()), method(batch))
    assert [length[0] for length in together.cache.seqlens] == [runs[0].cache.seqlens[0][0]] * 6


def test_a_chain_names_what_it_cannot_do():
    half = DropSchedule({1: 0.5})
    with pytest.raises(TypeError, match=r"a chain is made of droppers, such as \[V2Drop\(schedule\), \.\.\.\], not of"):
        Chain([V2Drop])
    with pytest.raises(ValueError, match="two methods of a chain drop at layer 2"):
        Chain([V2Drop(DropSchedule({2: 0.5})), Random(DropSchedule({1: 0.5, 2: 0.5}))])
    with pytest.raises(ValueError, match=r"two methods of a chain drop at layer 1: .* such as v2drop:layers=4/8"):
        Chain.of([DROPPERS["fastv"], V2Drop]).schedule_for(48, 144, 12)
    with pytest.raises(ValueError, match="divprune acts before the decoder: it must be the first"):
        Chain.of([V2Drop, DivPrune])
    with pytest.raises(ValueError, match=r"2 methods need 1 shares from 0 to 1, together at most 1, not \[1\.5\]"):
        Chain.of([DivPrune, V2Drop], 1.5)
    with pytest.raises(TypeError, match="a chain of 2 methods takes a ChainSchedule of 2 parts, not DropSchedule"):
        Chain.of([DivPrune, V2Drop])(DropSchedule({1: 0.5}))
    with pytest.raises(OutOfReach, match=r"divprune\+v2drop:share=0: a mean of .* is out of reach") as caught:
        Chain.of([DivPrune, V2Drop], 0.0).schedule_for(40, 576, 32)
    assert isinstance(caught.value.floor, ChainSchedule)
    with pytest.raises(ValueError, match="sparsevlm averages tokens, which earlier caches do not hold"):
        Chain([V2Drop(half, cut_cache=True), SparseVLM(DropSchedule({2: 0.5}))])
    with pytest.raises(ValueError, match="drop layer 3 cannot act: this method works at layers 0 to 0"):
        prefill(tiny_decoder(), one_prompt(5, 24, 7), Chain([V2Drop(DropSchedule({1: 0.5})), DivPrune(DropSchedule({3: 0.5}))]))
    with pytest.raises(ValueError, match="dycoke hides cache slots while decoding, which a chain cannot: give it prune=0"):
        prefill(tiny_decoder(), one_prompt(5, 24, 7), Chain([DROPPERS["dycoke"](DropSchedule({0: 0.5})), V2Drop(half)]))


def test_a_method_with_options_has_a_name_and_published_settings_of_its_own():
    cosine = V2Drop.configured(metric="cosine")
    assert (cosine.name, cosine(DropSchedule({1: 0.5})).metric) == ("v2drop:metric=cosine", "cosine")
    assert cosine.official("paper-64").metric == "cosine"
    assert not DROPPERS["clse"].configured(cut_cache=False).official("192").cut_cache
    with pytest.raises(ValueError, match="v2drop has no option power; it has: cut_cache, layers, metric"):
        V2Drop.configured(power=2)


def test_a_chain_drops_before_and_inside_the_decoder_at_once():
    features = tokens(3, 36, 32)
    packed = in_a_prompt(features, [(1, 6, 6)])
    dropper = Chain([DivPrune(CountSchedule({0: 12})), V2Drop(CountSchedule({3: 4}))])
    (_, (first,)), (_, (second,)) = prefill(tiny_decoder(), packed, dropper).kept
    assert first.tolist() == prefill(tiny_decoder(), packed, dropper.droppers[0]).kept[0][1][0].tolist()
    assert len(second) == 4
    assert set(second.tolist()) < set(first.tolist())


def test_the_cut_of_a_chain_leaves_the_same_rows_in_every_layer_behind_any_first_method():
    decoder, packed = tiny_decoder(), pack_together(tiny_prompts())
    for first in ("divprune", "visionzip", "dycoke"):
        droppers = [DROPPERS[first](DropSchedule({0: 0.6}), **({"prune": 0.0} if first == "dycoke" else {}))]
        whole = prefill(decoder, packed, Chain([*droppers, V2Drop(DropSchedule({2: 0.5, 4: 0.5}))]))
        cut = prefill(decoder, packed, Chain([*droppers, V2Drop(DropSchedule({2: 0.5, 4: 0.5}))], cut_cache=True))
        assert torch.equal(cut.logits, whole.logits)
        assert cut.cache.seqlens == [whole.cache.seqlens[-1]] * 6
        for layer_idx in (4, 5):
            assert torch.equal(cut.cache.keys[layer_idx], whole.cache.keys[layer_idx])
