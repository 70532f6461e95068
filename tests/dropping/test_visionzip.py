"""VisionZip beside the authors' algorithm written out in loops, and the way from a vision tower to its tokens."""

from dataclasses import replace
from itertools import pairwise
from math import prod
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import pack_together
from torch import Tensor

from nanovlm_v2drop import Request, generate, load
from nanovlm_v2drop.demo.scenes import any_scene, draw_scene
from nanovlm_v2drop.dropping import DROPPERS, PrefillState
from nanovlm_v2drop.dropping.before_decoder import share_evenly
from nanovlm_v2drop.dropping.schedule import CountSchedule
from nanovlm_v2drop.inference import initial_state, prefill
from nanovlm_v2drop.models.vision import VisionTrace
from nanovlm_v2drop.models.vision_qwen2 import multimodal_positions
from nanovlm_v2drop.models.vlm import PackedInputs
from nanovlm_v2drop.tasks.demo import held_out

VisionZip = DROPPERS["visionzip"]
MERGED = -2
BEFORE_DECODER = ("visionzip", "tome")
both_methods = pytest.mark.parametrize("name", BEFORE_DECODER)


def picture(num_patches: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> VisionTrace:
    """A trace of a tower with three heads of size 4, and a non-linear projector to size 32."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1 + num_patches, 12, generator=generator).to(device, dtype)
    keys = torch.randn(3, 1 + num_patches, 4, generator=generator).to(device, dtype)
    attention = torch.randn(3, 1 + num_patches, generator=generator).mul(2).softmax(-1)[:, 1:].to(device)
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return VisionTrace(hidden, lambda: attention, lambda: keys, lambda features: torch.tanh(features @ weight), 1)


def prompt(*parts: int | VisionTrace) -> PackedInputs:
    """One prompt of text (numbers of tokens) and pictures."""
    traces = tuple(part for part in parts if isinstance(part, VisionTrace))
    dtype = traces[0].hidden_states.dtype if traces else torch.float32
    noise = torch.Generator().manual_seed(len(parts))
    rows = [
        part.project(part.hidden_states[part.num_class_tokens :])
        if isinstance(part, VisionTrace)
        else torch.randn(part, 32, generator=noise).to(dtype)
        for part in parts
    ]
    mask = torch.cat([torch.full((len(row),), isinstance(part, VisionTrace)) for part, row in zip(parts, rows, strict=True)])
    grids = tuple((1, 1, len(trace.hidden_states) - trace.num_class_tokens) for trace in traces)
    return PackedInputs(torch.cat(rows), torch.arange(len(mask)), mask, [len(mask)], vision_grids=(grids,), vision=traces)


def on_a_grid(trace: VisionTrace, grid: tuple[int, int, int], before: int = 3, behind: int = 4) -> PackedInputs:
    """A picture in text whose positions are places in a grid, as in Qwen2-VL."""
    positions = multimodal_positions([0] * before + [1] * prod(grid) + [0] * behind, [grid], {1})
    return replace(prompt(before, trace, behind), position_ids=positions, vision_grids=((grid,),))


def without_class_token(num_patches: int, seed: int) -> VisionTrace:
    """A trace of Qwen2-VL's tower: merged patches, which need no projector."""
    trace = picture(num_patches, seed)
    features, keys = trace.project(trace.hidden_states[1:]), trace.keys()[:, 1:]
    return VisionTrace(features, trace.received_attention, lambda: keys, lambda hidden: hidden)


def naive_visionzip(trace: VisionTrace, count: int) -> tuple[Tensor, list[int]]:
    """The authors' algorithm, one patch at a time: rows (count, D), and the patch number of each row, or MERGED."""
    rows, numbers, _ = naive_visionzip_with_targets(trace, count)
    return rows, numbers


def naive_visionzip_with_targets(trace: VisionTrace, count: int) -> tuple[Tensor, list[int], list[int]]:
    """The same, with the patches from which the contextual tokens were made."""
    has_class = trace.num_class_tokens
    patches = trace.hidden_states[has_class:]
    heads = trace.received_attention()
    keys = trace.keys()[:, has_class:].sum(0)
    attention = [float(sum(head[patch] for head in heads)) for patch in range(len(patches))]
    num_contextual = count * 10 // 64 if count > 2 else 0
    num_class = has_class if count > 1 else 0
    ranked = sorted(range(len(patches)), key=lambda patch: -attention[patch])
    kept = sorted(ranked[: count - num_class - num_contextual])
    rest = [patch for patch in range(len(patches)) if patch not in kept]
    targets = [rest[number * (len(rest) // num_contextual)] for number in range(num_contextual)]
    joined = {target: [] for target in targets}
    for patch in rest:
        if targets and patch not in targets:
            similarity = [float(torch.cosine_similarity(keys[patch], keys[target], dim=0)) for target in targets]
            joined[targets[similarity.index(max(similarity))]].append(patches[patch])
    contextual = [patches[target] + (sum(mean) / len(mean) if mean else 0) for target, mean in joined.items()]
    hidden = [*trace.hidden_states[:num_class], *(patches[patch] for patch in kept), *contextual]
    return trace.project(torch.stack(hidden)), [MERGED] * num_class + kept + [MERGED] * num_contextual, targets


def compress(name: str, packed: PackedInputs, count: int) -> PrefillState:
    return DROPPERS[name](CountSchedule({0: count}))(initial_state(packed))


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 13, 20, 26, 33, 39])
def test_a_picture_becomes_what_the_authors_algorithm_makes_of_it(count):
    for seed in range(5):
        packed = prompt(3, picture(40, seed), 4)
        after = compress("visionzip", packed, count)
        rows, numbers = naive_visionzip(packed.vision[0], count)
        assert after.vision_indices.tolist() == [-1] * 3 + numbers + [-1] * 4
        torch.testing.assert_close(after.hidden_states[3 : 3 + count], rows, atol=1e-5, rtol=0)
        assert torch.equal(after.hidden_states[:3], packed.inputs_embeds[:3])
        assert torch.equal(after.hidden_states[-4:], packed.inputs_embeds[-4:])
        assert after.position_ids.tolist() == list(range(7 + count))


@pytest.mark.parametrize("count", [1, 2, 6, 7, 13, 26, 39])
def test_on_a_grid_kept_patches_and_contextual_tokens_have_the_places_of_their_patches_in_reading_order(count):
    for seed in range(5):
        trace = without_class_token(40, seed)
        packed = on_a_grid(trace, (4, 2, 5))
        after = compress("visionzip", packed, count)
        rows, numbers, targets = naive_visionzip_with_targets(trace, count)
        places = [number for number in numbers if number != MERGED] + targets
        in_order = sorted(range(count), key=places.__getitem__)
        assert after.vision_indices[3:-4].tolist() == [numbers[row] for row in in_order]
        torch.testing.assert_close(after.hidden_states[3:-4], rows[in_order], atol=1e-5, rtol=0)
        wanted = [*range(3), *(3 + place for place in sorted(places)), *range(43, 47)]
        assert after.position_ids.tolist() == packed.position_ids[:, wanted].tolist()


@both_methods
def test_on_a_grid_every_kept_patch_keeps_its_place_and_the_text_its_positions(name):
    clip, photo = on_a_grid(without_class_token(16, 1), (4, 2, 2)), on_a_grid(without_class_token(24, 2), (1, 4, 6))
    together = pack_together([clip, photo])
    for count in (1, 6, 13, 15):
        after = compress(name, together, count)
        for index, (packed, (start, end)) in enumerate(zip((clip, photo), after.spans, strict=True)):
            numbers, positions = after.vision_indices[start:end], after.position_ids[:, start:end]
            kept = numbers >= 0
            assert kept.sum() >= 0.8 * after.vision_counts[index]
            assert positions[:, kept].tolist() == packed.position_ids[:, 3 + numbers[kept]].tolist()
            assert positions[:, numbers == -1].tolist() == packed.position_ids[:, ~packed.vision_mask].tolist()
            places = positions[:, after.vision_mask[start:end]].T.tolist()
            assert all(first < second for first, second in pairwise(places))


def test_on_a_grid_a_class_token_has_the_place_of_the_first_patch():
    packed = on_a_grid(picture(16, 1), (4, 2, 2))
    after = compress("visionzip", packed, 13)
    rows, numbers, targets = naive_visionzip_with_targets(packed.vision[0], 13)
    torch.testing.assert_close(after.hidden_states[3], rows[0], atol=1e-5, rtol=0)
    places = [0, *sorted([number for number in numbers if number != MERGED] + targets)]
    assert after.position_ids[:, 3:-4].tolist() == packed.position_ids[:, [3 + place for place in places]].tolist()


@pytest.mark.parametrize(("setting", "parts"), [("64", (1, 53, 10)), ("128", (1, 107, 20)), ("192", (1, 161, 30))])
def test_the_authors_settings_are_the_class_token_patches_and_contextual_tokens(setting, parts):
    dropper = VisionZip.official(setting)
    assert dropper.split(dropper.schedule.kept_count(0, 576), 1) == parts


def test_with_a_contextual_share_of_zero_only_the_class_token_is_new():
    zipped = VisionZip(CountSchedule({0: 20}), contextual_share=0.0)(initial_state(prompt(3, picture(40, 0), 4)))
    assert (zipped.vision_indices == MERGED).sum() == 1


def test_two_tokens_are_the_class_token_and_a_patch_and_one_is_a_patch():
    assert (VisionZip.official().split(2, 1), VisionZip.official().split(1, 1)) == ((1, 1, 0), (0, 1, 0))


def test_at_least_one_patch_is_kept_with_any_contextual_share():
    for count in range(1, 9):
        assert VisionZip(CountSchedule({0: count}), contextual_share=0.99).split(count, 1)[1] >= 1


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_contextual_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"contextual_share .* must be in \[0, 1\)"):
        VisionZip(CountSchedule({0: 1}), contextual_share=share)


@both_methods
@pytest.mark.parametrize(
    ("sizes", "shares"),
    [((14, 14), (6, 5)), ((14, 10), (1, 1)), ((14, 14), (1, 0)), ((14, 10), (12, 10)), ((14, 10), (13, 10))],
)
def test_pictures_of_one_sequence_are_compressed_one_by_one_and_stay_in_their_places(name, sizes, shares):
    first, second = picture(sizes[0], 1), picture(sizes[1], 2)
    packed = prompt(3, first, 2, second, 4)
    after = compress(name, packed, sum(shares))
    texts = packed.inputs_embeds[~packed.vision_mask].split([3, 2, 4])
    rows, numbers = [texts[0]], [-1] * 3
    for trace, share, text, offset in ((first, shares[0], texts[1], 0), (second, shares[1], texts[2], 14)):
        alone = DROPPERS[name](CountSchedule({0: share}, minimum=0))(initial_state(prompt(1, trace, 1)))
        rows += [alone.hidden_states[1:-1], text]
        numbers += [number + offset if number >= 0 else number for number in alone.vision_indices[1:-1].tolist()]
        numbers += [-1] * len(text)
    assert after.vision_indices.tolist() == numbers
    torch.testing.assert_close(after.hidden_states, torch.cat(rows), atol=1e-6, rtol=0)


@both_methods
def test_sequences_of_a_batch_do_not_touch_each_other(name):
    two_pictures, small_picture = prompt(3, picture(14, 1), 2, picture(10, 2), 4), prompt(2, picture(4, 4), 1)
    prompts = [two_pictures, prompt(5), prompt(1, picture(9, 3), 2), small_picture]
    together = compress(name, pack_together(prompts), 6)
    assert together.vision_counts == (6, 0, 6, 4)
    for number, (start, end) in enumerate(together.spans):
        alone = compress(name, prompts[number], 6)
        torch.testing.assert_close(together.hidden_states[start:end], alone.hidden_states, atol=1e-6, rtol=0)
        assert together.vision_indices[start:end].tolist() == alone.vision_indices.tolist()
        assert together.position_ids[start:end].tolist() == list(range(end - start))


@both_methods
def test_keeping_as_many_as_there_are_changes_nothing(name):
    state = initial_state(prompt(3, picture(14, 1), 2))
    assert DROPPERS[name](CountSchedule({0: 14}))(state) is state


@both_methods
def test_no_picture_is_left_where_the_schedule_leaves_none(name):
    packed = prompt(3, picture(14, 1), 2)
    after = DROPPERS[name](CountSchedule({0: 0}, minimum=0))(initial_state(packed))
    assert torch.equal(after.hidden_states, packed.inputs_embeds[~packed.vision_mask])


@both_methods
def test_the_tensors_of_the_input_stay_as_they_were(name):
    packed = prompt(3, picture(14, 1), 2)
    trace = packed.vision[0]
    tensors = [packed.inputs_embeds, packed.position_ids, packed.vision_mask, trace.hidden_states]
    tensors += [trace.keys(), trace.received_attention()]
    before = [tensor.clone() for tensor in tensors]
    state = initial_state(packed)
    numbers = state.vision_indices.clone()
    DROPPERS[name](CountSchedule({0: 9}))(state)
    assert all(map(torch.equal, tensors, before))
    assert torch.equal(state.vision_indices, numbers)


@both_methods
def test_the_drop_point_asks_the_device_for_no_number(name):
    state = initial_state(prompt(3, picture(14, 1), 2, picture(10, 2), 1))
    fields = ("hidden_states", "position_ids", "next_position", "vision_mask", "vision_indices")
    on_meta = {field: getattr(state, field).to("meta") for field in fields}  # has shapes but no values
    traces = (picture(14, 1, device="meta"), picture(10, 2, device="meta"))
    after = DROPPERS[name](CountSchedule({0: 9}))(replace(state, vision=traces, **on_meta))
    assert after.hidden_states.shape == (3 + 2 + 1 + 9, 32)


@both_methods
def test_bfloat16_keeps_the_dtype_and_comes_near_float32(name):
    coarse, project = picture(14, 1, torch.bfloat16), picture(1, 1).project
    fine = VisionTrace(coarse.hidden_states.float(), coarse.received_attention, lambda: coarse.keys().float(), project, 1)
    half, full = compress(name, prompt(3, coarse, 2), 9), compress(name, prompt(3, fine, 2), 9)
    assert half.hidden_states.dtype == torch.bfloat16
    assert half.vision_indices.tolist() == full.vision_indices.tolist()
    torch.testing.assert_close(half.hidden_states[3:-2].float(), full.hidden_states[3:-2], atol=0.05, rtol=0)


@both_methods
def test_inputs_without_a_trace_of_each_picture_are_refused(name):
    packed = prompt(3, picture(14, 1), 2)
    with pytest.raises(ValueError, match=rf"{name} needs a trace of each picture .* hold \[14\] .*, the traces \[\]"):
        compress(name, replace(packed, vision=()), 9)
    with pytest.raises(ValueError, match=r"hold \[14\] vision tokens, the traces \[13\]"):
        compress(name, replace(packed, vision=(picture(13, 1),)), 9)


@both_methods
def test_the_mean_of_tokens_is_the_count_and_the_drop_point_is_before_the_decoder(name):
    schedule = DROPPERS[name].schedule_for(48, 144, 12)
    assert schedule.vision_tokens_per_layer(144, 12) == [48] * 12
    with pytest.raises(ValueError, match="drop layer 1 cannot act: this method works at layers 0 to 0"):
        prefill(load("demo").model.language_model, prompt(3), DROPPERS[name](CountSchedule({1: 9})))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 60))
