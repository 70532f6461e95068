"""Schedules and their accounting, the methods, and the authors' code on tiny models (tests/goldens)."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from golden import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, changed_prompt, changed_trace, one_prompt, pack_together, tiny_decoder, tiny_prompts

from nanovlm_v2drop.dropping import (
    DROPPERS,
    PUBLISHED_SCHEDULES,
    BatchSchedule,
    Chain,
    DropSchedule,
    PrefillState,
    TokenDropper,
    V2Drop,
    by_name,
)
from nanovlm_v2drop.dropping.base import NotANumber
from nanovlm_v2drop.dropping.schedule import LEANEST_RATIOS, CountSchedule, layers_at_depths
from nanovlm_v2drop.inference import NothingDropped, decode_one_token, initial_state, prefill
from nanovlm_v2drop.models.config import TextConfig

GOLDEN_CASES = [
    ("v2drop_llama_b", "", V2Drop.official()),
    ("v2drop_llama_extra", "cosine.", V2Drop.official(metric="cosine")),
    ("v2drop_llama_extra", "paper192.", V2Drop.official("paper-192")),
    ("v2drop_llama_extra", "paper128.", V2Drop.official("paper-128")),
    ("v2drop_llama_extra", "paper64.", V2Drop.official("paper-64")),
    ("v2drop_qwen2vl_b", "", V2Drop.official("released-qwen2-vl")),
]


@pytest.mark.parametrize(("name", "variant", "dropper"), GOLDEN_CASES, ids=[case[0] + case[1] for case in GOLDEN_CASES])
def test_kept_tokens_logits_cache_and_decode_equal_the_authors_code(name, variant, dropper):
    golden = Golden.open(name)
    base = Golden.open("v2drop_llama_b") if name == "v2drop_llama_extra" else golden
    stored = {key.removeprefix(variant): value for key, value in golden.tensors.items() if key.startswith(variant)}
    embeds = (golden if f"{variant}inputs_embeds" in golden.tensors else base).inputs_embeds(
        variant if f"{variant}inputs_embeds" in golden.tensors else ""
    )
    decoder = base.decoder()
    out = prefill(decoder, base.packed(embeds), dropper)
    for stage, (_, (kept,)) in enumerate(out.kept):
        assert kept.tolist() == stored[f"kept{stage}"].tolist()
    assert len(out.kept) == 3
    assert [lengths[0] for lengths in out.cache.seqlens] == stored["kv_lengths"].tolist()
    torch.testing.assert_close(out.logits[0], stored["logits"][0], atol=2e-4, rtol=0)
    for token, wanted in zip(stored["tokens"], stored["logits"][1:], strict=True):
        torch.testing.assert_close(decode_one_token(decoder, token[None], out.cache)[0], wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "counts", "mean"),
    [
        ("paper-192", (288, 86, 1), 193.75),
        ("paper-128", (161, 40, 1), 131.0),
        ("paper-64", (28, 1, 1), 66.7),
        ("released-code", (288, 144, 1), 202.8),
    ],
)
def test_published_schedules_have_the_means_that_the_paper_implies(name, counts, mean):
    per_layer = PUBLISHED_SCHEDULES[name].vision_tokens_per_layer(576, 32)
    assert per_layer == [576] * 3 + [counts[0]] * 14 + [counts[1]] * 5 + [counts[2]] * 10
    assert PUBLISHED_SCHEDULES[name].mean_tokens(576, 32) == pytest.approx(mean, abs=0.05)


def test_minimum_zero_drops_every_vision_token():
    schedule = DropSchedule({3: 0.5, 17: 0.3, 22: 0.0}, minimum=0)
    assert schedule.vision_tokens_per_layer(576, 32)[-1] == 0
    assert schedule.mean_tokens(576, 32) == pytest.approx(193.4, abs=0.05)


@settings(deadline=None)
@given(
    st.integers(min_value=20, max_value=2000),
    st.integers(min_value=4, max_value=80),
    st.floats(min_value=0, max_value=1),
)
def test_the_solver_meets_any_reachable_mean_within_half_a_token(num_vision_tokens, num_layers, share):
    leanest = DropSchedule(dict(zip(layers_at_depths(num_layers), LEANEST_RATIOS, strict=False)))
    floor = leanest.mean_tokens(num_vision_tokens, num_layers)
    target = floor + share * (num_vision_tokens - floor)
    schedule = DropSchedule.for_mean_tokens(target, num_vision_tokens, num_layers)
    assert schedule.mean_tokens(num_vision_tokens, num_layers) == pytest.approx(target, abs=0.5)


def test_the_solver_maps_the_papers_layers_by_depth():
    assert list(DropSchedule.for_mean_tokens(192, 576, 32)) == [3, 17, 22]
    assert list(DropSchedule.for_mean_tokens(48, 144, 12)) == [1, 6, 8]
    assert list(DropSchedule.for_mean_tokens(100, 300, 28)) == [3, 15, 19]


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [
        *((24, (2, 13, 16)), (28, (3, 15, 19)), (30, (3, 16, 21)), (32, (3, 17, 22))),
        *((36, (3, 19, 25)), (40, (4, 21, 28)), (64, (6, 34, 44)), (80, (8, 42, 55))),
    ],
)
def test_the_depth_rule_gives_every_depth_its_layers(num_layers, layers):
    assert layers_at_depths(num_layers) == layers
    assert tuple(V2Drop.schedule_for(300, 900, num_layers)) == layers


def test_drop_layers_are_an_option_by_number_or_by_the_name_of_a_published_setting():
    chosen = V2Drop.configured(layers="3/16/22")
    assert chosen.name == "v2drop:layers=3/16/22"
    named = V2Drop.configured(layers="released-qwen2-vl")
    for method in (chosen, named):
        assert list(method.schedule_for(300, 900, 28)) == [3, 16, 22]
        assert method.schedule_for(300, 900, 28).mean_tokens(900, 28) == pytest.approx(300, abs=0.5)
        assert not method.published
    assert list(named.schedule_for(300, 900, 36)) == [4, 21, 28]
    assert list(V2Drop.configured(layers=4).schedule_for(300, 900, 28)) == [4]
    assert list(DROPPERS["random"].configured(layers="3/16/22", cut_cache=True).schedule_for(300, 900, 28)) == [3, 16, 22]


@pytest.mark.parametrize("layers", ["22/16", "3/3", "a/b", "", True, 2.5, -1, "3//4", "released"])
def test_an_option_that_names_no_rising_layers_is_refused(layers):
    message = r"v2drop: layers must be rising numbers such as 3/16/22, or one of released-code, .*released-qwen2-vl, not"
    with pytest.raises(ValueError, match=message):
        V2Drop.configured(layers=layers)


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [("v2drop", "0/5", "layers 0/5 cannot act: this method works from layer 1 on"),
     ("visionzip", 3, "layers 3 cannot act: this method works at layer 0 only")],
)  # fmt: skip
def test_layers_at_which_a_method_cannot_act_are_refused_before_a_model_is_loaded(name, layers, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        DROPPERS[name].configured(layers=layers)


def test_a_method_that_chooses_its_layers_by_the_budget_takes_none():
    for name in ("v2drop-plus", "pdrop", "dycoke"):
        with pytest.raises(ValueError, match=f"{name} has no option layers; it has: "):
            DROPPERS[name].configured(layers="3/16")


def test_layers_beyond_the_decoder_are_refused():
    with pytest.raises(ValueError, match=r"drop layer 40 cannot act: .* this 28-layer decoder"):
        V2Drop.configured(layers="3/40").schedule_for(300, 900, 28)


def test_the_solver_names_the_floor_of_an_unreachable_mean():
    with pytest.raises(ValueError, match=r"a mean of 40 vision tokens is out of reach: .* lies between 54\.9 and 576"):
        DropSchedule.for_mean_tokens(40, 576, 32)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({3: 1.5}, r"keep ratio 1\.5 at layer 3 is outside \[0, 1\]"),
        ({3: float("nan")}, r"keep ratio nan at layer 3"),
        ({17: 0.5, 3: 0.5}, r"drop layers \[17, 3\] must be in rising order"),
        ({-1: 0.5}, r"drop layers \[-1\]"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(ratios, message):
    with pytest.raises(ValueError, match=message):
        DropSchedule(ratios)


@pytest.mark.parametrize("layer", [0, 6])
def test_prefill_refuses_a_drop_layer_at_which_v2drop_cannot_act(layer):
    with pytest.raises(ValueError, match=f"drop layer {layer} cannot act: this method works at layers 1 to 5"):
        prefill(tiny_decoder(), one_prompt(5, 24, 7), V2Drop(DropSchedule({layer: 0.5})))


@pytest.mark.parametrize("name", DROPPERS)
@pytest.mark.parametrize("wrong", [0.3, {3: 0.5}, "3: 0.5", None, DropSchedule])
def test_a_schedule_of_another_type_is_refused_at_once(name, wrong):
    with pytest.raises(TypeError, match=r"takes a DropSchedule, not .*: DropSchedule\(\{3: 0.5\}\) keeps half"):
        DROPPERS[name](wrong)


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="unknown metric 'l3'; choose one of: l2, l1, cosine"):
        V2Drop(DropSchedule({1: 0.5}), metric="l3")


def test_schedules_are_equal_only_where_they_keep_the_same():
    assert DropSchedule({3: 0.5}) == DropSchedule({3: 0.5})
    assert hash(DropSchedule({3: 0.5})) == hash(DropSchedule({3: 0.5}))
    others = [DropSchedule({3: 0.5}, minimum=0), DropSchedule({3: 1.0}), CountSchedule({3: 1})]
    others += [BatchSchedule([DropSchedule({3: 0.5})]), BatchSchedule([DropSchedule({3: 0.1})]), {3: 0.5}]
    for number, one in enumerate(others):
        assert [one == other for other in others] == [number == place for place in range(len(others))]
    assert repr(CountSchedule({3: 1}, minimum=0)) == "CountSchedule({3: 1}, minimum=0)"


def test_prefill_flops_count_every_multiply_add_of_a_small_decoder():
    config = TextConfig(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    weights = 4 * 4 + 2 * (4 * 2) + 4 * 4 + 3 * 4 * 6  # q, k and v, o, gate and up and down

    def layer(tokens):
        return 2 * tokens * weights + sum(2 * 2 * 4 * visible for visible in range(1, tokens + 1))

    assert DropSchedule({1: 0.5}).prefill_flops(config, 3, 8) == layer(11) + layer(7) + 2 * 4 * 10


@pytest.mark.parametrize("cut_cache", [False, True])
def test_kv_cache_bytes_equal_the_cache_that_prefill_leaves(cut_cache):
    decoder, schedule = tiny_decoder(), DropSchedule({1: 0.5, 3: 0.25})
    out = prefill(decoder, one_prompt(5, 24, 7), V2Drop(schedule, cut_cache=cut_cache))
    assert schedule.kv_cache_bytes(decoder.config, 12, 24, bytes_per_value=4, cut_cache=cut_cache) == out.cache.nbytes


@pytest.mark.parametrize(("metric", "order"), [("l2", 2), ("l1", 1)])
def test_the_score_is_the_norm_of_what_the_last_layer_changed(metric, order):
    state = with_previous(initial_state(one_prompt(2, 5, 3)))
    change = state.hidden_states - state.previous
    wanted = change.abs().pow(order).sum(-1).pow(1 / order)
    torch.testing.assert_close(V2Drop(DropSchedule({1: 0.5}), metric).score(state), wanted)


def test_a_token_that_turned_is_kept_by_the_cosine_metric():
    state = with_previous(initial_state(one_prompt(0, 4, 2)))
    state.hidden_states = state.previous.clone()
    state.hidden_states[2] = -state.previous[2]
    kept = V2Drop(DropSchedule({1: 0.25}), "cosine").select(state, (1,))
    assert kept.tolist() == [2, 4, 5]


def with_previous(state: PrefillState) -> PrefillState:
    state.previous = torch.randn(state.hidden_states.shape, generator=torch.Generator().manual_seed(9))
    return state


def test_every_method_is_found_by_its_name():
    assert {"v2drop", "random"} <= set(DROPPERS)
    assert all(DROPPERS[name].name == name for name in DROPPERS)
    for method in DROPPERS.values():
        for setting, (schedule, _, _) in method.published.items():
            assert method.official(setting).schedule is schedule


def test_a_method_made_of_another_needs_a_name_of_its_own():
    class Mine(V2Drop):
        pass

    with pytest.raises(ValueError, match=r"v2drop\.V2Drop and .*\.Mine are both called 'v2drop': give each a name of its own"):
        by_name([V2Drop, V2Drop, Mine])


@pytest.mark.parametrize(("score", "found"), [(lambda state: state.hidden_states, r"\(36, 32\)"), (lambda _: None, "NoneType")])
def test_a_score_that_is_not_one_number_a_token_is_refused(score, found):
    class Mine(TokenDropper):
        name = "mine"

        def score(self, state):
            return score(state)

    with pytest.raises(ValueError, match=rf"score of mine must be one number for each token, text too: \(36,\), not {found}"):
        prefill(tiny_decoder(), one_prompt(5, 24, 7), Mine(DropSchedule({1: 0.5})))


@pytest.mark.parametrize("name", [name for name in DROPPERS if not name.startswith("random")])
def test_every_method_that_ranks_refuses_a_vision_token_without_numbers(name):
    packed = one_prompt(5, 24, 7)
    packed.inputs_embeds[5 + 13] = torch.nan
    packed = replace(packed, vision=tuple(changed_trace(trace, lambda values: values * torch.nan) for trace in packed.vision))
    layer = 0 if DROPPERS[name].latest_layer == 0 else 2
    with pytest.raises(RuntimeError, match=f"{name} scored a vision token NaN"):
        prefill(tiny_decoder(), packed, DROPPERS[name](DropSchedule({layer: 0.5})))


@pytest.mark.parametrize("name", DROPPERS)
def test_every_method_computes_in_float64_what_it_computes_in_float32(name):
    layer, packed = 0 if DROPPERS[name].latest_layer == 0 else 2, pack_together(tiny_prompts())
    wide = changed_prompt(packed, lambda values: values.double() if values.is_floating_point() else values)
    dropper = DROPPERS[name](DropSchedule({layer: 0.5}))
    narrow, double = prefill(tiny_decoder(), packed, dropper), prefill(tiny_decoder().double(), wide, dropper)
    torch.testing.assert_close(double.logits, narrow.logits.double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("vision_too", [False, True])
def test_a_vision_token_without_a_number_is_an_error_and_a_text_token_without_one_is_not(vision_too):
    class Mine(TokenDropper):
        name = "mine"

        def score(self, state):
            return torch.arange(36.0).masked_fill(~state.vision_mask | (vision_too & (state.vision_indices == 3)), torch.nan)

    answer = pytest.raises(NotANumber, match="mine scored a vision token NaN") if vision_too else nullcontext()
    with answer:
        out = prefill(tiny_decoder(), one_prompt(5, 24, 7), Mine(DropSchedule({1: 0.5})))
        assert out.kept[0][1][0].tolist() == list(range(12, 24))


def test_a_dropper_says_where_its_tokens_leave():
    layers, first, both = DropSchedule({1: 0.5}), DropSchedule({0: 0.5}), Chain.of([DROPPERS["divprune"], V2Drop])
    assert V2Drop(layers).acts == "in the decoder"
    assert DROPPERS["divprune"](first).acts == "before the decoder"
    assert both(both.schedule_for(4, 16, 6)).acts == "before and in the decoder"
    assert DROPPERS["dycoke"](first).acts == "before the decoder, while decoding"
    assert V2Drop(DropSchedule({})).acts == ""


def test_an_unknown_or_missing_published_setting_is_refused():
    with pytest.raises(ValueError, match="fastv has no published setting 'K=9'; it has: K=2 R=50%, K=3 R=50%"):
        DROPPERS["fastv"].official("K=9")
    with pytest.raises(NotImplementedError, match="TokenDropper has no released code to follow"):
        TokenDropper.official()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", DROPPERS)
def test_text_never_leaves_and_order_never_changes(name, family):
    packed, states = pack_together(tiny_prompts(family=family)), []

    class Watched(DROPPERS[name]):
        def __call__(self, state):
            states.append(super().__call__(state))
            return states[-1]

    packed.inputs_embeds[packed.vision_mask] *= 1e15  # huge scores must not push text out
    layer = 0 if DROPPERS[name].latest_layer == 0 else 2
    prefill(tiny_decoder(**FAMILIES[family]), packed, Watched(DropSchedule({layer: 0.5})))
    (after,) = states
    assert after.seqlens == (24, 13, 15)
    assert after.vision_counts == (12, 6, 0)
    for rows, texts in zip(after.vision_indices.split(after.seqlens), (12, 7, 15), strict=True):
        assert (rows == -1).sum() == texts
        kept = rows[rows >= 0].tolist()
        assert kept == sorted(set(kept))
    for positions in after.position_ids.split(after.seqlens, dim=-1):
        places = list(zip(*positions.expand(3, -1).tolist(), strict=True))
        assert places == sorted(places)
        # Averages share a place. A class token would share that of a patch, but no tower of a Qwen-VL has one.
        assert len(set(places)) == len(places) or (name in ("sparsevlm", "visionzip") and family.startswith("qwen"))


@pytest.mark.parametrize("name", DROPPERS)
def test_a_dropper_that_drops_nothing_from_a_picture_warns_loudly(name):
    layer = 0 if DROPPERS[name].latest_layer == 0 else 2
    with pytest.warns(NothingDropped, match="dropped nothing: all 24 vision tokens went through all 6 layers"):
        prefill(tiny_decoder(), one_prompt(5, 24, 7), DROPPERS[name](DropSchedule({layer: 1.0})))


def test_a_decoder_that_ends_before_the_method_begins_is_told_with_the_layers_that_it_needs():
    with pytest.raises(ValueError, match=r"^this method works from layer 1 on, but 1 layer runs; run at least 2$"):
        V2Drop(DropSchedule({0: 0.5})).check(1)
    V2Drop(DropSchedule({})).check(1)
