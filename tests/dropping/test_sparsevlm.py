"""SparseVLM and SparseVLM+ beside the authors' code, and beside slow twins written with loops."""

import math
from dataclasses import replace

import pytest
import torch
from golden import Golden, check_run
from tiny import one_prompt, pack_together, tiny_decoder, tiny_prompts
from torch import Tensor

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule, sparsevlm
from nanovlm_v2drop.dropping.base import MERGED
from nanovlm_v2drop.dropping.schedule import CountSchedule, OutOfReach
from nanovlm_v2drop.dropping.sparsevlm import cluster_means, clusters_of, recycled_count, split_count, text_raters
from nanovlm_v2drop.dropping.sparsevlm_plus import gravity
from nanovlm_v2drop.inference import initial_state, prefill
from nanovlm_v2drop.models.attention import attention_weights
from nanovlm_v2drop.models.config import TextConfig
from nanovlm_v2drop.models.decoder import rotary_table
from nanovlm_v2drop.models.vlm import PackedInputs

SparseVLM, SparseVLMPlus = DROPPERS["sparsevlm"], DROPPERS["sparsevlm-plus"]
both_versions = pytest.mark.parametrize("method", [SparseVLM, SparseVLMPlus])


def watched(method):
    """The method's class, which notes `begun`, and `before`, `after`, `scores` and `heads` of each drop point."""

    class Watched(method):
        begun, before, after, scores, heads = None, [], [], [], []

        def begin(self, state):
            self.begun = replace(super().begin(state))  # prefill changes the state itself later
            return replace(self.begun)

        def __call__(self, state):
            self.before.append(replace(state))
            self.after.append(replace(super().__call__(state)))
            return replace(self.after[-1])

        def score(self, state):
            self.scores.append(super().score(state))
            return self.scores[-1]

        def best_heads(self, mass):
            self.heads.append(super().best_heads(mass))
            return self.heads[-1]

    return Watched


def two_pictures() -> PackedInputs:
    """Text 3, picture 8, text 4, picture 6, text 5."""
    mask = torch.cat([torch.full((count,), kind) for count, kind in ((3, False), (8, True), (4, False), (6, True), (5, False))])
    grids = (((1, 2, 4), (1, 2, 3)),)
    return PackedInputs(one_prompt(0, 0, 26).inputs_embeds, torch.arange(26), mask, [26], seeds=(5,), vision_grids=grids)


@pytest.mark.parametrize(
    ("name", "method", "setting"), [("sparsevlm_v1_b", SparseVLM, "192"), ("sparsevlm_v2_b", SparseVLMPlus, "192")]
)
def test_raters_scores_kept_tokens_logits_cache_and_decode_equal_the_authors_code(name, method, setting):
    golden, dropper = Golden.open(name), watched(method).official(setting)
    out = check_run(golden, golden.decoder(), golden.packed(golden.inputs_embeds()), dropper)
    start, count = golden.tensors["vision_span"].tolist()
    assert (dropper.begun.marks.nonzero().flatten() - start - count).tolist() == golden.tensors["raters"].tolist()
    for stage, (before, scores, after) in enumerate(zip(dropper.before, dropper.scores, dropper.after, strict=True)):
        wanted = golden.tensors[f"score{stage}"]
        torch.testing.assert_close(scores[before.vision_mask], wanted, atol=3e-6, rtol=0)
        provenance = golden.tensors[f"provenance{stage}"]
        numbers = torch.where(provenance < 0, MERGED, provenance)
        text = [-1] * len(golden.tensors["rater_score"])
        assert after.vision_indices.tolist() == [-1] * start + numbers.tolist() + text
        assert after.marks[-len(text) :].tolist() == dropper.begun.marks[-len(text) :].tolist()
    assert len(dropper.after) == 3
    first = golden.tensors["decode0_position_per_layer"]
    assert out.cache.position_ids[:, 0].tolist() == (first + len(golden.tensors["tokens"])).tolist()


def test_merged_tokens_equal_the_authors_code_and_stand_behind_the_last_kept_one():
    golden = Golden.open("sparsevlm_v1_b")
    dropper = watched(SparseVLM).official("192")
    prefill(golden.decoder(), golden.packed(golden.inputs_embeds()), dropper)
    for stage, after in enumerate(dropper.after):
        wanted = golden.tensors[f"merged{stage}"]
        vision = after.hidden_states[after.vision_mask]
        torch.testing.assert_close(vision[-len(wanted) :], wanted, atol=1e-4, rtol=0)