def test_a_count_is_shared_as_evenly_as_the_pictures_allow(sizes, count):
    count = min(count, sum(sizes))
    shares = share_evenly(count, sizes)
    assert sum(shares) == count
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    not_full = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert max(shares) - min(not_full, default=max(shares)) <= 1


@given(st.lists(st.integers(1, 12), min_size=2, max_size=5), st.integers(0, 60))
def test_a_picture_gets_no_less_than_a_smaller_one(sizes, count):
    shares = share_evenly(min(count, sum(sizes)), sizes)
    by_size = [share for _, share in sorted(zip(sizes, shares, strict=True))]
    assert by_size == sorted(by_size)


@pytest.mark.parametrize(
    ("count", "sizes", "shares"),
    [
        (1, [288, 1], [1, 0]),
        (2, [288, 1], [1, 1]),
        (2, [576, 8, 8], [1, 1, 0]),
        (10, [8, 8, 576], [3, 3, 4]),
        (20, [8, 8, 576], [7, 6, 7]),
    ],
)
def test_what_cannot_be_divided_goes_to_the_larger_grids_and_not_to_a_newline(count, sizes, shares):
    assert share_evenly(count, sizes) == shares


def test_of_equal_pictures_the_first_get_what_cannot_be_divided():
    assert share_evenly(8, [9, 9, 9]) == [3, 3, 2]


