"""DART beside the authors' code, and beside the rule written out in loops."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, check_run
from tiny import one_prompt, pack_together, tiny_decoder, tiny_prompts

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule
from nanovlm_v2drop.dropping import dart as module
from nanovlm_v2drop.inference import initial_state, prefill
from nanovlm_v2drop.models.vlm import PackedInputs

DART = DROPPERS["dart"]


def test_kept_tokens_logits_cache_and_decode_equal_the_authors_code():
    golden = Golden.open("dart_b")
    out = check_run(golden, golden.decoder(), golden.packed(golden.inputs_embeds()), DART.official("reduction 0.778"))
    assert out.kept[0][1][0].tolist() == golden.tensors["kept0"].tolist()


def test_key_norms_pivots_their_order_and_what_each_takes_equal_the_authors_code(monkeypatch):
    golden, seen = Golden.open("dart_b"), {}

    def watch(name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: seen.setdefault(name, original(*args)))

    class Watching(DART):
        def ordered(self, pivots):
            seen["pivots"], seen["ordered"] = pivots, super().ordered(pivots)
            return seen["ordered"]

    watch("key_norms")
    watch("take_in_turn")
    packed = golden.packed(golden.inputs_embeds())
    prefill(golden.decoder(), packed, Watching.official("reduction 0.778"))
    start, count = golden.tensors["vision_span"].tolist()
    _, image, text = seen["key_norms"].split((start, count, len(packed.inputs_embeds) - start - count))
    torch.testing.assert_close(image, golden.tensors["key_l1_image"], atol=1e-4, rtol=0)
    torch.testing.assert_close(text, golden.tensors["key_l1_text"], atol=1e-4, rtol=0)
    pivots = torch.cat([golden.tensors["pivots_image"] + start, golden.tensors["pivots_text"]])
    assert seen["pivots"].tolist() == pivots.tolist()
    assert seen["ordered"].tolist() == golden.tensors["pivot_order"].tolist()
    assert [(rows - start).tolist() for rows in seen["take_in_turn"]] == golden.tensors["selected_per_pivot"].tolist()


@pytest.mark.parametrize(
    ("setting", "kept", "mean"),
    [("128", 132, 159.75), ("192", 196, 219.75), ("64", 68, 99.75), ("reduction 0.778", 124, 152.25)],
)
def test_published_settings_keep_four_image_pivots_and_equally_many_tokens_for_each_pivot(setting, kept, mean):
    dropper = DART.official(setting)
    assert dropper.pivot_order == "released"
    assert dropper.schedule.vision_tokens_per_layer(576, 32) == [576] * 2 + [kept] * 30
    assert dropper.schedule.mean_tokens(576, 32) == mean


def test_the_first_published_setting_is_the_default_of_the_scripts():
    assert DART.official().schedule.kept_count(2, 576) == 132


def test_a_share_is_mapped_to_another_decoder_as_a_share_of_equal_picks():
    schedule = DART.official("reduction 0.778").schedule.mapped(12, 144)
    assert schedule.vision_tokens_per_layer(144, 12) == [144] + [4 + 8 * 3] * 11
    assert schedule.kept_count(1, 3) == 3


def state_of(packed: PackedInputs, seed: int = 3):
    """At the entrance of layer 1, with random keys of two heads and a final norm that is not the identity."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(len(packed.inputs_embeds), 2, 8, generator=generator)
    weight = 1 + 0.3 * torch.randn(packed.inputs_embeds.shape[-1], generator=generator)
    return replace(initial_state(packed), layer_idx=1, queries=keys, keys=keys, final_norm=lambda hidden: hidden * weight)