def test_the_heads_are_those_of_the_authors_code():
    golden, dropper = Golden.open("sparsevlm_v2_b"), watched(SparseVLMPlus).official("192")
    prefill(golden.decoder(), golden.packed(golden.inputs_embeds()), dropper)
    assert [heads.tolist() for heads in dropper.heads] == [golden.tensors[f"heads{stage}"].tolist() for stage in range(3)]


@pytest.mark.parametrize(
    ("method", "setting", "originals", "totals", "mean"),
    [
        (SparseVLM, "192", (300, 200, 110), (309, 204, 113), 206.5),
        (SparseVLM, "128", (303, 110, 36), (312, 117, 39), 145.4),
        (SparseVLM, "96", (238, 48, 26), (249, 55, 27), 114.1),
        (SparseVLM, "64", (66, 30, 17), (82, 32, 18), 82.3),
        (SparseVLMPlus, "192", (300, 200, 118), (300, 200, 118), 206.8),
        (SparseVLMPlus, "128", (238, 108, 60), (238, 108, 60), 144.1),
        (SparseVLMPlus, "96", (246, 54, 28), (246, 54, 28), 113.9),
        (SparseVLMPlus, "64", (66, 34, 20), (66, 34, 20), 81.8),
    ],
)
def test_published_settings_have_the_counts_and_means_of_the_released_lists(method, setting, originals, totals, mean):
    schedule = method.published[setting].schedule
    assert dict(schedule) == dict(zip((3, 7, 16), originals, strict=True))
    per_layer = schedule.vision_tokens_per_layer(576, 32)
    assert per_layer == [576] * 3 + [totals[0]] * 4 + [totals[1]] * 9 + [totals[2]] * 16
    assert schedule.mean_tokens(576, 32) == pytest.approx(mean, abs=0.051)
    if method.merges:
        arriving = zip((576, *totals[:2]), totals, strict=True)
        assert [split_count(current, total)[0] for current, total in arriving] == list(originals)


def test_a_mapped_setting_still_adds_its_merged_tokens():
    mapped = SparseVLM.published["64"].schedule.mapped(12, 144)
    assert dict(mapped) == {1: 16, 3: 8, 6: 4}
    assert [mapped.vision_tokens_per_layer(144, 12)[layer] for layer in (0, 1, 3, 6)] == [144, 20, 9, 5]


def test_a_published_setting_leaves_small_pictures_whole():
    schedule = SparseVLM.published["64"].schedule
    assert [schedule.kept_count(16, current) for current in (0, 1, 2, 17, 18, 19)] == [0, 1, 2, 17, 18, 18]


def released_clusters(pruned: int) -> int:
    """The count of the released code, in floating point."""
    return int((int(pruned * 0.3) + 1) / 10) + 1


def test_a_split_has_the_released_codes_number_of_new_tokens_and_exactly_the_total():
    for current in range(2, 300):
        for total in range(1, current):
            originals, new = split_count(current, total)
            released = released_clusters(current - originals)
            assert originals + new == total
            assert originals >= 1
            assert new == released or (originals == 1 and new < released)
            assert new <= recycled_count(current - originals)
            if originals + 1 < current:
                assert originals + 1 + released_clusters(current - originals - 1) > total


def test_totals_at_the_edges_are_split_sensibly():
    assert split_count(0, 0) == (0, 0)
    assert split_count(576, 0) == (0, 0)
    assert split_count(576, 1) == (1, 0)
    assert split_count(576, 5) == (1, 4)
    assert split_count(576, 576) == (576, 0)


@both_versions
@pytest.mark.parametrize(("target", "least"), [(192, 80), (128, 40), (64, 6)])
def test_the_papers_budgets_are_met_within_half_a_token_in_three_stages(method, target, least):
    schedule = method.schedule_for(target, 576, 32)
    assert list(schedule) == [3, 7, 16]
    assert schedule.mean_tokens(576, 32) == pytest.approx(target, abs=0.5)
    counts = schedule.vision_tokens_per_layer(576, 32)
    assert 576 > counts[3] > counts[7] > counts[16] > least


@both_versions
@pytest.mark.parametrize("target", [48, 32, 16])
def test_the_same_shares_of_a_small_model_are_met_within_half_a_token(method, target):
    schedule = method.schedule_for(target, 144, 12)
    assert list(schedule) == [1, 3, 6]
    assert schedule.mean_tokens(144, 12) == pytest.approx(target, abs=0.5)


