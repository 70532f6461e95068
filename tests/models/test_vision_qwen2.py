"""Qwen2-VL's tower gives the vision tokens of transformers, frame by frame, and its decoder has the official positions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovlm_v2drop.models import vision_qwen2
from nanovlm_v2drop.models.config import Qwen2VLVisionConfig
from nanovlm_v2drop.models.vision_qwen2 import Grid, Qwen2VLVisionTower, multimodal_positions

SIZES = {"depth": 3, "embed_dim": 48, "hidden_size": 20, "mlp_ratio": 2, "num_heads": 3, "patch_size": 3}
PICTURE, OTHER_SHAPE, CLIP = (1, 4, 6), (1, 2, 10), (3, 6, 4)
ALL = [PICTURE, CLIP, OTHER_SHAPE, OTHER_SHAPE]


def reference(**changes):
    """transformers' tower, with weights so large that every layer and every position matters."""
    module = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    config = module.Qwen2VLVisionConfig(**SIZES | changes)
    config._attn_implementation = "eager"
    tower = module.Qwen2VisionTransformerPretrainedModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in tower.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1.5 * noise * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1 + 0.3 * noise)
    return tower


def tower_like(official, attention: str = "auto", **changes) -> Qwen2VLVisionTower:
    tower = Qwen2VLVisionTower(Qwen2VLVisionConfig(**SIZES | changes), attention).eval().requires_grad_(False)
    tower.load_state_dict(official.state_dict(), strict=True)
    return tower


def pixels(grids: Sequence[Grid], seed: int = 1) -> Tensor:
    return torch.randn(sum(map(prod, grids)), 54, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, official: Tensor) -> None:
    torch.testing.assert_close(ours, official, atol=1e-4 * float(official.abs().max()), rtol=0)