@pytest.fixture(scope="module")
def vlm():
    return load("demo")


def question(seed: int) -> Request:
    return Request(text="How many things are there?", images=[draw_scene(any_scene(Random(seed)))])


@torch.no_grad()
def test_the_trace_holds_what_the_towers_weights_give(vlm):
    request, tower = question(1), vlm.model.vision_tower
    (trace,) = vlm.prepare([request]).vision
    hidden = tower.pre_layrnorm(tower.embeddings(vlm.image_processor(request.images)))
    *blocks, last = tower.encoder.layers
    for block in blocks:
        hidden = block(hidden, "sdpa")
    torch.testing.assert_close(trace.hidden_states, last(hidden, "sdpa")[0], atol=1e-5, rtol=0)
    weights, normed = last.self_attn, last.layer_norm1(hidden)[0]
    keys = normed @ weights.k_proj.weight.T + weights.k_proj.bias
    torch.testing.assert_close(torch.cat(list(trace.keys()), dim=-1), keys, atol=1e-5, rtol=0)
    query = weights.q_proj.weight @ normed[0] + weights.q_proj.bias
    size = len(query) // weights.num_heads
    for head, row in enumerate(trace.received_attention()):
        part = slice(head * size, (head + 1) * size)
        wanted = (keys[:, part] @ query[part] / size**0.5).softmax(0)[1:]
        torch.testing.assert_close(row, wanted, atol=1e-6, rtol=0)