@both_versions
@pytest.mark.parametrize(("tokens", "layers", "floor"), [(576, 32, "54.9"), (144, 12, "12.9")])
def test_the_floor_is_named(method, tokens, layers, floor):
    with pytest.raises(OutOfReach, match=f"lies between {floor} and {tokens}"):
        method.schedule_for(10, tokens, layers)


def slow_raters(embeds: Tensor, mask: Tensor) -> list[int]:
    """Rows of the raters, one product at a time."""
    vision = [row for row in range(len(mask)) if mask[row]]
    behind = [row for row in range(len(mask)) if row > vision[-1]]
    fit = dict.fromkeys(behind, 0.0)
    for token in vision:
        weights = {row: math.exp(float(embeds[token].double() @ embeds[row].double())) for row in behind}
        for row in behind:
            fit[row] += weights[row] / sum(weights.values()) / len(vision)
    return [row for row in behind if fit[row] > 1 / len(behind)]


@both_versions
def test_the_raters_of_each_sequence_are_text_behind_its_last_picture_that_fits_above_the_mean(method):
    parts = [two_pictures(), *tiny_prompts()]
    parts[0].inputs_embeds[12] = parts[0].inputs_embeds[3:11].mean(0) * 4  # between the pictures; it would match best
    marks = method(DropSchedule({1: 0.5})).begin(initial_state(pack_together(parts))).marks
    wanted = []
    for part in parts:
        raters = slow_raters(part.inputs_embeds, part.vision_mask) if any(part.vision_counts) else []
        wanted += [float(row in raters) for row in range(part.seqlens[0])]
    assert marks.tolist() == wanted
    assert 0 < sum(wanted[21:26]) < 5


def test_raters_of_bfloat16_embeddings_are_chosen_in_float32():
    generator = torch.Generator().manual_seed(0)
    vision, text = (torch.randn(count, 64, generator=generator).bfloat16() for count in (50, 200))
    behind = torch.ones(200, dtype=torch.bool)
    raters = text_raters(vision, text, behind)
    assert raters.dtype == torch.float32
    assert raters.tolist() == text_raters(vision.float(), text.float(), behind).tolist()


@both_versions
@pytest.mark.parametrize(("behind", "text"), [(1, "one"), (4, "alike"), (0, "none"), (0, "no text at all")])
def test_where_no_text_token_stands_out_the_last_one_rates_and_nothing_is_nan(method, behind, text):
    packed = one_prompt(0 if text == "no text at all" else 4, 12, behind)
    if text == "alike":
        packed.inputs_embeds[16:] = packed.inputs_embeds[16].clone().sign() / 4
        packed.inputs_embeds[4:16] = packed.inputs_embeds[4:16].sign()
    dropper = watched(method)(DropSchedule({1: 0.5, 3: 0.5}))
    out = prefill(tiny_decoder(), packed, dropper)
    rater = {"one": [16], "alike": [19], "none": [3], "no text at all": []}[text]
    assert dropper.begun.marks.nonzero().flatten().tolist() == rater
    assert all(scores.isfinite().all() for scores in dropper.scores)
    assert all(after.hidden_states.isfinite().all() for after in dropper.after)
    assert out.logits.isfinite().all()


def slow_attention(state, config) -> tuple[Tensor, list[int], list[int]]:
    """The attention (H, T, T) of one sequence, and the rows of its raters and vision tokens."""
    k = state.keys.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 1)
    logits = torch.einsum("qhd,khd->hqk", state.queries, k) / math.sqrt(config.head_dim)
    length = len(state.queries)
    attention = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    return attention, state.marks.nonzero().flatten().tolist(), state.vision_mask.nonzero().flatten().tolist()


def test_the_score_is_the_raters_attention_in_a_matrix_written_out_with_grouped_heads_and_two_pictures():
    decoder, dropper = tiny_decoder(), watched(SparseVLM)(DropSchedule({2: 0.5}))
    prefill(decoder, two_pictures(), dropper)
    attention, raters, vision = slow_attention(dropper.before[0], decoder.config)
    wanted = attention[:, raters].mean((0, 1))
    torch.testing.assert_close(dropper.scores[0][vision], wanted[vision], atol=1e-6, rtol=0)