@contextmanager
def recorded_attention(official) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Softmax weights (1, H, n, n) and rotated keys (1, H, n, head_dim) of every frame in every block of transformers."""
    module = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    original, recorded = module.eager_attention_forward, []

    def record(attention, query, key, *arguments, **settings):
        attended, weights = original(attention, query, key, *arguments, **settings)
        recorded.append((weights, key))
        return attended, weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", record)
        yield recorded


# The tower


@pytest.mark.parametrize("grids", [[PICTURE], [OTHER_SHAPE], [CLIP], ALL], ids=["picture", "wide", "clip", "packed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vision_tokens_equal_those_of_transformers(grids, attention):
    official = reference()
    wanted = official(pixels(grids), torch.tensor(grids))
    tower = tower_like(official, attention)
    tokens = tower(pixels(grids), grids)
    assert tokens.shape == (sum(map(prod, grids)) // 4, 20)
    assert_close(tokens, wanted.pooler_output)
    assert_close(tower.encode(pixels(grids), grids)[1], wanted.last_hidden_state)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"spatial_merge_size": 1},
        {"depth": 1},
        {"mlp_ratio": 3},
        {"temporal_patch_size": 1, "in_channels": 6},
    ],
    ids=str,
)
def test_other_towers_equal_those_of_transformers(changes):
    official = reference(**changes)
    wanted = official(pixels(ALL), torch.tensor(ALL)).pooler_output
    assert_close(tower_like(official, **changes)(pixels(ALL), ALL), wanted)


def test_faint_patches_show_the_epsilon_of_transformers_norms():
    official = reference()
    faint = 3e-3 * pixels(ALL)
    assert_close(tower_like(official)(faint, ALL), official(faint, torch.tensor(ALL)).pooler_output)


def test_the_input_of_the_last_block_is_what_it_reads():
    official = reference()
    tower = tower_like(official)
    block_input, output = tower.encode(pixels(ALL), ALL)
    shorter = tower_like(official)
    del shorter.blocks[-1]
    assert torch.equal(block_input, shorter.encode(pixels(ALL), ALL)[1])
    assert torch.equal(tower(pixels(ALL), ALL), tower.merger(output))


def test_a_pack_equals_its_pictures_one_by_one_and_a_clip_its_frames():
    tower = tower_like(reference())
    together = tower(pixels(ALL), ALL)
    frames = [(1, rows, columns) for count, rows, columns in ALL for _ in range(count)]
    parts = pixels(ALL).split([prod(frame) for frame in frames])
    alone = torch.cat([tower(part, [frame]) for part, frame in zip(parts, frames, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_shape_of_the_grid_matters_and_not_only_its_size():
    tower = tower_like(reference())
    first, second = (tower(pixels([grid]), [grid]) for grid in [(1, 4, 6), (1, 6, 4)])
    assert (first - second).abs().max() > 0.1


def test_half_precision_rotates_in_float32():
    tower = tower_like(reference()).to(torch.bfloat16)
    hidden_states = torch.randn(24, 48, dtype=torch.bfloat16)
    rotary = tower.rotary_table([PICTURE], hidden_states.device)
    attention = tower.last_block.attn
    q, k, v = attention.rotated(hidden_states, rotary)
    plain = attention.qkv(hidden_states).unflatten(-1, (3, 3, 16)).float()
    cos, sin = rotary
    turned = [heads * cos + torch.cat([-heads[..., 8:], heads[..., :8]], -1) * sin for heads in plain.unbind(1)[:2]]
    assert torch.equal(q, turned[0].bfloat16())
    assert torch.equal(k, turned[1].bfloat16())
    assert v.dtype == torch.bfloat16
    assert tower(pixels([PICTURE]), [PICTURE]).dtype == torch.bfloat16


# Attention and keys for methods that choose tokens before the decoder


def test_received_attention_is_the_mean_over_the_queries_of_the_same_frame():
    official, grids = reference(), [PICTURE, CLIP, OTHER_SHAPE]
    with recorded_attention(official) as recorded:
        official(pixels(grids), torch.tensor(grids))
    wanted = torch.cat([weights[0].mean(1) for weights, _ in recorded[-5:]], dim=-1)
    tower = tower_like(official)
    received = tower.received_attention(tower.encode(pixels(grids), grids)[0], grids)
    assert received.shape == (3, sum(map(prod, grids)))
    torch.testing.assert_close(received, wanted, atol=1e-5, rtol=1e-3)


def test_keys_are_those_that_the_last_block_attends_to():
    official, grids = reference(), [PICTURE, CLIP, OTHER_SHAPE]
    with recorded_attention(official) as recorded:
        official(pixels(grids), torch.tensor(grids))
    tower = tower_like(official)
    keys = tower.keys(tower.encode(pixels(grids), grids)[0], grids)
    assert keys.shape == (3, sum(map(prod, grids)), 16)
    assert_close(keys, torch.cat([key[0] for _, key in recorded[-5:]], dim=1))


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        result = operation(*arguments, **(settings or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("limit", [1, 400_000, 1_000_000])
def test_received_attention_holds_no_more_weights_than_it_may_and_gives_the_same(monkeypatch, limit):
    grid = (1, 32, 32)
    tower = tower_like(reference())
    block_input = torch.randn(1024, 48, generator=torch.Generator().manual_seed(2))
    at_once = tower.received_attention(block_input, [grid])
    q, k, _ = tower.last_rotated(block_input, [grid])
    monkeypatch.setattr(vision_qwen2, "WEIGHTS_BYTES", limit)
    with LargestTensor() as seen:
        received = vision_qwen2.received_in_frame(q, k)
    torch.testing.assert_close(received, at_once, atol=1e-7, rtol=1e-5)
    # Twice, because the scores and their softmax are in memory together; the keys (L, H, head_dim) are added.
    assert 2 * seen.largest <= max(limit, 2 * k.numel() * k.element_size())


def test_received_attention_sums_to_one_in_every_frame():
    tower = tower_like(reference())
    received = tower.received_attention(tower.encode(pixels([CLIP]), [CLIP])[0], [CLIP])
    torch.testing.assert_close(received.unflatten(1, (3, 24)).sum(-1), torch.ones(3, 3))


# Attention


# What the tower refuses


@pytest.mark.parametrize("grid", [(1, 3, 4), (1, 4, 3), (0, 4, 4), (1, 0, 4)])
def test_a_grid_that_cannot_be_merged_is_refused_with_the_merge_size(grid):
    tower = Qwen2VLVisionTower(Qwen2VLVisionConfig(**SIZES))
    with pytest.raises(ValueError, match=r"grid \(\d, \d, \d\).*multiples of spatial_merge_size 2"):
        tower(pixels([grid]), [grid])


@pytest.mark.parametrize(
    ("shape", "grids"), [((23, 54), [PICTURE]), ((24, 53), [PICTURE]), ((1, 24, 54), [PICTURE]), ((0, 54), [])]
)
def test_patches_that_the_grids_do_not_hold_are_refused_with_both_shapes(shape, grids):
    tower = Qwen2VLVisionTower(Qwen2VLVisionConfig(**SIZES))
    with pytest.raises(ValueError, match=r"pixel_values \(.*\) must be \(\d+, 54\) for the grids"):
        tower(torch.zeros(shape), grids)


def test_an_unknown_activation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="hidden_act = 'relu' is not supported; expected one of 'quick_gelu'"):
        Qwen2VLVisionTower(Qwen2VLVisionConfig(**SIZES | {"hidden_act": "relu"}))


def test_a_width_that_two_axes_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"embed_dim 42 must be a positive multiple of 4 \* num_heads .*12"):
        Qwen2VLVisionConfig(**SIZES | {"embed_dim": 42})


# Positions

IMAGE, VIDEO = 97, 98


def prompt_of(parts: Sequence[int | tuple[int, Grid]]) -> tuple[list[int], list[Grid]]:
    """Token ids and grids from text lengths and (vision token, grid) pairs."""
    token_ids: list[int] = []
    for part in parts:
        token_ids += [5] * part if isinstance(part, int) else [part[0]] * prod(part[1])
    return token_ids, [part[1] for part in parts if not isinstance(part, int)]


def slow_positions(parts: Sequence[int | tuple[int, Grid]]) -> list[tuple[int, int, int]]:
    """One token after the other, as in transformers 4.57: after a picture or video, the largest position so far + 1."""
    places: list[tuple[int, int, int]] = []
    for part in parts:
        start = max((max(place) for place in places), default=-1) + 1
        if isinstance(part, int):
            places += [(start + index,) * 3 for index in range(part)]
        else:
            frames, rows, columns = part[1]
            places += [(start + t, start + h, start + w) for t in range(frames) for h in range(rows) for w in range(columns)]
    return places


side = st.integers(1, 4)
parts_of_prompts = st.lists(
    st.one_of(st.integers(0, 5), st.tuples(st.sampled_from([IMAGE, VIDEO]), st.tuples(side, side, side))), max_size=6
)


@given(parts=parts_of_prompts)
@settings(max_examples=200, deadline=None)
def test_positions_go_on_behind_the_largest_even_between_adjacent_pictures(parts):
    positions = multimodal_positions(*prompt_of(parts), {IMAGE, VIDEO})
    assert positions.dtype == torch.int64
    assert positions.shape == (3, len(prompt_of(parts)[0]))
    assert [tuple(place) for place in positions.T.tolist()] == slow_positions(parts)


@pytest.mark.parametrize(
    "parts",
    [
        [7],
        [3, (IMAGE, (1, 2, 5)), 4],
        [(IMAGE, (1, 3, 2)), 1, (IMAGE, (1, 1, 1)), 2],
        [2, (VIDEO, (1, 4, 3)), 3, (IMAGE, (1, 2, 2)), 1],
        [2, (VIDEO, (3, 4, 3)), 3],  # more rows than frames: transformers 4 and 5 agree
    ],
)
def test_positions_equal_those_of_transformers(parts):
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 0, "intermediate_size": 8, "vocab_size": 99}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config={"depth": 0, "embed_dim": 8, "num_heads": 1})
    model = transformers.Qwen2VLForConditionalGeneration(config).model
    token_ids, _ = prompt_of(parts)
    grids = {kind: [(t, 2 * h, 2 * w) for token, (t, h, w) in filter(pairs, parts) if token == kind] for kind in (IMAGE, VIDEO)}
    kinds = torch.tensor([{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in token_ids])
    wanted, _ = model.get_rope_index(
        torch.tensor([token_ids]),
        kinds[None],
        image_grid_thw=torch.tensor(grids[IMAGE]) if grids[IMAGE] else None,
        video_grid_thw=torch.tensor(grids[VIDEO]) if grids[VIDEO] else None,
    )
    assert torch.equal(multimodal_positions(*prompt_of(parts), [IMAGE, VIDEO]), wanted[:, 0])


def pairs(part: object) -> bool:
    return isinstance(part, tuple)


def test_text_behind_a_long_video_follows_its_last_frame():
    # transformers 5 would continue at 7, inside the video; the model was trained with 19.
    token_ids, grids = prompt_of([3, (VIDEO, (16, 4, 4)), 3])
    assert multimodal_positions(token_ids, grids, {VIDEO})[:, -3:].tolist() == [[19, 20, 21]] * 3


@pytest.mark.parametrize(
    ("token_ids", "grids", "message"),
    [
        ([5, IMAGE, IMAGE, 5], [(1, 1, 3)], r"a run of 2 vision tokens .* next grids \[\(1, 1, 3\)\], which hold 3"),
        ([5, IMAGE, IMAGE, 5], [(1, 1, 1)], r"a run of 2 vision tokens .* which hold 1"),
        ([5, IMAGE, VIDEO, 5], [(1, 1, 2)], r"a run of 1 vision tokens .* which hold 2"),
        ([IMAGE], [], r"a run of 1 vision tokens does not match the next grids \[\], which hold 0"),
        ([IMAGE, 5], [(1, 1, 1), (1, 2, 2)], r"no vision tokens for the last 1 of the grids"),
        ([5], [(1, 1, 1)], r"no vision tokens for the last 1 of the grids"),
    ],
)
def test_runs_and_grids_that_disagree_are_refused(token_ids, grids, message):
    with pytest.raises(ValueError, match=message):
        multimodal_positions(token_ids, grids, {IMAGE, VIDEO})
