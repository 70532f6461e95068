"""The Variation-Impact Theorem (arXiv 2509.01552, section 3.4 and appendix E), made measurable.

At the entrance of layer L a vision token j has the state x_j, and one layer before it had x_j - Delta_j. f maps the states of
all tokens at this place to the logits of the prompt's last token, and J_j is its Jacobian in x_j. The theorem says that
reverting the update, x_j -> x_j - Delta_j, changes f by about ||J_j|| ||Delta_j||. What is true, and can be checked here:

- Reverting changes f by the integral of J_j Delta_j along the path, which is ||J_j Delta_j|| up to second order in Delta_j.
- ||J_j Delta_j|| = rho_j ||J_j|| ||Delta_j|| with an alignment rho_j in [0, 1], so the product is only an upper bound.
- Reverting a token is not removing it, and V2Drop removes tokens.

Shapes: T tokens of one prompt, n vision tokens, D hidden_size, V vocabulary. All functions work in float64 too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..evaluation.bootstrap import BOOTSTRAP_DRAWS, interval
from ..models.attention import attention, attention_weights
from ..models.decoder import Decoder, DecoderLayer, rotary_table
from ..models.vlm import PackedInputs

TOKENS_AT_ONCE = 24  # variants of a prompt in one packed batch


@dataclass(frozen=True)
class DropPoint:
    """One prompt at the entrance of layer `layer_idx`; the number of layers as `layer_idx` means behind the last layer."""

    decoder: Decoder
    layer_idx: int
    hidden_states: Tensor  # (T, D) input of this layer
    previous: Tensor  # (T, D) input of the layer before
    position_ids: Tensor  # (T,) or (3, T)
    vision_rows: Tensor  # (n,)

    @property
    def updates(self) -> Tensor:
        """Delta (n, D): what the last layer added to each vision token."""
        return (self.hidden_states - self.previous)[self.vision_rows]

    @property
    def variations(self) -> Tensor:
        """||Delta_j|| (n,), the score of V2Drop."""
        return self.updates.norm(dim=-1)

    def output(self, hidden_states: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """f: states (B, T', D) at this place -> logits (B, V) of the last token, without further drops.

        If rows were removed, `position_ids` (B, T') or (3, B, T') are the positions of the remaining rows.
        """
        if position_ids is None:
            position_ids = torch.stack([self.position_ids] * len(hidden_states), dim=-2)
        last = run_layers(self.decoder, hidden_states, position_ids, self.layer_idx, len(self.decoder.layers))[0][:, -1]
        return self.decoder.lm_head(self.decoder.norm(last))


def drop_point(decoder: Decoder, packed: PackedInputs, layer_idx: int) -> DropPoint:
    """Run one prompt up to the entrance of a layer.

    Raises ValueError for several prompts, for a layer without a layer before it, and where the tower adds to the states
    between layers (deepstack).
    """
    if packed.deepstack is not None:
        raise ValueError("the theory is about what layers change, but this model's tower adds to their outputs (deepstack)")
    if len(packed.seqlens) != 1:
        raise ValueError(f"one prompt at a time, not {len(packed.seqlens)}")
    if not 1 <= layer_idx <= len(decoder.layers):
        raise ValueError(f"layer {layer_idx} must be 1 to {len(decoder.layers)}: variation needs a layer before it")
    positions = packed.position_ids
    with torch.no_grad():
        hidden_states, previous = run_layers(decoder, packed.inputs_embeds[None], positions.unsqueeze(-2), 0, layer_idx)
    rows = torch.arange(packed.seqlens[0], device=positions.device)[packed.vision_mask]
    return DropPoint(decoder, layer_idx, hidden_states[0], previous[0], positions, rows)


def run_layers(decoder: Decoder, hidden_states: Tensor, position_ids: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Output and input of layer `end` - 1, (B, T, D) each, from the input of layer `start`; positions (B, T) or (3, B, T).

    Attention uses torch's MATH kernel, because the fast kernels have no forward-mode derivative.
    """
    batch, length, _ = hidden_states.shape
    rotary = rotary_table(decoder.config, position_ids.flatten(-2), hidden_states.dtype, position_ids.amax() + 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attention(q, k, v, [length] * batch, "sdpa")

    states = previous = hidden_states.flatten(0, 1)
    for layer in decoder.layers[start:end]:
        previous, states = states, layer(states, rotary, attend)
    return states.unflatten(0, (batch, length)), previous.unflatten(0, (batch, length))


def moved(point: DropPoint, tokens: Tensor, shifts: Tensor) -> Tensor:
    """f (B, V) of B variants; in variant b only vision token `tokens[b]` is shifted, by `shifts[b]`: (B,) and (B, D)."""
    rows = torch.arange(len(point.hidden_states), device=shifts.device) == point.vision_rows[tokens, None]  # (B, T)
    return point.output(point.hidden_states + rows[..., None] * shifts[:, None])


def along_path(point: DropPoint, tokens: Tensor, steps: Tensor) -> Tensor:
    """f (B, V) where the share `steps` (B,) of each token's last update is reverted: 0 is nothing, 1 is all of it."""
    return moved(point, tokens, -steps[:, None] * point.updates[tokens])


def path_derivatives(point: DropPoint, tokens: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivatives (B, V) of `along_path` with respect to `steps`; at 0 the first is -J_j Delta_j."""

    def first(at: Tensor) -> Tensor:
        return jvp(lambda inner: along_path(point, tokens, inner), (at,), (torch.ones_like(at),))[1]

    slopes, curvatures, *_ = jvp(first, (steps,), (torch.ones_like(steps),))
    return slopes, curvatures


def for_all_tokens(point: DropPoint, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """`measure` of every vision token, TOKENS_AT_ONCE tokens at a time."""
    tokens = torch.arange(len(point.vision_rows), device=point.vision_rows.device)
    return torch.cat([measure(part) for part in tokens.split(TOKENS_AT_ONCE)])


def jacobian_products(point: DropPoint, directions: Tensor) -> Tensor:
    """J_j d_j (n, V) for each vision token and its own direction d_j (n, D)."""

    def product(tokens: Tensor) -> Tensor:
        tangents = directions[tokens]
        return jvp(lambda shifts: moved(point, tokens, shifts), (torch.zeros_like(tangents),), (tangents,))[1].detach()

    return for_all_tokens(point, product)


def transposed_products(point: DropPoint, cotangents: Tensor) -> Tensor:
    """J_j^T c_j (n, D) for each vision token and its own c_j (n, V)."""

    def product(tokens: Tensor) -> Tensor:
        zeros = torch.zeros(len(tokens), point.hidden_states.shape[-1]).to(point.hidden_states)
        return vjp(lambda shifts: moved(point, tokens, shifts), zeros)[1](cotangents[tokens])[0].detach()

    return for_all_tokens(point, product)


def operator_norms(point: DropPoint, iterations: int = 30) -> Tensor:
    """||J_j||_op (n,) by power iteration on J_j^T J_j, which approaches the norm from below."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(point.updates.shape, generator=generator).to(point.hidden_states)
    norms = directions.new_zeros(len(directions))
    for _ in range(iterations):
        images = jacobian_products(point, F.normalize(directions, dim=-1))
        norms = torch.maximum(norms, images.norm(dim=-1))
        directions = transposed_products(point, images)
    return norms


def directional_sensitivities(point: DropPoint) -> Tensor:
    """||J_j u_j|| (n,), where u_j is the direction of token j's own update."""
    return jacobian_products(point, F.normalize(point.updates, dim=-1)).norm(dim=-1)


@torch.no_grad()
def dense_output(point: DropPoint) -> Tensor:
    """f (V,) of the unchanged prompt."""
    return point.output(point.hidden_states[None])[0]


@torch.no_grad()
def reverted_outputs(point: DropPoint) -> Tensor:
    """f (n, V) where one vision token at a time has its state of one layer before. The theorem is about this."""
    return for_all_tokens(point, lambda tokens: along_path(point, tokens, torch.ones(len(tokens)).to(point.hidden_states)))


@torch.no_grad()
def removed_outputs(point: DropPoint) -> Tensor:
    """f (n, V) where one vision token at a time is removed and positions are kept. V2Drop does this."""
    length = len(point.hidden_states)
    rows = torch.arange(length, device=point.vision_rows.device)

    def without(tokens: Tensor) -> Tensor:
        gone = point.vision_rows[tokens]
        left = torch.stack([torch.cat([rows[:row], rows[row + 1 :]]) for row in gone.tolist()])  # (B, T - 1)
        return point.output(point.hidden_states[left], point.position_ids[..., left])

    return for_all_tokens(point, without)


def impacts(point: DropPoint, outputs: Tensor) -> Tensor:
    """||changed - f|| (n,) of changed outputs (n, V)."""
    return (outputs - dense_output(point)).norm(dim=-1)


def divergences(point: DropPoint, outputs: Tensor) -> Tensor:
    """Kullback-Leibler divergence (n,) of changed outputs (n, V) from the dense answer, in nats."""
    return kl_divergence(dense_output(point).log_softmax(-1), outputs.log_softmax(-1))


def kl_divergence(expected: Tensor, given: Tensor) -> Tensor:
    """Kullback-Leibler divergence (...), in nats, of log-probabilities (..., V) from the expected ones (..., V)."""
    return (expected.exp() * (expected - given)).sum(-1)


def first_order_impacts(point: DropPoint) -> Tensor:
    """|<g_j, Delta_j>| (n,) of all tokens from one backward pass; g is the gradient of the answer's log-probability."""
    states = point.hidden_states.detach().clone().requires_grad_(True)
    log_probabilities = point.output(states[None])[0].log_softmax(-1)
    (gradient,) = torch.autograd.grad(log_probabilities.max(), states)
    return (gradient[point.vision_rows] * point.updates).sum(-1).abs()


@torch.no_grad()
def rankings(point: DropPoint, seed: int = 0) -> dict[str, Tensor]:
    """Scores (n,) by name, higher = keep.

    They are variation in four forms, |<g, Delta>| from one backward pass, the last token's attention and the L1 norm of keys
    in this layer, and a random score.
    """
    now, before = point.hidden_states[point.vision_rows], point.previous[point.vision_rows]
    queries, keys = layer_queries_and_keys(point)
    row = torch.full((1,), len(keys) - 1, device=keys.device)
    with torch.enable_grad():
        first_order = first_order_impacts(point)
    return {
        "variation l2": point.variations,
        "variation l1": point.updates.abs().sum(-1),
        "variation cosine": 1 - F.cosine_similarity(now, before, dim=-1),
        "variation relative": point.variations / before.norm(dim=-1),
        "first order": first_order,
        "last-query attention": attention_weights(queries, keys, row)[:, 0].mean(0)[point.vision_rows],
        "key norm": keys.flatten(1).abs().sum(-1)[point.vision_rows],
        "random": torch.rand(len(now), generator=torch.Generator().manual_seed(seed)).to(now),
    }


def layer_queries_and_keys(point: DropPoint) -> tuple[Tensor, Tensor]:
    """The last token's query (1, H, head_dim) and all keys (T, K, head_dim) of this layer."""
    layer = cast(DecoderLayer, point.decoder.layers[point.layer_idx])
    positions = point.position_ids
    rotary = rotary_table(point.decoder.config, positions, point.hidden_states.dtype, positions.amax() + 1)
    last = torch.full((1,), len(point.hidden_states) - 1, device=point.hidden_states.device)
    return layer.row_queries_and_keys(point.hidden_states, rotary, last)


def rank_quality(points: Sequence[DropPoint], share: float = 0.25) -> list[dict[str, Any]]:
    """How well each of `rankings` agrees with the true impacts of reverting and removing tokens, over several prompts.

    There is one row for each score and impact: the mean Spearman correlation and the mean overlap of the largest `share`,
    with 95 % bootstrap intervals over the prompts.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number, point in enumerate(points):
        changed = {"reversion": reverted_outputs(point), "removal": removed_outputs(point)}
        for impact, outputs in changed.items():
            sizes = impacts(point, outputs)
            for score, values in rankings(point, seed=number).items():
                pair = spearman(values, sizes), top_overlap(values, sizes, share)
                found.setdefault((score, impact), []).append(pair)
    return [
        {
            "score": score,
            "impact": impact,
            "spearman": fmean(pair[0] for pair in pairs),
            "spearman_interval": mean_interval([pair[0] for pair in pairs]),
            "top_overlap": fmean(pair[1] for pair in pairs),
            "top_overlap_interval": mean_interval([pair[1] for pair in pairs]),
        }
        for (score, impact), pairs in found.items()
    ]


def mean_interval(values: Sequence[float]) -> list[float]:
    """95 % bootstrap interval of a mean."""
    draws = np.random.default_rng(0).choice(values, size=(BOOTSTRAP_DRAWS, len(values))).mean(1)
    return interval(draws)


def spearman(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two (n,); equal values get their mean rank."""
    ranks = torch.stack([mean_ranks(values) for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1].nan_to_num())


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks (n,) from 1, in float64; equal values get their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]


def top_overlap(one: Tensor, other: Tensor, share: float) -> float:
    """Which part of the largest `share` of one (n,) is also among the largest `share` of the other."""
    count = max(1, int(share * len(one)))
    tops = [set(values.topk(count).indices.tolist()) for values in (one, other)]
    return len(tops[0] & tops[1]) / count
