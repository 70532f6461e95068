"""DyCoke beside the authors' code, and beside its rules written out."""

from dataclasses import replace
from math import prod

import pytest
import torch
import torch.nn.functional as F
from golden import Golden
from tiny import one_prompt, pack_together, tiny_decoder, tiny_prompts

from nanovlm_v2drop.dropping import DROPPERS, BatchSchedule, DropSchedule
from nanovlm_v2drop.dropping.dycoke import ReleasedFrames, compared_frames, released_frames
from nanovlm_v2drop.dropping.schedule import OutOfReach
from nanovlm_v2drop.inference import NothingDropped, decode_one_token, initial_state, prefill
from nanovlm_v2drop.models.decoder import rotary_table
from nanovlm_v2drop.models.vlm import PackedInputs

DyCoke = DROPPERS["dycoke"]
TOKENS = (7, 11, 42, 0, 2, 2, 2, 7, 7)  # some repeat, so that their attention is similar to that of the previous token


def video(features: torch.Tensor, before: int = 3, behind: int = 2) -> PackedInputs:
    """A prompt with one video: features (frames, tokens of a frame, D)."""
    frames, size, width = features.shape
    text = torch.randn(before + behind, width, generator=torch.Generator().manual_seed(1))
    embeds = torch.cat([text[:before], features.flatten(0, 1), text[before:]])
    rows = torch.arange(len(embeds))
    mask = (rows >= before) & (rows < before + frames * size)
    return PackedInputs(embeds, rows, mask, [len(embeds)], vision_grids=(((frames, 1, size),),))


def random_video(frames: int, size: int, seed: int = 0) -> PackedInputs:
    return video(torch.randn(frames, size, 32, generator=torch.Generator().manual_seed(seed)))


def kept_of(dropper, packed: PackedInputs) -> list[int]:
    """Numbers of the vision tokens that stay, in their order."""
    after = dropper(dropper.begin(initial_state(packed)))
    return after.vision_indices[after.vision_mask].tolist()


def as_one_video(packed: PackedInputs, *grids: tuple[int, int, int]) -> PackedInputs:
    return replace(packed, vision_grids=(grids,))


GOLDEN_CASES = [
    ("features_f8", 8, "K=0.7", "flat_index_f8"),
    ("features_f32", 32, "K=0.7", "flat_index_f32"),
    ("features_f8", 8, "K=0.5", "flat_index_f8_k50"),
    ("features_f8", 8, "K=0.9", "flat_index_f8_k90"),
    ("features_f8", 5, "K=0.7", "flat_index_first5"),
    ("features_f8", 7, "K=0.7", "flat_index_first7"),
]


@pytest.mark.parametrize(("features", "frames", "setting", "wanted"), GOLDEN_CASES, ids=lambda value: str(value))
def test_tokens_kept_of_each_frame_equal_the_authors_code_in_reading_order(features, frames, setting, wanted):
    golden = Golden.open("dycoke_stage1_b").tensors
    kept = kept_of(DyCoke.official(setting), video(golden[features][:frames]))
    assert kept == sorted(golden[wanted].tolist())
    assert kept != golden[wanted].tolist()  # the released code writes them by similarity
    assert DyCoke.official(setting).schedule.kept_count(0, 196 * frames) == len(kept)


@pytest.mark.parametrize(("frames", "kept"), [(1, 196), (2, 196 + 58), (3, 196 + 58), (4, 2 * 196 + 2 * 58)])
def test_the_released_rule_goes_on_where_the_released_code_stops(frames, kept):
    dropper = DyCoke.official()
    after = dropper(dropper.begin(initial_state(random_video(frames, 196))))
    assert after.vision_counts == (kept,)
    assert int((after.vision_indices < 196).sum()) == 5 + 196


def test_the_released_count_is_for_videos_and_leaves_pictures_alone():
    schedule = DyCoke.official().schedule
    assert schedule.kept_count(0, 0) == 0
    assert schedule.kept_count(0, 576) == 576
    assert schedule.mapped(12, 144).kept_count(0, 5 * 196) == 370
    picture = as_one_video(random_video(1, 576), (1, 24, 24))
    with pytest.warns(NothingDropped):
        prefill(tiny_decoder(), picture, DyCoke.official())


