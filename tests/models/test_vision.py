"""The CLIP and SigLIP towers give the features of transformers at any depth, and build no unread block."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanovlm_v2drop.models.config import LlavaConfig, SiglipVisionConfig, TextConfig, VisionConfig
from nanovlm_v2drop.models.vision import CLIPVisionTower, SiglipVisionTower, VisionTower
from nanovlm_v2drop.models.vlm import LlavaModel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 21,
    "patch_size": 7,
}


# The picture's side is not a multiple of the patch size, as in SigLIP's 384 / 14.
SIGLIP_SIZES = {**SIZES, "image_size": 24}


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def official_clip(**changes: Any) -> Any:
    """transformers' CLIP tower, randomly filled."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(**{**SIZES, **changes}, attn_implementation="eager")
    reference = transformers.CLIPVisionModel(config).eval().requires_grad_(False)
    fill(reference)
    return reference


def official_siglip(**changes: Any) -> Any:
    """transformers' SigLIP tower, randomly filled."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(**{**SIGLIP_SIZES, **changes}, vision_use_head=False, attn_implementation="eager")
    reference = transformers.SiglipVisionModel(config).eval().requires_grad_(False)
    fill(reference)
    return reference


def load_blocks(tower: VisionTower, reference: Any) -> VisionTower:
    """The tower with the weights of transformers' tower, without the blocks and the norm that `tower` does not have."""
    state = {name.removeprefix("vision_model."): tensor for name, tensor in reference.state_dict().items()}
    depth = reference.config.num_hidden_layers
    unused = {f"encoder.layers.{layer}." for layer in range(len(tower.encoder.layers), depth)} | {"post_layernorm."}
    tower.load_state_dict({k: v for k, v in state.items() if not k.startswith(tuple(unused))}, strict=True)
    return tower.eval()


def random_pixels(count: int, image_size: int) -> Tensor:
    return torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_features_behind_every_block_equal_those_of_transformers(hidden_act: str) -> None:
    reference, pixel_values = official_clip(hidden_act=hidden_act), random_pixels(2, 21)
    hidden_states = reference(pixel_values, output_hidden_states=True).hidden_states
    for num_layers, wanted in enumerate(hidden_states):
        tower = load_blocks(CLIPVisionTower(VisionConfig(**SIZES, hidden_act=hidden_act), num_layers), reference)
        features = tower(pixel_values)
        assert features.shape == (2, 9, 32)
        torch.testing.assert_close(features, wanted[:, 1:], atol=1e-4, rtol=0)


def test_siglips_features_behind_every_block_equal_those_of_transformers() -> None:
    reference, pixel_values = official_siglip(), random_pixels(2, 24)
    hidden_states = reference(pixel_values, output_hidden_states=True).hidden_states
    for num_layers, wanted in enumerate(hidden_states):
        tower = load_blocks(SiglipVisionTower(SiglipVisionConfig(**SIGLIP_SIZES), num_layers), reference)
        features = tower(pixel_values)
        assert features.shape == (2, 9, 32)
        torch.testing.assert_close(features, wanted, atol=1e-4, rtol=0)


def test_siglips_features_equal_those_of_transformers_on_the_real_grid() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    reference = official_siglip(**sizes, image_size=384, patch_size=14)
    tower = load_blocks(SiglipVisionTower(SiglipVisionConfig(**sizes)), reference)
    pixel_values = random_pixels(1, 384)
    features = tower(pixel_values)
    assert features.shape == (1, 27**2, 8)
    torch.testing.assert_close(
        features, reference(pixel_values, output_hidden_states=True).hidden_states[-1], atol=1e-4, rtol=0
    )


def test_the_class_tokens_attention_is_that_of_transformers_last_block() -> None:
    reference, pixel_values = official_clip(), random_pixels(3, 21)
    tower = load_blocks(CLIPVisionTower(VisionConfig(**SIZES)), reference)
    wanted = reference(pixel_values, output_attentions=True).attentions[-1]
    received = tower.received_attention(tower.encode(pixel_values)[0])
    assert received.shape == (3, 4, 9)
    torch.testing.assert_close(received, wanted[:, :, 0, 1:], atol=1e-5, rtol=0)


def test_siglips_received_attention_is_the_mean_of_transformers_last_block() -> None:
    reference, pixel_values = official_siglip(), random_pixels(3, 24)
    tower = load_blocks(SiglipVisionTower(SiglipVisionConfig(**SIGLIP_SIZES)), reference)
    wanted = reference(pixel_values, output_attentions=True).attentions[-1]
    received = tower.received_attention(tower.encode(pixel_values)[0])
    assert received.shape == (3, 4, 9)
    torch.testing.assert_close(received, wanted.mean(-2), atol=1e-5, rtol=0)
    torch.testing.assert_close(received.sum(-1), torch.ones(3, 4))


