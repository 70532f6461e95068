"""A tiny random SmolVLM, made by transformers and laid out as the official checkpoints."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.processing.images_smolvlm import number_words
from nanovlm_v2drop.processing.prompts import TEMPLATES, Request

TILE, PATCH, SCALE = 32, 4, 2  # 8 x 8 patches and 4 x 4 vision tokens a tile
LONGEST_EDGE = 128
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "rope_theta": 1e5,
    "rms_norm_eps": 1e-5,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
}
BASE_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TILE_TOKENS = ("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)))
ADDED = (*TILE_TOKENS, "<fake_token_around_image>", "<image>", "<end_of_utterance>")


def smollm2_tokenizer(added: tuple[str, ...] = ADDED) -> Tokenizer:
    """In the form of SmolLM2's tokenizer.json, with a token for two newlines as there."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    lines = ["User: What colour is the digit? yes no", "Assistant: The digit", "\n\n", "You are provided frames\n\n"] * 4
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(BASE_SPECIALS), show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer


def smolvlm_reference(
    tokenizer: Tokenizer, kind: str = "SmolVLM", vision: dict[str, Any] = VISION, scale: int = SCALE, tied: bool = False
) -> Any:
    """transformers' SmolVLM or Idefics3 with weights so large that every layer matters, and nothing at zero or one."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vision_config=dict(vision),
        text_config={"model_type": "llama", "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64, **TEXT},
        image_token_id=tokenizer.token_to_id("<image>"),
        scale_factor=scale,
        tie_word_embeddings=tied,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale_of = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
        scale_of *= 2 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1  # attention that is not a mere average
        centre = 1 if "norm" in name and name.endswith("weight") else 0
        parameter.copy_(centre + noise * scale_of)
    return model


def preprocessor(kind: str = "SmolVLM", tile: int = TILE, longest_edge: int = LONGEST_EDGE) -> dict[str, Any]:
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{kind}Processor",
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": tile},
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": longest_edge},
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": longest_edge}},
    }


def write_smolvlm_folder(
    folder: Path, reference: Any, tokenizer: Tokenizer, tensors: dict[str, Tensor] | None = None, **sizes: int
) -> Path:
    """A whole checkpoint folder, with the config.json that transformers saves."""
    kind = "SmolVLM" if reference.config.model_type == "smolvlm" else "Idefics3"
    folder.mkdir(exist_ok=True)
    reference.config.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<end_of_utterance>")
    settings = {
        "tokenizer_config.json": {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": end, "pad_token_id": 2},
        "preprocessor_config.json": preprocessor(kind, **sizes),
    }
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content))
    weights = reference.state_dict() if tensors is None else tensors
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def picture(width: int, height: int) -> Image.Image:
    """Blobs of colour with some noise: neither flat nor the same in any two places."""
    rng = np.random.default_rng(width * 10_000 + height)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def clip(number: int, width: int = 50, height: int = 40) -> list[Image.Image]:
    return [picture(width, height).rotate(90 * turn).point(lambda value: value // 2) for turn in range(number)]


class Oracle:
    """transformers' processors for a tiny SmolVLM; those for videos need torchvision, so frames go as unsplit pictures."""

    def __init__(self, vlm: VisionLanguageModel, tokenizer: Tokenizer, **sizes: int) -> None:
        transformers = pytest.importorskip("transformers")
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        settings = preprocessor(**sizes)
        del settings["video_sampling"]
        self.pictures = SmolVLMImageProcessorPil(**settings)
        seq_len = vlm.image_processor.token_grid**2
        self.processor = transformers.Idefics3Processor(self.pictures, wrapped, image_seq_len=seq_len)
        self.wrapped = wrapped

    def pixels(self, images: list[Image.Image], split: bool = True) -> Tensor:
        """(tiles of all pictures, 3, S, S)"""
        parts = [
            torch.from_numpy(np.asarray(self.pictures([[image]], do_image_splitting=split).pixel_values))[0] for image in images
        ]
        return torch.cat(parts)

    def frame_text(self) -> str:
        from transformers.models.smolvlm.processing_smolvlm import _prompt_single_image

        return _prompt_single_image(self.processor.image_seq_len, "<fake_token_around_image>", "<image>", "<global-img>")

    def inputs(self, request: Request) -> dict[str, Tensor]:
        """input_ids and pixel_values of a request with pictures, or with one video given as a list of frames."""
        text = TEMPLATES["smolvlm"](request.text or "") if request.prompt is None else request.prompt
        if request.video is None and not request.images:
            return {"input_ids": torch.tensor([self.wrapped(text)["input_ids"]])}
        if request.video is None:
            given = self.processor(images=[list(request.images)], text=[text])
            pixels = self.pixels(list(request.images))
            return {"input_ids": torch.tensor(given["input_ids"]), "pixel_values": pixels[None]}
        text = text.replace("<video>", video_prompt(request.video, self.processor.image_seq_len))
        return {
            "input_ids": torch.tensor([self.wrapped(text)["input_ids"]]),
            "pixel_values": self.pixels(list(request.video), split=False)[None],
        }


def video_prompt(frames: Any, image_seq_len: int, fps: float | None = None, duration: float | None = None) -> str:
    """The text of a video, by the method of transformers' processor."""
    from types import SimpleNamespace

    from transformers.models.smolvlm import processing_smolvlm
    from transformers.video_utils import VideoMetadata

    processing_smolvlm.num2words = number_words  # the package is not a dependency
    tokens = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "global_image_token": "<global-img>"}
    self = SimpleNamespace(image_seq_len=image_seq_len, **tokens)
    indices = frames if isinstance(frames[0], int) else list(range(len(frames)))
    metadata = VideoMetadata(total_num_frames=len(indices), fps=fps, duration=duration, frames_indices=indices)
    inputs = {"pixel_values": np.zeros((1, len(indices), 1)), "video_metadata": [metadata]}
    return processing_smolvlm.SmolVLMProcessor.replace_video_token(self, inputs, 0)


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names without the outer `model.`, as of a bare model."""
    return {re.sub(r"^model\.", "", name): tensor for name, tensor in state.items()}