def test_the_released_setting_keeps_onevisions_newline_and_maps_to_frames_of_another_size():
    mapped = DyCoke.official().schedule.mapped(12, 8 * 36 + 1, frames=8)
    for schedule, size in ((DyCoke.official().schedule, 196), (mapped, 36)):
        reduced = int(0.3 * size)
        without, behind = random_video(8, size), random_video(1, 8 * size + 1)
        kept = kept_of(DyCoke(schedule), without)
        assert [sum(token // size == frame for token in kept) for frame in range(8)] == [
            size, reduced, reduced, reduced, size, reduced, size, reduced,
        ]  # fmt: skip
        with_newline = kept_of(DyCoke(schedule), as_one_video(behind, (8, 1, size), (1, 1, 1)))
        assert with_newline[-1] == 8 * size
        assert len(with_newline) == len(kept) + 1 == schedule.kept_count(0, 8 * size + 1)


OTHER_PROMPTS = [
    ((2, 14, 14), (2, 14, 14)), ((1, 28, 28),), ((8, 7, 14),), ((4, 1, 195), (1, 1, 4)), ((4, 12, 12),),
    ((4, 14, 14), (1, 1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("grids", OTHER_PROMPTS)
def test_prompts_that_the_released_count_would_take_for_others_are_refused(grids):
    packed = as_one_video(random_video(1, sum(map(prod, grids))), *grids)
    with pytest.raises(ValueError, match="the released setting is for one video of 196 tokens a frame, not"):
        prefill(tiny_decoder(), packed, DyCoke.official())


def test_the_exact_rule_keeps_one_whole_frame_of_four_and_the_released_rule_one_more():
    assert compared_frames(7) == {0: 0, 1: 0, 2: 0, 3: 2, 4: 4, 5: 4, 6: 4}
    assert released_frames(7) == {0: 0, 1: 0, 2: 0, 3: 2, 4: 4, 5: 4}
    assert released_frames(8) == {0: 0, 1: 0, 2: 0, 3: 2, 4: 4, 5: 4, 6: 6, 7: 6}


def test_the_floor_of_32_frames_is_25_percent_and_of_the_released_rule_28():
    assert ReleasedFrames(0.0).kept_count(0, 6272) / 6272 == pytest.approx(0.281, abs=5e-4)
    with pytest.raises(OutOfReach, match="with 32 frames of together 6272 vision tokens it lies between 1568 and") as caught:
        DyCoke.schedule_for(1500, 6272, 28, frames=32)
    assert caught.value.floor.mean_tokens(6272, 28) == 1568
    assert kept_of(DyCoke(caught.value.floor), random_video(32, 196)) == [
        frame * 196 + token for frame in range(0, 32, 4) for token in range(196)
    ]


@pytest.mark.parametrize("target", [1567.5, 1568, 3098, 4000.4, 6272])
def test_a_reachable_mean_is_met_within_half_a_token(target):
    schedule = DyCoke.schedule_for(target, 6272, 28, frames=32)
    assert schedule.mean_tokens(6272, 28) == pytest.approx(target, abs=0.5)
    assert schedule.mean_tokens(6272, 28) >= 1568


def test_every_count_that_can_be_kept_is_met():
    assert [DyCoke.schedule_for(count, 392, 28, frames=8).kept_count(0, 392) for count in range(98, 393)] == [*range(98, 393)]


def test_of_a_picture_nothing_can_be_dropped():
    with pytest.raises(OutOfReach, match="it lies between 144 and 144") as caught:
        DyCoke.schedule_for(48, 144, 12)
    assert caught.value.floor.mean_tokens(144, 12) == 144
    assert DyCoke.schedule_for(144, 144, 12).mean_tokens(144, 12) == 144
    picture = as_one_video(random_video(1, 24), (1, 4, 6))
    with pytest.warns(NothingDropped, match="all 24 vision tokens went through"):
        prefill(tiny_decoder(), picture, DyCoke(DropSchedule({0: 0.5})))


def test_a_video_of_one_frame_stays_whole_beside_a_longer_video():
    one_frame, longer = as_one_video(random_video(1, 13), (1, 3, 4), (1, 1, 1)), random_video(4, 6)
    dropper = DyCoke(DropSchedule({0: 0.5}))
    out = prefill(tiny_decoder(), pack_together([one_frame, longer]), dropper)
    (_, (first, second)), *_ = out.kept
    assert first.tolist() == list(range(13))
    assert second.tolist() == kept_of(dropper, longer)


def test_fewer_than_the_whole_frames_hold_is_refused():
    with pytest.raises(ValueError, match="cannot keep 11 of 36 tokens: 12 stand in pictures and whole frames"):
        kept_of(DyCoke(DropSchedule({0: 11.5 / 36})), random_video(6, 6))


def written_out(packed: PackedInputs, shares: list[int]) -> list[int]:
    """The slow twin for videos and pictures of one prompt; `shares` holds the number of tokens of each reduced frame."""
    features, first, kept, shares = packed.inputs_embeds[packed.vision_mask], 0, [], list(shares)
    for frames, rows, columns in packed.vision_grids[0]:
        size = rows * columns
        for frame in range(frames):
            own = range(first + frame * size, first + (frame + 1) * size)
            earlier = {0: 0, 1: 1, 2: 2, 3: 1}[frame % 4] * size
            like = {token: float(F.cosine_similarity(features[token], features[token - earlier], dim=0)) for token in own}
            kept += own if not earlier else sorted(own, key=like.__getitem__)[: shares.pop(0)]
        first += frames * size
    return sorted(kept)


@pytest.mark.parametrize(
    ("grids", "count", "shares"),
    [
        ([(8, 1, 6)], 12 + 13, [2, 2, 2, 2, 2, 3]),
        ([(7, 2, 3)], 12 + 22, [4, 4, 5, 4, 5]),
        ([(5, 1, 6)], 12 + 18, [6, 6, 6]),
        ([(1, 2, 4), (3, 1, 6), (1, 1, 5)], 8 + 6 + 5 + 7, [3, 4]),
        ([(2, 1, 4), (2, 1, 8)], 12 + 6, [2, 4]),
        ([(1, 2, 3), (6, 1, 3)], 6 + 6, [0, 0, 0, 0]),
    ],
)
def test_exactly_as_many_tokens_stay_as_asked_shared_evenly_by_the_reduced_frames(grids, count, shares):
    total = sum(frames * rows * columns for frames, rows, columns in grids)
    packed = as_one_video(random_video(1, total, seed=total), *grids)
    kept = kept_of(DyCoke(DropSchedule({0: min(1.0, (count + 0.5) / total)})), packed)
    assert kept == written_out(packed, shares)
    assert len(kept) == count


def test_each_sequence_of_a_batch_is_compared_with_its_own_frames_also_in_bfloat16():
    parts = [random_video(8, 6, 1), one_prompt(4, 0, 3), random_video(4, 9, 2), as_one_video(random_video(2, 12, 3), (2, 3, 4))]
    dropper = DyCoke(DropSchedule({0: 0.6}))
    for dtype in (torch.float32, torch.bfloat16):
        own = [replace(part, inputs_embeds=part.inputs_embeds.to(dtype)) for part in parts]
        after = dropper(initial_state(pack_together(own)))
        assert after.vision_counts == (28, 0, 21, 14)
        for rows, part in zip(after.vision_indices.split(after.seqlens), own, strict=True):
            assert rows[rows >= 0].tolist() == kept_of(dropper, part)


def test_a_drop_point_inside_the_decoder_is_refused():
    with pytest.raises(ValueError, match="drop layer 1 cannot act: this method works at layers 0 to 0"):
        prefill(tiny_decoder(), random_video(4, 6), DyCoke(DropSchedule({1: 0.5})))


def test_positions_are_contiguous_after_the_drop_and_decoding_goes_on_from_there():
    out = prefill(tiny_decoder(), random_video(4, 6), DyCoke(DropSchedule({0: 0.5})))
    assert out.cache.position_ids.flatten().tolist() == [5 + 12] * 6
    assert set(out.cache.seqlens) == {(17,)}


def test_the_drop_point_never_asks_for_a_value_on_the_device():
    state = initial_state(pack_together([random_video(6, 9), one_prompt(4, 0, 3)]))
    fields = ("hidden_states", "position_ids", "next_position", "vision_mask", "vision_indices")
    without_values = replace(state, **{name: getattr(state, name).to("meta") for name in fields})
    assert DyCoke(DropSchedule({0: 0.5}))(without_values).hidden_states.shape == (5 + 27 + 7, 32)


# Decoding


def visible_forward(decoder, packed, layer, prune, similarity):
    """The slow twin: one full forward of prompt and TOKENS without a cache; a mask hides what a new token does not see.

    Nothing is dropped before the decoder. Returns the logits of TOKENS and of each whether tokens were hidden from it.
    """
    embeds = torch.cat([packed.inputs_embeds, decoder.embed_tokens(torch.tensor(TOKENS))])
    prompt, vision = len(packed.inputs_embeds), packed.vision_mask.nonzero().flatten().tolist()
    visible = torch.ones(len(embeds), len(embeds)).tril().bool()
    rotary, hidden, pruned = rotary_table(decoder.config, torch.arange(len(embeds)), embeds.dtype), embeds, []

    def attend(q, k, v):
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        seen.append(scores.masked_fill(~visible, -torch.inf).softmax(-1))
        return torch.einsum("hqk,khd->qhd", seen[-1], v)

    seen: list[torch.Tensor] = []
    for layer_idx, block in enumerate(decoder.layers):
        if layer_idx == layer:
            attention = seen[-1].mean(0)
            for row in range(prompt, len(embeds)):
                now, before = attention[row, vision], attention[row - 1, vision]
                pruned.append(row == prompt or float((now @ before) / (now.norm() * before.norm())) < similarity)
                if pruned[-1]:
                    best = sorted(vision, key=lambda slot: -float(attention[row, slot]))[: int(len(vision) * (1 - prune))]
                    visible[row, [slot for slot in vision if slot not in best]] = False
        hidden = block(hidden, rotary, attend)
    return decoder.lm_head(decoder.norm(hidden))[prompt:], pruned


@pytest.mark.parametrize(
    ("share", "layer", "prune", "similarity"), [(1.0, 3, 0.7, 0.9), (0.5, 3, 0.7, 0.9), (0.75, 1, 0.5, 0.7), (1.0, 2, 1.0, 0.8)]
)
@pytest.mark.filterwarnings("ignore:.*dropped nothing")
@torch.no_grad()
def test_pruned_decoding_equals_decoding_with_the_other_slots_masked(share, layer, prune, similarity):
    decoder, packed = tiny_decoder(), one_prompt(5, 24, 7)
    dropper = DyCoke(DropSchedule({0: share}), layer, prune, similarity)
    left = dropper(initial_state(packed))
    shorter = PackedInputs(left.hidden_states, left.position_ids, left.vision_mask, left.seqlens)
    wanted, pruned = visible_forward(decoder, shorter, layer, prune, similarity)
    assert set(pruned[1:]) == {True, False}
    for _ in range(2):  # the second generation starts without history, like the first
        cache = prefill(decoder, packed, dropper).cache
        logits = torch.cat([decode_one_token(decoder, torch.tensor([token]), cache) for token in TOKENS])
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    assert cache.seqlens == [(12 + int(24 * share) + len(TOKENS),)] * 6  # nothing has left the cache


def looking(*weights: float) -> list[float]:
    """A query whose attention to the four vision tokens of `hand_made` has these weights."""
    return torch.tensor(weights).log().tolist()


def hand_made(similarity: float = 0.9):
    """Two prompts with text at slots 0 and 5, and 0 and 1. Returns the slots that each new token sees from layer 1 on."""
    state = initial_state(pack_together([one_prompt(1, 4, 1), one_prompt(2, 4, 0)]))
    pruning = DyCoke(DropSchedule({0: 1.0}), 1, 0.5, similarity).decode_pruning(replace(state, layer_idx=2))
    keys = torch.zeros(2, 10, 1, 4)
    keys[0, 1:5, 0] = keys[1, 2:6, 0] = 2 * torch.eye(4)  # times the scale of attention, 4 ** -0.5

    def step(length, *looks):
        q = torch.tensor(looks)[:, None]
        assert pruning(0, q, keys, (length, length)) is None
        first, later = (pruning(layer, q, keys, (length, length)) for layer in (1, 2))
        assert later is first
        return None if first is None else [slots.tolist() for slots in first]

    return step


def test_each_sequence_is_pruned_unless_its_new_token_looks_where_the_one_before_looked():
    step = hand_made()
    assert step(7, looking(1, 9, 1, 8), looking(9, 8, 1, 1)) == [[0, 2, 4, 5, 6], [0, 1, 2, 3, 6]]
    assert step(8, looking(1, 9, 1, 9), looking(1, 1, 8, 9)) == [list(range(8)), [0, 1, 4, 5, 6, 7]]
    assert step(9, looking(2, 9, 1, 9), looking(1, 1, 9, 8)) is None
    assert step(10, looking(9, 1, 1, 8), looking(1, 2, 9, 8)) == [[0, 1, 4, 5, 6, 7, 8, 9], list(range(10))]


def test_the_threshold_is_on_the_cosine_of_the_two_attentions():
    for similarity, pruned in ((0.66, False), (0.67, True)):  # of (1, 2, 3, 4) and (4, 3, 2, 1): 20 / 30
        step = hand_made(similarity)
        step(7, looking(1, 2, 3, 4), looking(1, 2, 3, 4))
        assert (step(8, looking(4, 3, 2, 1), looking(4, 3, 2, 1)) is not None) == pruned


@pytest.mark.filterwarnings("ignore:.*dropped nothing")
def test_generations_do_not_see_each_others_attention():
    decoder, dropper = tiny_decoder(), DyCoke(DropSchedule({0: 1.0}))
    one, other = (prefill(decoder, part, dropper).cache for part in tiny_prompts()[:2])
    assert one.pruning is not other.pruning
    token = torch.tensor([7])
    wanted = decode_one_token(decoder, token, prefill(decoder, tiny_prompts()[0], dropper).cache)
    decode_one_token(decoder, token, other)
    assert torch.equal(decode_one_token(decoder, token, one), wanted)


def test_a_sequence_without_vision_tokens_sees_everything_beside_pruned_ones():
    decoder, parts = tiny_decoder(), tiny_prompts()
    cache = prefill(decoder, pack_together(parts), DyCoke(DropSchedule({0: 0.5}))).cache
    decode_one_token(decoder, torch.tensor([3, 1, 4]), cache)
    assert [len(slots) for slots in cache.pruning.visible] == [12 + 3 + 1, 7 + 1 + 1, 15 + 1]
    assert prefill(decoder, parts[2], DyCoke(DropSchedule({0: 0.5}))).cache.pruning is None


@pytest.mark.parametrize(("num_layers", "layer"), [(6, 3), (4, 3), (3, 2), (2, 1)])
def test_pruning_begins_at_layer_3_or_at_the_last_layer_of_a_shallower_decoder(num_layers, layer):
    decoder, counts = tiny_decoder(num_hidden_layers=num_layers), []
    cache = prefill(decoder, one_prompt(5, 24, 7), DyCoke(DropSchedule({0: 0.5}))).cache
    pruning = cache.pruning

    def counted(*args):
        slots = pruning(*args)
        counts.append(25 if slots is None else len(slots[0]))
        return slots

    cache.pruning = counted
    decode_one_token(decoder, torch.tensor([7]), cache)
    assert counts == [25] * layer + [12 + 3 + 1] * (num_layers - layer)


def test_decode_pruning_is_on_as_published_and_can_be_turned_off():
    state = initial_state(one_prompt(5, 24, 7))
    dropper = DyCoke.official()
    assert (dropper.layer, dropper.prune, dropper.similarity) == (3, 0.7, 0.9)
    assert DyCoke(DropSchedule({0: 0.5}), prune=0.0).decode_pruning(state) is None


@pytest.mark.parametrize("bad", [{"layer": 0}, {"prune": 1.1}, {"prune": -0.1}])
def test_a_decode_setting_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match="must be 1 or more, for the attention before it, and prune"):
        DyCoke(DropSchedule({0: 0.5}), **bad)


def test_videos_of_a_batch_may_have_frames_of_several_sizes_with_a_released_setting_for_each():
    parts = [random_video(8, 6), random_video(5, 10, seed=2)]
    schedules = [ReleasedFrames(0.3, size) for size in (6, 10)]
    together = prefill(tiny_decoder(), pack_together(parts), DyCoke(BatchSchedule(schedules)))
    for index, (part, schedule) in enumerate(zip(parts, schedules, strict=True)):
        alone = prefill(tiny_decoder(), part, DyCoke(schedule))
        assert torch.equal(together.kept[0][1][index], alone.kept[0][1][0])
