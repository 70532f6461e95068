"""The recipe of weights/demo: a LLaVA-1.5 that is trained from random weights on pictures of scenes.py."""

from tokenizers import Tokenizer
from torch import Tensor

from ..models.config import LlavaConfig, TextConfig
from ..models.vlm import LlavaModel
from ..processing.images import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from .data import SCENES, VISION, corpus, llama_tokenizer
from .export import export_llava
from .recipe import Demo, Recipe, padded_vocabulary


def demo_config(tokenizer: Tokenizer) -> LlavaConfig:
    """12 layers, so that the paper's drop depths (10 %, 50 %, 70 %) are three different layers."""
    text = TextConfig(
        vocab_size=padded_vocabulary(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=6,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
    )
    return LlavaConfig(text, tokenizer.get_vocab()["<image>"], vision_config=VISION)


def picture_features(model: LlavaModel, seen: Tensor) -> Tensor:
    """The tower's output for N pictures (N, P, V) -> vision tokens (N, P, D)."""
    return model.multi_modal_projector(seen)


DEMO = Demo(
    world=SCENES,
    make_tokenizer=lambda: llama_tokenizer(corpus()),
    make_config=demo_config,
    make_model=LlavaModel,
    media_features=picture_features,
    export=export_llava,
    vision_tokens=VISION.num_patches,
    image_mean=CLIP_IMAGE_MEAN,
    image_std=CLIP_IMAGE_STD,
    recipe=Recipe(),
)