def test_attention_is_in_float32_where_the_tower_is_in_half_precision() -> None:
    tower = SiglipVisionTower(SiglipVisionConfig(**SIGLIP_SIZES)).bfloat16()
    assert tower.received_attention(torch.randn(1, 9, 32).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("kind", "tokens"), [("clip", 10), ("siglip", 9)])
def test_keys_are_those_that_the_last_block_makes(kind: str, tokens: int) -> None:
    reference = official_clip() if kind == "clip" else official_siglip(image_size=21)
    made = CLIPVisionTower(VisionConfig(**SIZES)) if kind == "clip" else SiglipVisionTower(SiglipVisionConfig(**SIZES))
    tower, seen = load_blocks(made, reference), []
    layers = [module for name, module in reference.named_modules() if name.endswith("layers.2.self_attn.k_proj")]
    layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    reference(random_pixels(2, 21))
    keys = tower.keys(tower.encode(random_pixels(2, 21))[0])
    assert keys.shape == (2, 4, tokens, 8)
    torch.testing.assert_close(keys.transpose(1, 2).flatten(2), seen[0], atol=1e-4, rtol=0)


def test_encode_gives_the_input_and_the_output_of_the_last_block() -> None:
    reference, pixel_values = official_siglip(), random_pixels(2, 24)
    tower = load_blocks(SiglipVisionTower(SiglipVisionConfig(**SIGLIP_SIZES), 2), reference)
    hidden_states = reference(pixel_values, output_hidden_states=True).hidden_states
    for found, wanted in zip(tower.encode(pixel_values), hidden_states[1:3], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tower", [CLIPVisionTower(VisionConfig(**SIZES)), SiglipVisionTower(SiglipVisionConfig(**SIZES))])
def test_a_tower_says_how_many_of_its_tokens_are_no_patches(tower: VisionTower) -> None:
    pixel_values = random_pixels(1, 21)
    output = tower.encode(pixel_values)[1]
    assert torch.equal(output[:, tower.num_class_tokens :], tower(pixel_values))
    assert output.shape[1] == tower.num_class_tokens + 9


@pytest.mark.parametrize(("vision_feature_layer", "num_blocks"), [(-2, 2), (-1, 3), (1, 1), (0, 0)])
def test_blocks_behind_the_feature_layer_are_not_built(vision_feature_layer: int, num_blocks: int) -> None:
    text = TextConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlavaModel(LlavaConfig(text, vision_config=VisionConfig(**SIZES), vision_feature_layer=vision_feature_layer))
    assert len(model.vision_tower.encoder.layers) == num_blocks


@pytest.mark.parametrize("tower", [CLIPVisionTower(VisionConfig(**SIZES)), SiglipVisionTower(SiglipVisionConfig(**SIZES))])
@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (1, 3, 21, 14), (3, 21, 21)])
def test_pixel_values_of_another_size_are_refused_with_both_sizes(tower: VisionTower, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pixel_values \(.*\) must be \(N, 3, 21, 21\)"):
        tower(torch.zeros(shape))


def test_an_unknown_activation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"hidden_act = 'relu' .*expected one of 'quick_gelu', 'gelu', 'gelu_pytorch_tanh'"):
        CLIPVisionTower(VisionConfig(**SIZES, hidden_act="relu"))


@pytest.mark.parametrize("pictures", [1, 2])
def test_eager_attention_gives_the_features_of_sdpa(pictures: int) -> None:
    tower = CLIPVisionTower(VisionConfig(**SIZES), 3)
    fill(tower)
    pixel_values = torch.randn(pictures, 3, 21, 21, generator=torch.Generator().manual_seed(1))
    wanted, tower.attention = tower(pixel_values), "eager"
    torch.testing.assert_close(tower(pixel_values), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("pictures", "pieces"), [(1, [1]), (5, [2, 2, 1])])
def test_a_cpu_takes_few_pictures_at_a_time_with_the_same_features(
    pictures: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = CLIPVisionTower(VisionConfig(**SIZES), 3)
    fill(tower)
    pixel_values = random_pixels(pictures, 21)
    together = tower.encode(pixel_values)
    monkeypatch.setattr("nanovlm_v2drop.models.vision.VALUES_AT_ONCE", 2 * 10 * 32)  # of two pictures with 10 tokens each
    seen: list[int] = []
    tower.encoder.last_block.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    torch.testing.assert_close(tower.encode(pixel_values), together)
    assert seen == pieces
