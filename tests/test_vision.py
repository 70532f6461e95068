"""The CLIP tower gives the patch features of transformers' at any depth, and builds no block that is not read."""

import pytest
import torch

from nanovlm_v2drop.config import TextConfig, VisionConfig, VLMConfig
from nanovlm_v2drop.vision import CLIPVisionTower
from nanovlm_v2drop.vlm import LlavaModel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 21,
    "patch_size": 7,
}


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_features_behind_every_block_equal_those_of_transformers(hidden_act: str) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, hidden_act=hidden_act)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    pixel_values = torch.randn(2, 3, 21, 21, generator=generator)
    hidden_states = reference(pixel_values, output_hidden_states=True).hidden_states
    state = {name.removeprefix("vision_model."): tensor for name, tensor in reference.state_dict().items()}
    for num_layers, wanted in enumerate(hidden_states):
        tower = CLIPVisionTower(VisionConfig(**SIZES, hidden_act=hidden_act), num_layers).eval()
        unused = {f"encoder.layers.{layer}" for layer in range(num_layers, 3)} | {"post_layernorm"}
        tower.load_state_dict({k: v for k, v in state.items() if not k.startswith(tuple(unused))}, strict=True)
        features = tower(pixel_values)
        assert features.shape == (2, 9, 32)
        torch.testing.assert_close(features, wanted[:, 1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("vision_feature_layer", "num_blocks"), [(-2, 2), (-1, 3), (1, 1), (0, 0)])
def test_blocks_behind_the_feature_layer_are_not_built(vision_feature_layer: int, num_blocks: int) -> None:
    text = TextConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlavaModel(VLMConfig(VisionConfig(**SIZES), text, vision_feature_layer=vision_feature_layer))
    assert len(model.vision_tower.encoder.layers) == num_blocks


@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (1, 3, 21, 14), (3, 21, 21)])
def test_pixel_values_of_another_size_are_refused_with_both_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pixel_values \(.*\) must be \(N, 3, 21, 21\)"):
        CLIPVisionTower(VisionConfig(**SIZES))(torch.zeros(shape))


def test_an_unknown_activation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="hidden_act 'relu' is not supported; known: quick_gelu, gelu, gelu_pytorch_tanh"):
        CLIPVisionTower(VisionConfig(**SIZES, hidden_act="relu"))