@torch.no_grad()
def test_on_the_demo_model_kept_rows_are_projected_patches_and_the_rest_is_as_in_the_loops(vlm):
    packed = vlm.prepare([question(1), Request(text="Hello"), question(2)])
    after = compress("visionzip", packed, 32)
    features = vlm.model.encode_images(vlm.image_processor([*question(1).images, *question(2).images]))
    for sequence, trace, projected in zip((0, 2), packed.vision, features, strict=True):
        start, end = after.spans[sequence]
        rows = after.hidden_states[start:end][after.vision_mask[start:end]]
        numbers = after.vision_indices[start:end][after.vision_mask[start:end]]
        torch.testing.assert_close(rows[numbers >= 0], projected[numbers[numbers >= 0]], atol=1e-5, rtol=0)
        wanted_rows, wanted_numbers = naive_visionzip(trace, 32)
        assert numbers.tolist() == wanted_numbers
        torch.testing.assert_close(rows, wanted_rows, atol=1e-4, rtol=0)


@both_methods
def test_an_answer_comes_out_of_what_is_left(vlm, name):
    samples = [held_out(number) for number in range(12)]
    requests = [Request(text=sample.text, images=sample.images) for sample in samples]
    answers = generate(vlm, requests, DROPPERS[name](CountSchedule({0: 72})), max_new_tokens=8)
    assert sum(answer.text == sample.answer for answer, sample in zip(answers, samples, strict=True)) >= 8
    assert [len(kept) for answer in answers for _, kept in answer.kept] == [60 if name == "visionzip" else 72] * 12
