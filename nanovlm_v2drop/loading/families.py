"""What surrounds a model of each family: its image processor, the frames it sees of a video, and how it is asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..models.config import (
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    NanoVLMConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
    VLMConfig,
    read_json_object,
)
from ..processing.chat_template import read_chat_template
from ..processing.images import DEFAULT_ASPECT_RATIO, ImageProcessor, PlannedMedium
from ..processing.images_nanovlm import NanoVLMImageProcessor
from ..processing.images_onevision import NextImageProcessor, OnevisionImageProcessor
from ..processing.images_qwen2 import Qwen2VLImageProcessor
from ..processing.images_qwen3 import Qwen3VLImageProcessor
from ..processing.images_smolvlm import SmolVLMImageProcessor, read_sampling
from ..processing.opening import ImageSource
from ..processing.prompts import DEFAULT_TEMPLATE, TEMPLATES, Conversation, named_template
from ..processing.video import FpsSampling, FrameSampling, Qwen3VLSampling, SampledVideo, SmolVLMSampling, UniformSampling
from .specs import OWN_TEMPLATE

VICUNA_TYPES = (None, "llama", "llava", "llava_llama")  # model_type of its decoder in config.json
VICUNA_VOCABULARY = 33_000  # larger ones are those of Llama 3 and Yi, which are asked otherwise


class MediaProcessor(Protocol):
    """Turns pictures and frames into what a model's tower reads."""

    def plan_image(self, picture: ImageSource, alone: bool = True) -> PlannedMedium:
        """One picture; `alone`: it is the only one of its request, where a video may be too."""

    def plan_video(self, video: SampledVideo) -> PlannedMedium:
        """The sampled frames of one video; raises ValueError where the model takes none."""


@dataclass(frozen=True)
class Family:
    """How the papers ask models of one kind: the template in prompts.TEMPLATES, and which frames of a video they see."""

    template: str
    sampling: FrameSampling


FAMILIES: dict[type[VLMConfig], Family] = {
    LlavaConfig: Family(DEFAULT_TEMPLATE, UniformSampling()),
    LlavaNextConfig: Family(DEFAULT_TEMPLATE, UniformSampling()),
    LlavaOnevisionConfig: Family("qwen_1_5", UniformSampling()),
    Qwen2VLConfig: Family("qwen2_vl", FpsSampling()),
    Qwen2_5_VLConfig: Family("qwen2_vl", FpsSampling()),
    Qwen3VLConfig: Family("qwen3_vl", Qwen3VLSampling()),
    SmolVLMConfig: Family("smolvlm", SmolVLMSampling()),
    NanoVLMConfig: Family("nanovlm", UniformSampling()),
}


def media_processor(folder: Path, config: VLMConfig, image_aspect_ratio: str, max_pixels: int | None) -> MediaProcessor:
    """What makes pictures ready for a model of this family, with the settings of its folder.

    Raises ValueError for an `image_aspect_ratio` that the family does not know, and what the folder's settings raise.
    """
    if image_aspect_ratio != DEFAULT_ASPECT_RATIO and type(config) is not LlavaConfig:
        raise ValueError(f"image_aspect_ratio {image_aspect_ratio!r} is a choice of LLaVA-1.5 alone; leave it out for {folder}")
    match config:
        case NanoVLMConfig():
            return NanoVLMImageProcessor.from_config(config)
        case SmolVLMConfig():
            return SmolVLMImageProcessor.from_folder(folder, config)
        case Qwen3VLConfig():
            return Qwen3VLImageProcessor.from_folder(folder, config.vision_config, max_pixels)
        case Qwen2VLConfig():
            return Qwen2VLImageProcessor.from_folder(folder, config.vision_config, max_pixels)
        case LlavaOnevisionConfig():
            return OnevisionImageProcessor.from_folder(folder, config)
        case LlavaNextConfig():
            return NextImageProcessor.from_folder(folder, config)
        case LlavaConfig(vision_config=vision):
            return ImageProcessor.from_folder(folder, vision.image_size, image_aspect_ratio, vision.patch_size)
    raise TypeError(f"{type(config).__name__} has no image processor")


def released_sampling(folder: Path, config: VLMConfig, frames: int | None) -> FrameSampling:
    """Which frames of a video a model was released with: `frames` spread evenly, or what its folder or its family says."""
    if frames is not None:
        return UniformSampling(frames)
    return read_sampling(folder) if type(config) is SmolVLMConfig else FAMILIES[type(config)].sampling


def papers_template(folder: Path, config: VLMConfig) -> str | None:
    """The named template with which the papers ask this model; None where its decoder is another than theirs."""
    raw = read_json_object(folder / "config.json")
    text = raw.get("text_config", raw)  # the original files are flat
    if isinstance(config, NanoVLMConfig) and config.max_side is None:
        return "nanovlm_222m"
    if type(config) is LlavaNextConfig and text.get("model_type") == "mistral":
        return "mistral_instruct"
    if isinstance(config, Qwen2VLConfig | SmolVLMConfig):
        known = True
    elif isinstance(config, LlavaOnevisionConfig):
        known = config.text_config.qkv_bias  # Qwen2's
    else:
        is_llama = text.get("model_type") in VICUNA_TYPES and not config.text_config.qkv_bias
        known = is_llama and config.text_config.vocab_size <= VICUNA_VOCABULARY
    return FAMILIES[type(config)].template if known else None


def find_conversation(folder: Path, config: VLMConfig, template: str | None) -> tuple[str, Conversation]:
    """How the model is asked, and the name of that: the template asked for, the papers', or that of the folder.

    `template`: a name in prompts.TEMPLATES, or "checkpoint" for the folder's own; None decides by the model.
    Raises ValueError for an unknown name, a broken template of the folder, or a model whose conversation is not known.
    """
    name = template or papers_template(folder, config)
    if name is not None and name != OWN_TEMPLATE:
        return name, named_template(name)
    own = read_chat_template(folder, TEMPLATES[FAMILIES[type(config)].template])
    if own is None:
        papers = "" if name == OWN_TEMPLATE else ", and none of the papers' is for its decoder"
        known = ", ".join(sorted(TEMPLATES))
        raise ValueError(f"{folder} holds no chat template{papers}; give --template NAME, one of: {known}")
    return own.name, own
