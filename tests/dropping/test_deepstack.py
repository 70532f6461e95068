"""What Qwen3-VL's tower adds behind the first layers stays with kept tokens, and is combined for new tokens as features are.

The oracle makes deepstack out of the features. Whatever a method does to the features, it must do to each level of deepstack.
"""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, one_prompt, pack_together, tiny_decoder, tiny_prompts
from tiny_methods import SCHEDULE, every_method, make

from nanovlm_v2drop.dropping import DROPPERS, CountSchedule, DropSchedule, TokenDropper
from nanovlm_v2drop.dropping.contract import ContractBroken
from nanovlm_v2drop.inference import initial_state, prefill
from nanovlm_v2drop.models.vlm import PackedInputs

FACTORS = torch.tensor([1.0, -2.0, 0.5])  # a level is so many times the features
MERGING = [name for name in DROPPERS if DROPPERS[name].merges]
every_method_before_the_decoder = pytest.mark.parametrize(
    "name", [name for name in DROPPERS if DROPPERS[name].latest_layer == 0]
)


def proportional(packed: PackedInputs) -> PackedInputs:
    """The prompt with levels of deepstack that are multiples of the features."""
    levels = packed.inputs_embeds[:, None] * FACTORS[:, None] * packed.vision_mask[:, None, None]
    plain = [replace(trace, hidden_states=trace.hidden_states[1:] + 1, keys=own_keys(trace), project=torch.nn.Identity(),
                     num_class_tokens=0) for trace in packed.vision]  # fmt: skip
    return replace(packed, deepstack=levels, vision=tuple(plain))


def own_keys(trace):
    keys = trace.keys()[:, 1:]
    return lambda: keys


@every_method_before_the_decoder
@pytest.mark.filterwarnings("ignore:.*dropped nothing")
def test_before_the_decoder_deepstack_is_reduced_as_the_features_are(name) -> None:
    parts = [proportional(one_prompt(5, 24, 7, family="qwen3-vl")), proportional(one_prompt(3, 12, 4, 2, family="qwen3-vl"))]
    state = initial_state(pack_together(parts))
    after = make(name, share=0.6)(state)
    assert after.seqlens != state.seqlens
    features = after.hidden_states * after.vision_mask[:, None]
    for level, factor in enumerate(FACTORS):
        torch.testing.assert_close(after.deepstack[:, level], factor * features)


def test_the_released_holov_fills_deepstack_with_zeros_where_it_fills_features() -> None:
    packed = proportional(one_prompt(5, 24, 7, family="qwen3-vl"))
    peaked = torch.zeros(2, 24).index_fill(1, torch.tensor([0]), 1.0)
    packed = replace(packed, vision=(replace(packed.vision[0], received_attention=lambda: peaked),))
    after = DROPPERS["holov"](CountSchedule({0: 12}), released=True)(initial_state(packed))
    zeros = after.vision_indices == -2
    assert zeros.any()
    assert not after.deepstack[zeros].any()
    features = after.hidden_states * after.vision_mask[:, None]
    torch.testing.assert_close(after.deepstack[:, 1], -2.0 * features)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_sparsevlm_averages_the_deepstack_that_is_still_to_come(layer: int) -> None:
    """The twin merges rows whose deepstack is written behind their features, by the same weights."""
    decoder, packed = tiny_decoder(**FAMILIES["qwen3-vl"]), one_prompt(5, 24, 7, family="qwen3-vl")
    seen = {}

    class Watching(DROPPERS["sparsevlm"]):
        def __call__(self, state):
            before = replace(state)
            seen[state.layer_idx] = before, super().__call__(state)
            return seen[state.layer_idx][1]

    prefill(decoder, packed, Watching(DropSchedule({layer: 0.5})))
    before, after = seen[layer]
    if layer == 3:
        assert before.deepstack is after.deepstack is None
        return
    assert before.deepstack.shape[1] == after.deepstack.shape[1] == 3 - layer
    numbers, new = after.vision_indices, after.vision_indices == -2
    rows = {int(number): row for row, number in enumerate(before.vision_indices) if number >= 0}
    old = [rows[int(number)] for number in numbers if number >= 0]
    assert torch.equal(after.deepstack[numbers >= 0], before.deepstack[old])
    assert not after.deepstack[numbers == -1].any()
    # The averages are sums of rows: the weights that explain the features explain deepstack too.
    pruned = torch.tensor([row for number, row in rows.items() if number not in numbers.tolist()])
    weights = torch.linalg.lstsq(before.hidden_states[pruned].T, after.hidden_states[new].T).solution
    torch.testing.assert_close(after.hidden_states[new], weights.T @ before.hidden_states[pruned], atol=1e-4, rtol=0)
    expected = torch.einsum("pc,psd->csd", weights, before.deepstack[pruned])
    torch.testing.assert_close(after.deepstack[new], expected, atol=1e-3, rtol=0)


