"""What is true of the Variation-Impact Theorem, in float64, and where its published corollary fails."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, one_prompt, pack_together, tiny_decoder
from torch import Tensor

from nanovlm_v2drop import Request, load
from nanovlm_v2drop.models.attention import attention_weights
from nanovlm_v2drop.models.decoder import Decoder, rotary_table
from nanovlm_v2drop.research.theory import (
    DropPoint,
    along_path,
    dense_output,
    directional_sensitivities,
    divergences,
    drop_point,
    first_order_impacts,
    impacts,
    jacobian_products,
    operator_norms,
    path_derivatives,
    rank_quality,
    rankings,
    removed_outputs,
    reverted_outputs,
    spearman,
    top_overlap,
    transposed_products,
)
from nanovlm_v2drop.tasks.demo import held_out

TOKENS = 12
LAST = 6  # the number of layers: behind the last one
GRID = torch.linspace(0, 1, 33, dtype=torch.float64)
FLOOR = 1e-11  # a smaller remainder is the rounding of logits of about 10 in float64
GRID_MARGIN = 1.02  # a maximum on the grid may miss the true one by a little
every_layer = pytest.mark.parametrize("layer", [1, 3, 5])
# At the whole update second-order terms dominate this model, and at layer 1 no grid is fine enough. At a small one they do not.
small_updates = pytest.mark.parametrize(("layer", "share"), [(1, 1 / 64), (3, 1 / 64), (5, 1 / 64)])
any_updates = pytest.mark.parametrize(("layer", "share"), [(1, 1 / 16), (2, 1.0), (3, 1 / 64), (5, 1.0)])


def tiny_point(layer: int, share: float = 1.0, **changes: object) -> DropPoint:
    """A drop point of a tiny decoder; its updates are the true ones times `share`."""
    packed = one_prompt(4, TOKENS, 5)
    packed = replace(packed, inputs_embeds=packed.inputs_embeds.double())
    point = drop_point(tiny_decoder(**changes).double().requires_grad_(False), packed, layer)
    return point if share == 1 else with_updates(point, share * point.updates)


def with_updates(point: DropPoint, updates: Tensor) -> DropPoint:
    """The same states with other states before them, so that Delta is `updates` (n, D)."""
    return replace(point, previous=point.hidden_states.index_add(0, point.vision_rows, updates, alpha=-1))


def reversion_impacts(point: DropPoint) -> Tensor:
    return impacts(point, reverted_outputs(point))


def first_order_norms(point: DropPoint) -> Tensor:
    """||J_j Delta_j|| (n,)"""
    return jacobian_products(point, point.updates).norm(dim=-1)


def on_grid(point: DropPoint, steps: Tensor) -> tuple[Tensor, Tensor]:
    """`path_derivatives` (S, n, V) of every token at every one of `steps` (S,)."""
    tokens = torch.arange(TOKENS).repeat(len(steps))
    slopes, curvatures = path_derivatives(point, tokens, steps.repeat_interleave(TOKENS))
    return slopes.unflatten(0, (-1, TOKENS)), curvatures.unflatten(0, (-1, TOKENS))


@cache
def remainder_bounds(layer: int, share: float) -> Tensor:
    """H_j / 2 (n,), where H_j is the largest second derivative along the path."""
    return GRID_MARGIN * on_grid(tiny_point(layer, share), GRID)[1].norm(dim=-1).amax(0) / 2


def plain_forward(point: DropPoint, states: Tensor, unseen: int | None = None) -> Tensor:
    """The slow twin of f for one prompt: states (T, D) -> (V,), with the row `unseen` hidden from all others."""
    decoder, length = point.decoder, len(states)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if unseen is not None:
        visible[:, unseen] = False
        visible[unseen, unseen] = True  # its own row must see something: nobody reads it
    rotary = rotary_table(decoder.config, point.position_ids, states.dtype)

    def attend(q, k, v):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        weights = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("hqk,khd->qhd", weights.masked_fill(~visible, -torch.inf).softmax(-1), v)

    for layer in decoder.layers[point.layer_idx :]:
        states = layer(states, rotary, attend)
    return decoder.lm_head(decoder.norm(states))[-1]


def whole_jacobians(point: DropPoint) -> Tensor:
    """The slow twin of all products: J (n, V, D) computed whole."""
    jacobian = torch.func.jacrev(lambda states: plain_forward(point, states))(point.hidden_states)  # (V, T, D)
    return jacobian.transpose(0, 1)[point.vision_rows].detach()


def random_rows(width: int) -> Tensor:
    return torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def assert_close(one: Tensor, other: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


@pytest.mark.parametrize("layer", [1, 2, 3, 4, 5])
def test_what_the_first_order_leaves_over_shrinks_with_the_square_of_the_step(layer):
    point = tiny_point(layer)
    products, dense, tokens = jacobian_products(point, point.updates), dense_output(point), torch.arange(TOKENS)
    left = torch.stack(
        [
            (dense - along_path(point, tokens, torch.full((TOKENS,), step).double()) - step * products).norm(dim=-1)
            for step in (2.0**-power for power in range(6, 25))
        ]
    )
    slopes = -left.log2().diff(dim=0)
    above_floor = left[1:] > FLOOR
    assert above_floor[:6].all()  # the first six halvings at least
    assert not above_floor[-1].any()  # later ones end in float64's rounding
    assert_close(slopes[above_floor], torch.full_like(slopes[above_floor], 2.0), atol=0.1)


@any_updates
def test_impact_is_never_above_its_first_order_and_the_remainder(layer, share):
    point = tiny_point(layer, share)
    sizes, bounds = reversion_impacts(point), remainder_bounds(layer, share)
    assert (sizes <= first_order_norms(point) + bounds).all()
    norms = 1.001 * operator_norms(point)  # found from below
    assert (sizes <= norms * point.variations + bounds).all()


@every_layer
def test_along_the_direction_of_the_operator_norm_its_product_alone_is_no_bound(layer):
    point = tiny_point(layer)
    steepest = torch.linalg.svd(whole_jacobians(point))[2][:, 0]  # (n, D)
    exceeded = []
    for length in (0.1, -0.1):
        moved = with_updates(point, length * steepest)
        sizes, products = reversion_impacts(moved), operator_norms(moved) * moved.variations
        remainders = GRID_MARGIN * on_grid(moved, GRID)[1].norm(dim=-1).amax(0) / 2
        assert (sizes <= 1.001 * products + remainders).all()
        exceeded.append(sizes > 1.001 * products)
    assert torch.stack(exceeded).any()  # so the remainder is needed


@any_updates
def test_impact_is_directional_sensitivity_times_variation_up_to_the_remainder(layer, share):
    point = tiny_point(layer, share)
    predicted = directional_sensitivities(point) * point.variations
    assert ((reversion_impacts(point) - predicted).abs() <= remainder_bounds(layer, share)).all()


@small_updates
def test_for_a_small_update_the_remainder_is_small_beside_the_impact(layer, share):
    assert (remainder_bounds(layer, share) < 0.1 * reversion_impacts(tiny_point(layer, share))).all()


@any_updates
def test_the_change_of_a_reversion_is_the_integral_of_the_slope_along_the_path(layer, share):
    point = tiny_point(layer, share)
    nodes, weights = np.polynomial.legendre.leggauss(50)
    slopes, _ = on_grid(point, torch.from_numpy(nodes + 1) / 2)
    integral = torch.einsum("s,snv->nv", torch.from_numpy(weights) / 2, slopes)
    assert_close(reverted_outputs(point) - dense_output(point), integral, atol=1e-9)


@every_layer
def test_the_path_begins_at_the_dense_output_with_minus_the_jacobian_product_and_ends_reverted(layer):
    point, tokens = tiny_point(layer), torch.arange(TOKENS)
    zeros, ones = torch.zeros(TOKENS, dtype=torch.float64), torch.ones(TOKENS, dtype=torch.float64)
    assert_close(along_path(point, tokens, zeros), dense_output(point).expand(TOKENS, -1))
    assert_close(along_path(point, tokens, ones), reverted_outputs(point))
    assert_close(path_derivatives(point, tokens, zeros)[0], -jacobian_products(point, point.updates))


@every_layer
def test_the_second_derivative_is_the_difference_of_first_derivatives(layer):
    point, tokens, width = tiny_point(layer, 1 / 16), torch.arange(TOKENS), 1e-5
    at = torch.linspace(0.1, 0.9, TOKENS, dtype=torch.float64)
    slopes = [path_derivatives(point, tokens, at + side * width)[0] for side in (1, -1)]
    assert_close((slopes[0] - slopes[1]) / (2 * width), path_derivatives(point, tokens, at)[1], atol=1e-7)


@small_updates
def test_the_smallest_variations_cost_at_most_the_spread_of_sensitivities_times_the_best_choice(layer, share):
    point, remainders = tiny_point(layer, share), remainder_bounds(layer, share)
    sensitivities = directional_sensitivities(point)
    spread = sensitivities.max() / sensitivities.min()
    order = point.variations.argsort()
    for sizes, left_over in ((first_order_norms(point), 1e-12), (reversion_impacts(point), remainders)):
        best = sizes.argsort()
        slack = (left_over + torch.zeros(TOKENS))[order].cumsum(0) + spread * (left_over + torch.zeros(TOKENS))[best].cumsum(0)
        assert (sizes[order].cumsum(0) <= spread * sizes[best].cumsum(0) + slack).all()


def spread_updates(point: DropPoint) -> DropPoint:
    """The same directions with lengths from 2^-30 to 2^-8, in shuffled order."""
    lengths = 2.0 ** torch.linspace(-30, -8, TOKENS, dtype=torch.float64)[torch.arange(TOKENS) * 5 % TOKENS]
    return with_updates(point, lengths[:, None] * F.normalize(point.updates, dim=-1))


@every_layer
def test_a_pair_is_in_the_right_order_once_its_variations_differ_by_more_than_the_sensitivities(layer):
    point = spread_updates(tiny_point(layer))
    sensitivities, variations = directional_sensitivities(point), point.variations
    sure = variations[:, None] / variations > sensitivities.max() / sensitivities.min()
    assert sure.sum() > TOKENS
    for sizes in (first_order_norms(point), reversion_impacts(point)):
        assert (sizes[:, None] > sizes)[sure].all()


@every_layer
def test_a_pair_whose_variations_differ_by_less_can_be_in_the_wrong_order(layer):
    point = tiny_point(layer)
    sizes, variations = first_order_norms(point), point.variations
    assert ((variations[:, None] > variations) & (sizes[:, None] < sizes)).any()


@every_layer
def test_operator_norms_are_the_largest_singular_values_of_the_whole_jacobians(layer):
    point = tiny_point(layer)
    wanted = torch.linalg.matrix_norm(whole_jacobians(point), ord=2)
    norms = operator_norms(point)
    assert (norms <= wanted * (1 + 1e-12)).all()
    assert (norms >= 0.99 * wanted).all()


@every_layer
def test_few_iterations_stay_below_the_operator_norm_and_more_come_closer(layer):
    point = tiny_point(layer)
    few, more, many = (operator_norms(point, iterations) for iterations in (1, 3, 30))
    assert (few < more).all()
    assert (more <= many).all()


@every_layer
def test_products_with_the_jacobians_equal_those_with_the_whole_ones(layer):
    point, directions, cotangents = tiny_point(layer), random_rows(32), random_rows(61)
    jacobians = whole_jacobians(point)
    assert_close(jacobian_products(point, directions), torch.einsum("nvd,nd->nv", jacobians, directions))
    assert_close(transposed_products(point, cotangents), torch.einsum("nvd,nv->nd", jacobians, cotangents))


@every_layer
def test_alignment_lies_between_zero_and_one(layer):
    point = tiny_point(layer)
    directions = point.updates / point.variations[:, None]
    sensitivities = directional_sensitivities(point)
    assert_close(sensitivities, torch.einsum("nvd,nd->nv", whole_jacobians(point), directions).norm(dim=-1))
    alignments = sensitivities / operator_norms(point)
    assert (alignments > 0).all()
    assert (alignments <= 1).all()
    assert alignments.max() < 0.7  # the published equality is far off for every token


def test_behind_the_last_layer_no_vision_token_matters():
    point = tiny_point(LAST)
    assert (point.variations > 1).all()
    assert not jacobian_products(point, random_rows(32)).any()
    assert not transposed_products(point, random_rows(61)).any()
    assert not operator_norms(point).any()
    dense = dense_output(point).expand(TOKENS, -1)
    assert_close(dense[0], plain_forward(point, point.hidden_states))
    assert_close(reverted_outputs(point), dense, atol=1e-12)
    assert_close(removed_outputs(point), dense, atol=1e-12)


@every_layer
def test_an_update_in_the_null_space_has_variation_and_operator_norm_but_no_impact(layer):
    point = tiny_point(layer, vocab_size=8)
    unseen = torch.linalg.svd(whole_jacobians(point))[2][:, -1]  # (n, D): fewer logits than directions
    point = with_updates(point, 1e-3 * unseen)
    claimed = operator_norms(point) * point.variations
    assert (operator_norms(point) > 1e-4).all()
    assert (first_order_norms(point) < 1e-9 * claimed).all()
    assert (reversion_impacts(point) < 0.01 * claimed).all()


@every_layer
def test_a_token_without_an_update_can_be_the_one_whose_removal_changes_most(layer):
    point = tiny_point(layer)
    removals = impacts(point, removed_outputs(point))
    token = int(removals.argmax())
    point = with_updates(point, point.updates.index_fill(0, torch.tensor([token]), 0.0))
    assert point.variations[token] == 0
    assert point.variations.argmin() == token
    assert first_order_impacts(point)[token] == 0
    assert reversion_impacts(point)[token] < 1e-12
    assert impacts(point, removed_outputs(point))[token] > 0.5


def looking_at_one_axis(layer: int) -> tuple[Decoder, Tensor]:
    """A decoder with equal queries in each layer, and the axis (D,) of normed states that they look for."""
    decoder = tiny_decoder(qkv_bias=True).double().requires_grad_(False)
    attention, axis = decoder.layers[layer].self_attn, F.normalize(random_rows(32)[0], dim=0)
    slowest = 3  # positions hardly rotate this one of 8 values
    for projection, heads in ((attention.q_proj, 4), (attention.k_proj, 2)):
        projection.weight.zero_()
        projection.bias.zero_().view(heads, 8)[:, slowest] = 10.0 if heads == 4 else 0.0
    attention.k_proj.weight.view(2, 8, 32)[:, slowest] = axis
    return decoder, axis


@every_layer
def test_a_token_that_everybody_looks_at_can_have_no_update_at_all(layer):
    decoder, axis = looking_at_one_axis(layer)
    packed, token = one_prompt(4, TOKENS, 5), 7
    point = drop_point(decoder, replace(packed, inputs_embeds=packed.inputs_embeds.double()), layer)
    row = int(point.vision_rows[token])
    looked_at = 3 * axis / decoder.layers[layer].input_layernorm.weight
    states, before = (old.index_copy(0, torch.tensor([row]), looked_at[None]) for old in (point.hidden_states, point.previous))
    point = replace(point, hidden_states=states, previous=before)
    rotary, rows = rotary_table(decoder.config, point.position_ids, torch.float64), torch.arange(row, len(states))
    weights = attention_weights(*decoder.layers[layer].row_queries_and_keys(states, rotary, rows), rows)
    assert (weights[..., row] > 0.99).all()  # in every head and from its own position on
    assert (point.variations[token], directional_sensitivities(point)[token]) == (0, 0)
    assert reversion_impacts(point)[token] < 1e-12
    removals = impacts(point, removed_outputs(point))
    assert removals.argmax() == token
    assert removals[token] > 1


def test_where_a_layer_does_nothing_every_variation_is_zero_and_removals_still_matter():
    decoder = tiny_decoder().double().requires_grad_(False)
    decoder.layers[2].self_attn.o_proj.weight.zero_()
    decoder.layers[2].mlp.down_proj.weight.zero_()
    packed = one_prompt(4, TOKENS, 5)
    point = drop_point(decoder, replace(packed, inputs_embeds=packed.inputs_embeds.double()), 3)
    assert not point.variations.any()
    assert not directional_sensitivities(point).any()
    assert (reversion_impacts(point) < 1e-12).all()
    assert (impacts(point, removed_outputs(point)) > 0.1).all()


def test_a_drop_point_holds_the_states_before_and_behind_the_last_layer():
    packed = one_prompt(4, TOKENS, 5)
    point, one_before = tiny_point(3), tiny_point(2)
    assert torch.equal(point.previous, one_before.hidden_states)
    assert torch.equal(tiny_point(1).previous, packed.inputs_embeds.double())
    assert point.vision_rows.tolist() == list(range(4, 4 + TOKENS))
    assert_close(point.updates, (point.hidden_states - one_before.hidden_states)[4 : 4 + TOKENS])
    assert_close(plain_forward(point, point.hidden_states), plain_forward(one_before, one_before.hidden_states))


@every_layer
def test_reverting_equals_a_plain_forward_with_the_changed_row(layer):
    point = tiny_point(layer)
    assert_close(dense_output(point), plain_forward(point, point.hidden_states))
    for row, found in zip(point.vision_rows.tolist(), reverted_outputs(point), strict=True):
        states = point.hidden_states.clone()
        states[row] = point.previous[row]
        assert_close(found, plain_forward(point, states))


@every_layer
def test_removing_equals_a_plain_forward_in_which_nobody_sees_the_token(layer):
    point = tiny_point(layer)
    for row, found in zip(point.vision_rows.tolist(), removed_outputs(point), strict=True):
        assert_close(found, plain_forward(point, point.hidden_states, unseen=row))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_positions_stay_beside_their_tokens(family):
    packed = one_prompt(4, TOKENS, 5, family=family)
    packed = replace(packed, inputs_embeds=packed.inputs_embeds.double(), deepstack=None)
    point = drop_point(tiny_decoder(**FAMILIES[family]).double().requires_grad_(False), packed, 3)
    assert_close(dense_output(point), plain_forward(point, point.hidden_states))
    for row, reverted, removed in zip(point.vision_rows.tolist(), reverted_outputs(point), removed_outputs(point), strict=True):
        states = point.hidden_states.index_copy(0, torch.tensor([row]), point.previous[row, None])
        assert_close(reverted, plain_forward(point, states))
        assert_close(removed, plain_forward(point, point.hidden_states, unseen=row))


def test_a_tower_that_adds_to_the_states_between_layers_is_refused():
    with pytest.raises(ValueError, match=r"this model's tower adds to their outputs \(deepstack\)"):
        drop_point(tiny_decoder(**FAMILIES["qwen3-vl"]), one_prompt(4, TOKENS, 5, family="qwen3-vl"), 3)


def test_more_tokens_than_go_through_at_once_are_each_measured_in_their_place():
    packed = one_prompt(2, 30, 3)
    packed = replace(packed, inputs_embeds=packed.inputs_embeds.double())
    point = drop_point(tiny_decoder().double().requires_grad_(False), packed, 5)
    removed = removed_outputs(point)
    assert len(removed) == 30
    for token in (0, 23, 24, 29):
        assert_close(removed[token], plain_forward(point, point.hidden_states, unseen=2 + token))


@every_layer
def test_first_order_impacts_are_slopes_of_the_answers_log_probability_along_the_path(layer):
    point, tokens = tiny_point(layer), torch.arange(TOKENS)
    dense, zeros = dense_output(point), torch.zeros(TOKENS, dtype=torch.float64)
    slopes, _ = path_derivatives(point, tokens, zeros)
    wanted = (slopes[:, dense.argmax()] - slopes @ dense.softmax(-1)).abs()
    assert_close(first_order_impacts(point), wanted)
    ends = [along_path(point, tokens, zeros + step).log_softmax(-1)[:, dense.argmax()] for step in (1e-6, -1e-6)]
    torch.testing.assert_close((ends[0] - ends[1]).abs() / 2e-6, wanted, atol=1e-6, rtol=1e-4)


def test_divergences_are_those_of_torch():
    point = tiny_point(2)
    outputs, dense = reverted_outputs(point), dense_output(point).log_softmax(-1)
    wanted = F.kl_div(outputs.log_softmax(-1), dense.expand_as(outputs), log_target=True, reduction="none").sum(-1)
    assert (wanted > 1e-3).all()
    assert_close(divergences(point, outputs), wanted)
    assert_close(divergences(point, dense_output(point)[None] + 3), torch.zeros(1, dtype=torch.float64))


def slow_spearman(one: list[float], other: list[float]) -> float:
    """Pearson's correlation of ranks that are counted one by one."""
    ranks = [[sum(y < x for y in values) + (sum(y == x for y in values) + 1) / 2 for x in values] for values in (one, other)]
    return float(np.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),  # scipy.stats.spearmanr's own example
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138),
        ([3, 1, 2, 2], [1, 9, 5, 5], -1.0),
        ([1, 1, 1], [1, 2, 3], 0.0),
    ],
)
def test_spearman_of_known_examples(one, other, wanted):
    assert spearman(torch.tensor(one), torch.tensor(other)) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_spearman_equals_counted_ranks_with_and_without_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    many, ties = torch.rand(20, generator=generator), torch.randint(4, (20,), generator=generator).float()
    assert spearman(many, ties) == pytest.approx(slow_spearman(many.tolist(), ties.tolist()), abs=1e-12)
    assert spearman(many, many.exp()) == pytest.approx(1.0)


