"""The splice puts every vision feature at the place of its image token, and refuses numbers that do not match."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovlm_v2drop.models.config import LlavaConfig, TextConfig, VisionConfig
from nanovlm_v2drop.models.vlm import LlavaModel, PackedInputs, VisionInput, traces_of

VOCAB_SIZE, NUM_PATCHES = 20, 4
PICTURE = "picture"
segments = st.lists(st.just(PICTURE) | st.integers(0, VOCAB_SIZE - 2), min_size=1, max_size=6)


def tiny_llava(image_token_id: int) -> LlavaModel:
    torch.manual_seed(0)
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = VisionConfig(hidden_size=8, image_size=8, patch_size=4, **sizes)
    text = TextConfig(vocab_size=VOCAB_SIZE, hidden_size=12, **sizes)
    return LlavaModel(LlavaConfig(text, image_token_id, vision_config=vision)).eval().requires_grad_(False)


def pixels(num_pictures: int) -> torch.Tensor:
    return torch.randn(num_pictures, 3, 8, 8, generator=torch.Generator().manual_seed(num_pictures))


def pictures(pixel_values: torch.Tensor) -> list[VisionInput]:
    return [VisionInput(picture[None], ((1, 2, 2),), (8, 8)) for picture in pixel_values]


@pytest.mark.parametrize("image_token_id", [VOCAB_SIZE - 1, VOCAB_SIZE, 32000])  # the last two have no embedding
@settings(deadline=None, max_examples=25)
@given(prompts=st.lists(segments, min_size=1, max_size=4))
@example(prompts=[[3, PICTURE, 5]])
@example(prompts=[[PICTURE, 1, PICTURE, PICTURE], [4, 2], [7, PICTURE]])
@example(prompts=[[4, 2], [7]])
def test_features_stand_at_the_image_tokens_in_reading_order(image_token_id: int, prompts: list[list[int | str]]) -> None:
    model = tiny_llava(image_token_id)
    num_pictures = sum(prompt.count(PICTURE) for prompt in prompts)
    pixel_values = pixels(num_pictures)
    features = iter(model.encode_images(pixel_values) if num_pictures else [])
    waiting = iter(pictures(pixel_values))
    media = [[next(waiting) for part in prompt if part == PICTURE] for prompt in prompts]
    embed_tokens = model.language_model.embed_tokens.weight
    rows, token_ids = [], []
    for prompt in prompts:
        rows.append([next(features) if part == PICTURE else embed_tokens[part][None] for part in prompt])
        repeated = [[image_token_id] * NUM_PATCHES if part == PICTURE else [part] for part in prompt]
        token_ids.append([token for part in repeated for token in part])
    packed = model.pack(token_ids, media, tuple(range(len(prompts))))
    assert torch.equal(packed.inputs_embeds, torch.cat([torch.cat(parts) for parts in rows]))
    assert packed.vision_mask.tolist() == [token == image_token_id for prompt in token_ids for token in prompt]
    assert packed.position_ids.tolist() == [position for prompt in token_ids for position in range(len(prompt))]
    assert packed.seqlens == tuple(map(len, token_ids))
    assert packed.vision_counts == tuple(NUM_PATCHES * prompt.count(PICTURE) for prompt in prompts)
    assert packed.seeds == tuple(range(len(prompts)))


def test_what_the_grids_of_a_picture_share_is_computed_once_and_goes_with_their_traces() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def computed(*shape: int) -> torch.Tensor:
        values = torch.randn(shape)
        held.append(weakref.ref(values))
        return values

    medium = VisionInput(torch.zeros(1, 3, 8, 8), ((1, 2, 2), (1, 1, 1)), (8, 8))
    traces = traces_of(medium, torch.randn(5, 6), lambda: computed(2, 5), lambda: computed(2, 5, 3))
    assert held == []
    assert [trace.received_attention().shape for trace in traces] == [(2, 4), (2, 1)]
    assert [trace.keys().shape for trace in traces] == [(2, 4, 3), (2, 1, 3)]
    assert len(held) == 2
    gc.disable()  # so that only the end of the traces releases the values
    try:
        del traces
        assert [values() for values in held] == [None, None]
    finally:
        gc.enable()


def test_a_picture_has_the_same_features_in_every_batch() -> None:
    model, pixel_values = tiny_llava(0), pixels(3)
    together = model.encode_images(pixel_values)
    alone = torch.cat([model.encode_images(picture[None]) for picture in pixel_values])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("num_tokens", "num_pictures", "message"),
    [
        (3, 1, "holds 3 image and video tokens but its pictures give 4 vision features; repeat each token once for each"),
        (4, 2, "holds 4 image and video tokens but its pictures give 8 vision features"),
        (8, 1, "holds 8 image and video tokens but its pictures give 4 vision features"),
        (4, 0, "holds 4 image and video tokens but its pictures give 0 vision features"),
        (0, 1, "holds 0 image and video tokens but its pictures give 4 vision features"),
    ],
)
def test_image_tokens_that_do_not_match_the_pictures_are_refused(num_tokens: int, num_pictures: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_llava(19).pack([[1, *[19] * num_tokens, 2]], [pictures(pixels(num_pictures))], (0,))


def test_each_prompt_must_hold_its_own_pictures() -> None:
    media = pictures(pixels(2))
    with pytest.raises(ValueError, match="holds 8 image and video tokens but its pictures give 4"):
        tiny_llava(19).pack([[1, *[19] * 8, 2], [3]], [media[:1], media[1:]], (0, 0))


def test_packed_inputs_count_the_vision_tokens_of_each_sequence() -> None:
    vision_mask = torch.tensor([False, True, True, False, False, True])
    packed = PackedInputs(torch.zeros(6, 2), torch.arange(6).expand(3, -1), vision_mask, torch.tensor([3, 1, 2]))
    assert packed.seqlens == (3, 1, 2)
    assert packed.vision_counts == (2, 0, 1)
    assert packed.seeds == (0, 0, 0)
    assert packed.vision_grids == (((1, 1, 2),), (), ((1, 1, 1),))
    with pytest.raises(ValueError, match=r"hold \(3, 0, 1\) tokens, the prompts \(2, 0, 1\)"):
        replace(packed, vision_grids=(((1, 1, 3),), (), ((1, 1, 1),)))


@pytest.mark.parametrize("seqlens", [[], [3, 0, 3], [7, -1]])
def test_an_empty_sequence_is_refused(seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match="packed inputs disagree on the number of tokens"):
        PackedInputs(torch.zeros(6, 2), torch.arange(6), torch.zeros(6, dtype=torch.bool), seqlens)