def written_out(packed: PackedInputs, count: int) -> list[int]:
    """The slow twin for one prompt: kept vision rows, one token at a time. Image pivots replace missing text pivots."""
    state = state_of(packed)
    hidden, norms = state.final_norm(state.hidden_states), state.keys.abs().sum((1, 2)).tolist()
    vision = [row for row, is_vision in enumerate(packed.vision_mask.tolist()) if is_vision]
    text = range(vision[-1] + 1, len(norms))
    by_norm = sorted(vision, key=lambda row: -norms[row])
    texts = sorted(text, key=lambda row: -norms[row])[:4]
    kept = by_norm[: min(4, count)]
    pivots = kept + texts + kept[len(texts) :]
    for turn, pivot in enumerate(pivots):
        for _ in range(len(range(turn, count - 4, 8))):  # one token for each round that reaches this pivot
            left = [row for row in vision if row not in kept]
            kept.append(min(left, key=lambda row: float(F.cosine_similarity(hidden[pivot], hidden[row], dim=0))))
    return sorted(kept)


def two_pictures() -> PackedInputs:
    rows = torch.arange(40)
    mask = ((rows >= 3) & (rows < 15)) | ((rows >= 21) & (rows < 33))
    embeds = torch.randn(40, 32, generator=torch.Generator().manual_seed(5))
    return PackedInputs(embeds, rows, mask, [40], vision_grids=(((1, 3, 4), (1, 3, 4)),))


LAYOUTS = {
    "one picture": one_prompt(5, 24, 7),
    "two text tokens behind": one_prompt(6, 24, 2, seed=2),
    "nothing behind": one_prompt(0, 24, 0, seed=4),
    "two pictures": two_pictures(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 3, 4, 5, 11, 12, 13, 23, 24])
def test_any_number_is_kept_as_by_the_rule_written_out(layout, count):
    packed = LAYOUTS[layout]
    rows = DART(DropSchedule({1: 0.5})).select(state_of(packed), (count,)).tolist()
    kept = [row for row in rows if packed.vision_mask[row]]
    assert kept == written_out(packed, count)
    assert [row for row in rows if not packed.vision_mask[row]] == (~packed.vision_mask).nonzero().flatten().tolist()


@pytest.mark.parametrize("order", ["rank", "released"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sequence_of_a_batch_has_its_own_pivots(order, dtype):
    decoder, dropper = tiny_decoder().to(dtype), DART(DropSchedule({2: 0.6}), order)
    parts = [replace(part, inputs_embeds=part.inputs_embeds.to(dtype)) for part in tiny_prompts()]
    together = prefill(decoder, pack_together(parts), dropper)
    for index, part in enumerate(parts[:2]):
        assert together.kept[0][1][index].tolist() == prefill(decoder, part, dropper).kept[0][1][0].tolist()
    assert together.cache.seqlens[2] == (12 + 14, 7 + 7, 15)


def test_released_pivots_are_listed_as_a_set_of_their_rows():
    dropper = DART(DropSchedule({1: 0.5}), "released")
    assert dropper.ordered(torch.tensor([479, 385, 91, 72, 125, 458])).tolist() == [385, 72, 458, 91, 125, 479]  # modulo 32
    colliding = [8, 9, 40, 1, 33, 2, 50, 41]  # the places of 8 and 9, where 40 would go, are taken
    assert dropper.ordered(torch.tensor(colliding)).tolist() == list(set(colliding))
    assert dropper.ordered(torch.tensor([5, 3, 3, 5])).tolist() == [3, 3, 5, 5]


def test_the_order_of_the_pivots_changes_what_is_kept():
    state = state_of(one_prompt(5, 24, 7))
    ranked, released = (DART(DropSchedule({1: 0.5}), order).select(state, (13,)) for order in ("rank", "released"))
    assert ranked.tolist() != released.tolist()


def test_pivots_by_rank_never_ask_for_a_value_on_the_device():
    state = state_of(pack_together([one_prompt(5, 24, 7), one_prompt(4, 0, 3)]))
    fields = ("hidden_states", "position_ids", "next_position", "vision_mask", "vision_indices", "keys", "queries")
    without_values = replace(
        state, **{name: getattr(state, name).to("meta") for name in fields}, final_norm=lambda hidden: hidden * 2
    )
    assert DART(DropSchedule({1: 0.5}))(without_values).hidden_states.shape == (12 + 12 + 7, 32)


def test_an_unknown_pivot_order_is_refused():
    with pytest.raises(ValueError, match="unknown pivot order 'alphabet'; choose one of: rank, released"):
        DART(DropSchedule({1: 0.5}), "alphabet")