@both_versions
def test_attention_is_computed_only_for_text_rows_of_sequences_with_pictures(method, monkeypatch):
    asked = []

    def counting(q, k, rows):
        asked.append((len(q), len(k)))
        return attention_weights(q, k, rows)

    monkeypatch.setattr(sparsevlm, "attention_weights", counting)
    prefill(tiny_decoder(), pack_together(tiny_prompts()), method(DropSchedule({2: 0.5})))
    assert asked == [(12, 36), (7, 19)]  # the third prompt has no picture


def test_the_plus_score_is_divided_by_gravity_and_asks_the_best_share_of_the_heads():
    decoder, dropper = tiny_decoder(rope_theta=1e9), watched(SparseVLMPlus)(DropSchedule({2: 0.5}))
    prefill(decoder, two_pictures(), dropper)
    attention, raters, vision = slow_attention(dropper.before[0], decoder.config)
    frequencies = [1e9 ** -(2 * index / 8) for index in range(4)]  # four heads of 8 numbers
    for i in range(26):
        for j in range(26):
            attention[:, i, j] /= 2 * sum(math.cos((i - j) * frequency) for frequency in frequencies) / math.sqrt(8)
    attention = attention[:, raters][:, :, vision]
    best = attention.sum((1, 2)).argsort(descending=True)[:2]  # 14 of 32 heads are 2 of 4
    torch.testing.assert_close(dropper.scores[0][vision], attention[best].mean((0, 1)), atol=1e-6, rtol=0)


def test_gravity_of_llama_7b_turns_negative_at_a_distance_of_1707():
    config = TextConfig(hidden_size=4096, num_attention_heads=32)
    cos, sin = (table[:, 0] for table in rotary_table(config, torch.arange(1708), torch.float32))
    pull = gravity((cos[-1:], sin[-1:]), (cos, sin))[0].flip(0)
    assert pull[0] == pytest.approx(128**0.5, abs=1e-3)
    assert (pull[:1707] > 0).all()
    assert pull[1707] < 0


@pytest.mark.parametrize(("asked", "heads", "count"), [(None, 32, 14), (None, 4, 2), (None, 1, 1), (14, 16, 14), (14, 6, 6)])
def test_as_many_heads_are_asked_as_14_of_32_or_as_wished(asked, heads, count):
    mass = torch.randperm(heads, generator=torch.Generator().manual_seed(0)).float()
    best = SparseVLMPlus(DropSchedule({1: 0.5}), num_heads=asked).best_heads(mass)
    assert mass[best].tolist() == list(range(heads - 1, heads - 1 - count, -1))


def test_no_heads_at_all_are_refused():
    with pytest.raises(ValueError, match="num_heads 0 must be at least 1"):
        SparseVLMPlus(DropSchedule({1: 0.5}), num_heads=0)


def slow_clusters(tokens: Tensor, count: int) -> Tensor:
    """Density-peak clustering and averaging of the released code, in float64 and with loops. The rank replaces its noise."""
    points, size = tokens.double().tolist(), tokens.shape[1]
    everyone = range(len(points))
    distance = [[math.dist(a, b) / math.sqrt(size) for b in points] for a in points]
    density = [math.exp(-sum(d * d for d in sorted(distance[i])[:count]) / count) for i in everyone]
    farthest = max(max(row) for row in distance)
    denser = [[(density[j], -j) > (density[i], -i) for j in everyone] for i in everyone]
    parent = [min([distance[i][j] for j in everyone if denser[i][j]] or [farthest]) for i in everyone]
    centers = sorted(everyone, key=lambda i: -density[i] * parent[i])[:count]
    members: list[list[int]] = [[center] for center in centers]
    for i in set(everyone) - set(centers):
        members[min(range(count), key=lambda c: distance[i][centers[c]])].append(i)
    return torch.stack([tokens[group].double().sum(0) / (len(group) + 1e-6) for group in members]).float()


def merge_clusters(tokens, count):
    return cluster_means(clusters_of(tokens, count), tokens)


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (2, 1), (10, 2), (37, 4), (90, 10)])
@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0])  # with the last scale, densities underflow in float32
def test_merged_clusters_equal_clustering_with_loops(rows, count, scale):
    for seed in range(5):
        tokens = scale * torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(merge_clusters(tokens, count), slow_clusters(tokens, count), atol=1e-4, rtol=1e-5)


def test_nearest_neighbours_of_equal_density_do_not_both_become_centers():
    tokens = torch.tensor([[0.0], [0.1], [1.0], [1.3], [5.0], [5.2], [0.4], [1.7], [4.7], [5.6]])
    wanted = torch.stack([tokens[[0, 1, 2, 3, 6, 7]].mean(0), tokens[[4, 5, 8, 9]].mean(0)])
    torch.testing.assert_close(merge_clusters(tokens, 2), wanted, atol=1e-4, rtol=0)