def test_top_overlap_of_a_known_example():
    one, other = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2]), torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6])
    assert top_overlap(one, other, 0.25) == 0.5  # {0, 1} and {1, 3}
    assert top_overlap(one, other, 0.5) == 0.5  # {0, 1, 2, 3} and {1, 3, 5, 7}
    assert top_overlap(one, other, 0.01) == 0.0  # one token at least: 0 and 1
    assert top_overlap(one, -one, 0.5) == 0.0
    assert top_overlap(one, one, 0.5) == 1.0


@every_layer
def test_rankings_are_what_they_are_called(layer):
    point = tiny_point(layer)
    decoder, rows = point.decoder, point.vision_rows
    now, before, scores = point.hidden_states[rows], point.previous[rows], rankings(point, seed=4)
    block = decoder.layers[layer]
    normed, rotary = block.input_layernorm(point.hidden_states), rotary_table(decoder.config, point.position_ids, torch.float64)
    query, keys = block.self_attn.query(normed, rotary), block.self_attn.key(normed, rotary)
    logits = torch.einsum("hd,khd->hk", query[-1], keys.repeat_interleave(2, 1)) * query.shape[-1] ** -0.5
    assert_close(scores["last-query attention"], logits.softmax(-1).mean(0)[rows])
    assert_close(scores["key norm"], keys.abs().sum((1, 2))[rows])
    assert_close(scores["variation l2"], (now - before).square().sum(-1).sqrt())
    assert_close(scores["variation l1"], (now - before).abs().sum(-1))
    assert_close(scores["variation cosine"], 1 - (now * before).sum(-1) / (now.norm(dim=-1) * before.norm(dim=-1)))
    assert_close(scores["variation relative"], (now - before).norm(dim=-1) / before.norm(dim=-1))
    assert_close(scores["first order"], first_order_impacts(point))
    assert torch.equal(scores["random"], rankings(point, seed=4)["random"])
    assert not torch.equal(scores["random"], rankings(point, seed=5)["random"])