@every_method
@pytest.mark.filterwarnings("ignore:.*dropped nothing")
def test_levels_of_zeros_change_nothing(name) -> None:
    decoder, packed = tiny_decoder(**FAMILIES["qwen3-vl"]), pack_together(tiny_prompts(family="qwen3-vl"))
    without, zeros = replace(packed, deepstack=None), replace(packed, deepstack=torch.zeros_like(packed.deepstack))
    first, second = (prefill(decoder, prompt, make(name)) for prompt in (without, zeros))
    assert torch.equal(first.logits, second.logits)
    for (_, kept), (_, wanted) in zip(first.kept, second.kept, strict=True):
        assert all(torch.equal(*pair) for pair in zip(kept, wanted, strict=True))


@pytest.mark.parametrize("name", ["v2drop", "clse", "transprune"])
def test_methods_that_rank_by_a_change_do_not_see_what_the_tower_adds_last(name: str) -> None:
    """With a level that is added behind layer 0 alone, the choice at layer 1 is that of a decoder without it."""
    decoder, packed = tiny_decoder(**FAMILIES["qwen3-vl"]), one_prompt(5, 24, 7, family="qwen3-vl")
    huge = replace(packed, deepstack=100 * packed.deepstack[:, :1])
    options = {"mode": "clse"} if name == "clse" else {}

    class FirstPart(DROPPERS[name]):
        """TransPrune's own part: the question's attention in the next layer depends on what the tower added."""

        def question_attention(self, state):
            return torch.zeros(len(state.hidden_states))

    chosen = [
        prefill(decoder, prompt, FirstPart(DropSchedule({1: 0.5}), **options)).kept[0][1][0].tolist()
        for prompt in (huge, replace(packed, deepstack=None))
    ]
    assert chosen[0] == chosen[1]
    if name == "v2drop":
        whole = DROPPERS[name](DropSchedule({1: 0.5}), with_deepstack=True)
        assert prefill(decoder, huge, whole).kept[0][1][0].tolist() != chosen[0]


def test_a_foreign_method_that_leaves_deepstack_behind_is_told() -> None:
    class Forgetful(TokenDropper):
        name = "forgetful"

        def compress(self, state, vision_counts):
            best = [rows[:count] for rows, count in zip(state.vision_rows(), vision_counts, strict=True)]
            keep = torch.cat([*state.text_rows(), *best])
            return replace(state.take(keep.sort().values, vision_counts), deepstack=state.deepstack)

    Forgetful.__module__ = "elsewhere"
    decoder, packed = tiny_decoder(**FAMILIES["qwen3-vl"]), one_prompt(5, 24, 7, family="qwen3-vl")
    with pytest.raises(ContractBroken, match=r"keeps another number of rows than its schedule says: .*deepstack 36"):
        prefill(decoder, packed, Forgetful(SCHEDULE))


def test_the_merging_methods_are_those_tested_here() -> None:
    assert set(MERGING) == {"visionzip", "tome", "fastvid", "sparsevlm"}
