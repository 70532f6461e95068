"""A tiny random LLaVA-1.6, made by transformers and laid out as llava-hf lays out its checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, PATCH_SIZE, official_names, tiny_tokenizer, write_processing_files
from PIL import Image
from safetensors.torch import save_file

from nanovlm_v2drop import Request
from nanovlm_v2drop.loading.zoo import VisionLanguageModel

PINPOINTS = [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]
BLOCKS = {"num_attention_heads": 2, "intermediate_size": 64}


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def llava_next_reference(decoder: str = "Llama", num_hidden_layers: int = 4, **text_settings: Any) -> Any:
    """transformers' LlavaNextForConditionalGeneration, weights so large that every layer matters.

    `decoder`: the beginning of the class of its text config.
    """
    transformers = pytest.importorskip("transformers")
    tokenizer = tiny_tokenizer()
    vision = {"hidden_size": 32, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "num_hidden_layers": 4, **BLOCKS}
    text = {
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "hidden_size": 48,
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        **BLOCKS,
    }
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=getattr(transformers, f"{decoder}Config")(**{**text, **text_settings}),
        image_token_index=tokenizer.token_to_id("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    model = transformers.LlavaNextForConditionalGeneration(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    return model


def next_processor() -> Any:
    """The official processor of pictures."""
    transformers = pytest.importorskip("transformers")
    sizes = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": IMAGE_SIZE}
    return transformers.LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS)


def write_llava_next_folder(folder: Path, reference: Any) -> Path:
    """The model as a checkpoint of llava-hf."""
    reference.config.save_pretrained(folder)
    write_processing_files(folder, tiny_tokenizer())
    next_processor().save_pretrained(folder)
    state = reference.state_dict()
    newline = state.pop("model.image_newline")
    save_file({**official_names(state), "image_newline": newline}, folder / "model.safetensors")
    return folder


def official_inputs(vlm: VisionLanguageModel, request: Request) -> dict[str, torch.Tensor]:
    """What transformers' model takes for a request, its pictures padded to one number of tiles."""
    token_ids, media = vlm.tokens_and_media(request)
    tiles = max(len(medium.pixel_values) for medium in media)
    empty = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    padded = [torch.cat([m.pixel_values, empty.expand(tiles - len(m.pixel_values), -1, -1, -1)]) for m in media]
    sizes = torch.tensor([medium.size for medium in media])
    return {"input_ids": torch.tensor([token_ids]), "pixel_values": torch.stack(padded), "image_sizes": sizes}
