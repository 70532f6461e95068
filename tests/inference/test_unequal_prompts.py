"""Batches of unequal prompts, each with its own budget: answered as each prompt alone, and as without a shared prefix."""

import warnings
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DEEPSTACK_LEVELS, FAMILIES, pack_together, tiny_decoder, tiny_trace

from nanovlm_v2drop.dropping import DROPPERS, BatchSchedule, Chain, DropSchedule, TokenDropper
from nanovlm_v2drop.dropping.budget import Budget, Shape, shapes_of
from nanovlm_v2drop.dropping.schedule import OutOfReach
from nanovlm_v2drop.inference import NothingDropped, decode_one_token, prefill, share_prefix
from nanovlm_v2drop.models.vision_qwen2 import multimodal_positions
from nanovlm_v2drop.models.vlm import PackedInputs

NUM_LAYERS, TOKENS = 9, (3, 4)
CHAINS = ("visionzip+v2drop", "visionzip+random", "tome+sparsevlm", "fastv+pdrop", "fastv+transprune", "divprune+dart")
GRIDS = st.tuples(st.sampled_from([1, 1, 1, 2, 4, 5]), st.integers(1, 4), st.integers(1, 4))
PARTS = st.lists(st.tuples(st.integers(0, 3), GRIDS), max_size=3)  # text before each picture, and the picture
BUDGETS = st.one_of(
    st.builds(Budget, retain=st.sampled_from([0.1, 0.25, 0.5, 0.8])), st.builds(Budget, tokens=st.sampled_from([1, 3, 6, 12]))
)


def prompt_of(parts: list[tuple[int, tuple[int, int, int]]], behind: int, family: str, seed: int) -> PackedInputs:
    """Pictures with text before each and behind the last one; `behind` may be 0 where there is other text."""
    token_ids = [token for text, grid in parts for token in [0] * text + [1] * prod(grid)]
    token_ids += [0] * (behind or 0 not in token_ids)
    grids, mask = tuple(grid for _, grid in parts), torch.tensor(token_ids) == 1
    embeds = torch.randn(len(token_ids), 32, generator=torch.Generator().manual_seed(seed))
    traces = [tiny_trace(part, seed + place) for place, part in enumerate(embeds[mask].split([prod(grid) for grid in grids]))]
    is_qwen, levels = family.startswith("qwen"), None
    if family == "qwen3-vl" and grids:
        levels = torch.randn(len(token_ids), DEEPSTACK_LEVELS, 32, generator=torch.Generator().manual_seed(seed))
        levels *= mask[:, None, None]
    positions = multimodal_positions(token_ids, grids, {1}) if is_qwen else torch.arange(len(token_ids))
    about = {"seeds": (seed,), "vision_grids": (grids,), "vision": tuple(traces), "deepstack": levels}
    return PackedInputs(embeds, positions, mask, [len(token_ids)], **about)


def schedule_of(method: type[TokenDropper], budget: Budget, shape: Shape) -> DropSchedule:
    try:
        return budget.schedule(method, shape)
    except OutOfReach as error:
        return error.floor


def logits_of(decoder, packed, dropper, prefix=None):
    """The survivors, the cache's lengths, and the logits (3, B, V) of prompt and two decoded tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingDropped)
        out = prefill(decoder, packed, dropper, max_new_tokens=3, prefix=prefix)
    lengths = [list(layer) for layer in out.cache.seqlens]
    steps = [decode_one_token(decoder, torch.full((len(packed.seqlens),), token), out.cache) for token in TOKENS]
    return out.survivors, lengths, torch.stack([out.logits, *steps])


# DyCoke is for one video a prompt: it refuses a budget below the pictures beside a video.
@pytest.mark.parametrize("name", [*(name for name in DROPPERS if name != "dycoke"), *CHAINS])
@settings(deadline=None, max_examples=3)
@given(
    st.lists(st.tuples(PARTS, st.integers(0, 6)), min_size=2, max_size=3),
    st.sampled_from(list(FAMILIES)),
    st.lists(BUDGETS, min_size=3, max_size=3),
)
def test_every_prompt_of_a_batch_is_answered_as_alone_and_as_over_a_shared_prefix(name, asked, family, budgets):
    methods = [DROPPERS[part] for part in name.split("+")]
    method = methods[0] if len(methods) == 1 else Chain.of(methods)
    decoder = tiny_decoder(**FAMILIES[family], num_hidden_layers=NUM_LAYERS)
    prompts = [prompt_of(*one, family, seed) for seed, one in enumerate(asked, 1)]
    packed = pack_together(prompts)
    shapes = shapes_of(packed, NUM_LAYERS)
    schedules = [schedule_of(method, *pair) for pair in zip(budgets, shapes, strict=False)]
    together = method(BatchSchedule(schedules))
    survivors, lengths, logits = logits_of(decoder, packed, together)
    prefix = share_prefix(decoder, packed, [together, DROPPERS["v2drop"](DropSchedule({5: 0.5})), None], max_new_tokens=3)
    assert torch.equal(logits_of(decoder, packed, together, prefix)[2], logits)
    for index, (prompt, schedule, shape) in enumerate(zip(prompts, schedules, shapes, strict=True)):
        own_survivors, own_lengths, own_logits = logits_of(decoder, prompt, method(schedule))
        found = {layer: rows[index].tolist() for layer, rows in survivors}
        assert {layer: rows.tolist() for layer, (rows,) in own_survivors}.items() <= found.items()
        assert [own for (own,) in own_lengths] == [layer[index] for layer in lengths]
        text = prompt.seqlens[0] - shape.num_vision_tokens
        entering = schedule.vision_tokens_per_layer(shape.num_vision_tokens, NUM_LAYERS)
        assert [own - text for (own,) in own_lengths] == entering
        torch.testing.assert_close(own_logits[:, 0], logits[:, index], atol=1e-3, rtol=0)