def test_rank_quality_is_the_mean_over_prompts_of_each_score_and_impact():
    points = [tiny_point(layer) for layer in (3, 5)]
    rows = {(row["score"], row["impact"]): row for row in rank_quality(points, share=0.5)}
    assert len(rows) == 2 * len(rankings(points[0]))
    for impact, change in (("reversion", reverted_outputs), ("removal", removed_outputs)):
        pairs = [(point.variations, impacts(point, change(point))) for point in points]
        correlations = [slow_spearman(*(values.tolist() for values in pair)) for pair in pairs]
        row = rows["variation l2", impact]
        assert row["spearman"] == pytest.approx(np.mean(correlations))
        assert row["top_overlap"] == pytest.approx(np.mean([top_overlap(*pair, 0.5) for pair in pairs]))
        assert row["spearman_interval"] == pytest.approx(sorted(correlations), abs=1e-3)


def test_several_prompts_at_once_are_refused():
    with pytest.raises(ValueError, match="one prompt at a time, not 2"):
        drop_point(tiny_decoder(), pack_together([one_prompt(4, 12, 5), one_prompt(3, 8, 2)]), 2)


@pytest.mark.parametrize("layer", [-1, 0, LAST + 1])
def test_a_layer_without_one_before_it_or_beyond_the_end_is_refused(layer):
    with pytest.raises(ValueError, match=f"layer {layer} must be 1 to {LAST}: variation needs a layer before it"):
        drop_point(tiny_decoder(), one_prompt(4, 12, 5), layer)


@pytest.fixture(scope="module")
def demo_quality():
    """Rows of `rank_quality` by layer, score and impact, over the demo's first questions."""
    vlm = load("demo")
    decoder = vlm.model.language_model.requires_grad_(False)
    prompts = [vlm.prepare([Request(text=sample.text, images=sample.images)]) for sample in map(held_out, range(6))]
    return {
        (layer, row["score"], row["impact"]): row["spearman_interval"]
        for layer in (1, 6)
        for row in rank_quality([drop_point(decoder, packed, layer) for packed in prompts])
    }


@pytest.mark.slow
@pytest.mark.parametrize("layer", [1, 6])
def test_in_the_trained_demo_variation_ranks_reversions_better_than_chance(layer, demo_quality):
    low, _ = demo_quality[layer, "variation l2", "reversion"]
    assert low > 0.2
    assert low > demo_quality[layer, "random", "reversion"][1]


@pytest.mark.slow
def test_in_the_trained_demo_variation_ranks_removals_worse_than_reversions_at_layer_1(demo_quality):
    assert demo_quality[1, "variation l2", "removal"][1] < demo_quality[1, "variation l2", "reversion"][0]
