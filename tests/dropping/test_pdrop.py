"""PyramidDrop beside the authors' code."""

import pytest
import torch
from golden import Golden, check_run
from tiny import one_prompt, tiny_decoder

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule
from nanovlm_v2drop.dropping.schedule import OutOfReach
from nanovlm_v2drop.inference import prefill
from nanovlm_v2drop.models.vlm import PackedInputs

PyramidDrop = DROPPERS["pdrop"]


def test_kept_tokens_logits_cache_and_decode_equal_the_authors_code():
    golden = Golden.open("pdrop_b")
    out = check_run(golden, golden.decoder(), golden.packed(golden.inputs_embeds()), PyramidDrop.official())
    for stage, (_, (kept,)) in enumerate(out.kept):
        assert kept.tolist() == golden.tensors[f"kept{stage}"].tolist()
    assert out.cache.seqlens == [(length + 6,) for length in golden.tensors["kv_lengths"].tolist()]


def test_a_batch_of_two_equals_the_authors_code():
    golden = Golden.open("pdrop_batch2")
    embeds, rows = golden.tensors["inputs_embeds"], torch.arange(260)
    spans = golden.tensors["vision_spans"].tolist()
    mask = torch.cat([(rows >= start) & (rows < start + count) for start, count in spans])
    packed = PackedInputs(embeds.flatten(0, 1), rows.repeat(2), mask, [260, 260])
    out = check_run(golden, Golden.open("pdrop_b").decoder(), packed, PyramidDrop.official())
    for stage, (_, sequences) in enumerate(out.kept):
        for index, kept in enumerate(sequences):
            assert kept.tolist() == golden.tensors[f"row{index}.kept{stage}"].tolist()


def test_positions_close_up_behind_every_drop_and_decoding_goes_on_from_each_layers_own_length():
    out = prefill(tiny_decoder(), one_prompt(5, 24, 7), PyramidDrop(DropSchedule({2: 0.5, 4: 0.25})))
    assert out.cache.position_ids[:, 0].tolist() == [36, 36, 24, 24, 15, 15]
    assert [lengths[0] for lengths in out.cache.seqlens] == [36, 36, 24, 24, 15, 15]


@pytest.mark.parametrize(("target", "layers"), [(192, [8, 16, 24]), (128, [2, 8, 16]), (64, [2, 8, 16])])
def test_budgets_below_the_default_floor_move_the_drop_points_forward(target, layers):
    schedule = PyramidDrop.schedule_for(target, 576, 32)
    assert list(schedule) == layers
    assert schedule.mean_tokens(576, 32) == pytest.approx(target, abs=1)


def test_the_floor_is_named():
    with pytest.raises(OutOfReach, match=r"drop layers \[2, 8, 16\] of 32 .* between 36\.9 and 576"):
        PyramidDrop.schedule_for(20, 576, 32)