def test_bfloat16_tokens_are_clustered_in_float32():
    tokens = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(merge_clusters(tokens, 5), merge_clusters(tokens.float(), 5))


def test_tokens_that_are_all_alike_are_merged_without_nan():
    torch.testing.assert_close(merge_clusters(torch.ones(20, 4), 3), torch.ones(3, 4))  # each center contains at least itself


def test_the_best_of_the_pruned_tokens_are_recycled_and_the_others_lost():
    dropper = watched(SparseVLM)(CountSchedule({2: 10}))
    prefill(tiny_decoder(), one_prompt(5, 24, 7), dropper)
    before, after = dropper.before[0], dropper.after[0]
    ranked = sorted(range(5, 29), key=lambda row: -float(dropper.scores[0][row]))
    assert after.vision_indices[after.vision_indices >= 0].tolist() == sorted(row - 5 for row in ranked[:9])
    assert after.vision_indices.tolist()[14] == MERGED  # 15 pruned, 5 of them recycled into one
    wanted = before.hidden_states[ranked[9:14]].mean(0)
    torch.testing.assert_close(after.hidden_states[14], wanted, atol=1e-5, rtol=1e-5)


@both_versions
def test_what_goes_on_of_a_sequence_is_the_same_alone_and_in_a_batch(method):
    decoder, schedule = tiny_decoder(), DropSchedule({2: 0.6, 4: 0.5})
    parts = [*tiny_prompts(), two_pictures(), one_prompt(2, 90, 11, seed=9)]
    together, counts = watched(method)(schedule), []
    prefill(decoder, pack_together(parts), together)
    for index, part in enumerate(parts):
        if not any(part.vision_counts):
            continue
        alone = watched(method)(schedule)
        prefill(decoder, part, alone)
        for batched, single in zip(together.after, alone.after, strict=True):
            start, end = batched.spans[index]
            torch.testing.assert_close(batched.hidden_states[start:end], single.hidden_states, atol=1e-4, rtol=0)
            assert batched.vision_indices[start:end].tolist() == single.vision_indices.tolist()
            assert batched.position_ids[start:end].tolist() == single.position_ids.tolist()
            counts.append(int((single.vision_indices == MERGED).sum()))
    assert max(counts) >= 2 if method.merges else max(counts) == 0


@both_versions
def test_bfloat16_scores_are_float32_and_the_counts_hold(method):
    decoder, packed = tiny_decoder().bfloat16(), pack_together([*tiny_prompts(), two_pictures()])
    packed.inputs_embeds = packed.inputs_embeds.bfloat16()
    dropper = watched(method)(DropSchedule({2: 0.5, 4: 0.5}))
    out = prefill(decoder, packed, dropper)
    assert all(scores.dtype == torch.float32 for scores in dropper.scores)
    assert [after.vision_counts for after in dropper.after] == [(12, 6, 0, 7), (6, 3, 0, 3)]
    assert all(after.hidden_states.dtype == torch.float32 for after in dropper.after)  # a CPU sums the layers in float32
    assert out.logits.isfinite().all()


@both_versions
def test_a_minimum_of_zero_drops_every_vision_token(method):
    dropper = watched(method)(DropSchedule({2: 0.0}, minimum=0))
    assert prefill(tiny_decoder(), pack_together(tiny_prompts()), dropper).logits.isfinite().all()
    assert dropper.after[0].vision_counts == (0, 0, 0)
    assert dropper.after[0].seqlens == (12, 7, 15)


def test_merged_tokens_close_the_gaps_and_plus_keeps_the_ids():
    packed = one_prompt(5, 24, 7)
    closed, kept = watched(SparseVLM)(DropSchedule({2: 0.5})), watched(SparseVLMPlus)(DropSchedule({2: 0.5}))
    assert prefill(tiny_decoder(), packed, closed).cache.position_ids[:, 0].tolist() == [36, 36, 24, 24, 24, 24]
    assert prefill(tiny_decoder(), packed, kept).cache.position_ids[:, 0].tolist() == [36] * 6
    assert closed.after[0].position_ids.tolist() == list(range(24))
    vision = kept.after[0].vision_indices
    assert (kept.after[0].position_ids - 5)[vision >= 0].tolist() == vision[vision >= 0].tolist()
