"""The models by name, and `load`: from a name or a folder to something that takes requests.

A new model of a known family is one entry in MODELS.
"""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..models.attention import resolve_backend
from ..models.config import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig, Qwen2VLConfig, VLMConfig
from ..models.parallel import join_processes, tensor_mesh
from ..models.vlm import VLM, PackedInputs, VisionInput
from ..processing.images import DEFAULT_ASPECT_RATIO, ImageProcessor, PlannedMedium
from ..processing.images_onevision import NextImageProcessor, OnevisionImageProcessor
from ..processing.images_qwen2 import Qwen2VLImageProcessor
from ..processing.opening import ImageSource
from ..processing.prompts import DEFAULT_TEMPLATE, TEMPLATES, Request, Tokenizer, build_prompt, encode_prompt, load_tokenizer
from ..processing.video import FpsSampling, FrameSampling, SampledVideo, UniformSampling, sample_video
from .checkpoint import load_model
from .specs import DTYPE_NAMES, MODELS, ModelSpec

# Safetensors only: a repository may hold the same weights as pickles too.
DOWNLOADED_FILES = ("*.json", "*.safetensors", "tokenizer.model")
DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


class WeightsUnavailable(RuntimeError):
    """The weights of a named model cannot be had; the message says what was tried, and on a second line what to do."""


class MediaProcessor(Protocol):
    """Turns pictures and frames into what a model's tower reads."""

    def plan_image(self, picture: ImageSource, alone: bool = True) -> PlannedMedium:
        """One picture; `alone`: it is the only one of its request, where a video may be too."""

    def plan_video(self, video: SampledVideo) -> PlannedMedium:
        """The sampled frames of one video; raises ValueError where the model takes none."""


@dataclass(frozen=True)
class Family:
    """How models of one kind are asked: the template in prompts.TEMPLATES, and which frames of a video they see."""

    template: str
    sampling: FrameSampling


FAMILIES: dict[type[VLMConfig], Family] = {
    LlavaConfig: Family(DEFAULT_TEMPLATE, UniformSampling()),
    LlavaNextConfig: Family(DEFAULT_TEMPLATE, UniformSampling()),
    LlavaOnevisionConfig: Family("qwen_1_5", UniformSampling()),
    Qwen2VLConfig: Family("qwen2_vl", FpsSampling()),
}


def media_processor(folder: Path, config: VLMConfig, image_aspect_ratio: str, max_pixels: int | None) -> MediaProcessor:
    """What makes pictures ready for a model of this family, with the settings of its folder."""
    match config:
        case Qwen2VLConfig():
            return Qwen2VLImageProcessor.from_folder(folder, config.vision_config, max_pixels)
        case LlavaOnevisionConfig():
            return OnevisionImageProcessor.from_folder(folder, config)
        case LlavaNextConfig():
            return NextImageProcessor.from_folder(folder, config)
        case LlavaConfig(vision_config=vision):
            return ImageProcessor.from_folder(folder, vision.image_size, image_aspect_ratio, vision.patch_size)
    raise TypeError(f"{type(config).__name__} has no image processor")


@dataclass(eq=False)
class VisionLanguageModel:
    """A model with everything between it and a request: tokenizer, image processor, chat template, frame sampling.

    `folder` is where its weights were read.
    """

    name: str
    model: VLM
    tokenizer: Tokenizer
    image_processor: MediaProcessor
    template: str
    sampling: FrameSampling
    folder: Path

    @property
    def config(self) -> VLMConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.language_model.embed_tokens.weight.dtype

    def prepare(self, requests: Sequence[Request]) -> PackedInputs:
        """Turn requests into one packed batch; all their pictures and videos go through the tower together.

        Every request gets a seed of its own contents, so that a method which draws at random draws the same for it in
        every batch. Raises ValueError for no request, a video where the model takes none, a prompt that does not fit into
        the model's context, or image tokens that do not match the pictures; and what open_image and read_frames raise.
        """
        if not requests:
            raise ValueError("no request given; pass at least one")
        prompts, media = zip(*map(self.tokens_and_media, requests), strict=True)
        seeds = tuple(content_seed(*contents) for contents in zip(prompts, media, strict=True))
        with torch.no_grad():  # not inference mode: the embeddings may be differentiated through later
            return self.model.pack(prompts, media, seeds)

    def token_ids(self, request: Request) -> list[int]:
        """The prompt that the model reads, each vision token repeated once a feature; raises ValueError as `prepare`."""
        return self.tokens_and_media(request)[0]

    def tokens_and_media(self, request: Request) -> tuple[list[int], list[VisionInput]]:
        """A request's token ids, and its pictures and video in the order of their tokens; raises as `prepare`."""
        # Tokens are counted before pixels are decoded: a prompt that does not fit costs nothing.
        planned = self.planned_media(request)
        prompt = build_prompt(request, self.template)
        token_ids, ordered = encode_prompt(self.tokenizer, prompt, planned)
        self.check_prompt(token_ids, sum(medium.num_tokens for medium in ordered))
        media = {token_id: [medium.read() for medium in given] for token_id, given in planned.items()}
        # Counted again: a damaged video may hold fewer frames than it announces.
        return encode_prompt(self.tokenizer, prompt, media)

    def planned_media(self, request: Request) -> dict[int, list[PlannedMedium]]:
        """A request's pictures and videos by the id of the token that stands for them, not decoded yet; raises as `prepare`."""
        alone = len(request.images) == 1
        media = {self.config.image_token_id: [self.image_processor.plan_image(image, alone) for image in request.images]}
        if request.video is not None:
            if self.config.video_token_id is None:
                raise ValueError(f"{self.name} takes pictures only, not a video; give its frames as images")
            media[self.config.video_token_id] = [self.image_processor.plan_video(sample_video(request.video, self.sampling))]
        return media

    def check_prompt(self, token_ids: Sequence[int], num_vision_tokens: int) -> None:
        """Raise ValueError for a prompt that is too long, that ends with a picture, or that has an unknown token."""
        text, length, vision_tokens = self.config.text_config, len(token_ids), set(self.config.vision_tokens.values())
        if length > text.max_position_embeddings:
            raise ValueError(
                f"the prompt has {length} tokens ({num_vision_tokens} of them from pictures and frames), but the context of "
                f"{self.name} holds {text.max_position_embeddings}; shorten the text, give fewer of them, or lower --frames or "
                "--max-pixels"
            )
        if token_ids[-1] in vision_tokens:
            raise ValueError("the prompt ends with a picture, whose last token could be dropped; end it with text")
        largest = max((token for token in token_ids if token not in vision_tokens), default=0)
        if largest >= text.vocab_size:
            raise ValueError(
                f"the tokenizer gives token {largest}, but {self.name} has embeddings for {text.vocab_size}; "
                "use the tokenizer files of this checkpoint"
            )


def content_seed(token_ids: Sequence[int], media: Sequence[VisionInput]) -> int:
    """A number that depends on a request's token ids and pixel values alone."""
    seed = zlib.crc32(np.asarray(token_ids, dtype="<i8").tobytes())
    for medium in media:
        seed = zlib.crc32(medium.pixel_values.numpy().tobytes(), seed)
    return seed


def load(
    name_or_folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    image_aspect_ratio: str = DEFAULT_ASPECT_RATIO,
    template: str | None = None,
    attention: str = "auto",
    weights: str | Path | None = None,
    max_pixels: int | None = None,
    sampling: FrameSampling | None = None,
    tensor_parallel: int = 1,
) -> VisionLanguageModel:
    """Load a model by its name in MODELS, or from a folder in the layout of the official checkpoints.

    Args:
        name_or_folder: a directory with a config.json is taken as a folder, everything else as a name.
        dtype: a floating torch.dtype, or its name.
        image_aspect_ratio: how LLaVA-1.5 makes a picture square: "pad" (as the papers do) or "crop" (as llava-hf does).
        template: name in prompts.TEMPLATES; None is the model's own.
        attention: back end, see attention.resolve_backend; model.language_model.attention names the one that runs.
        weights: for a named model, a local folder of its official checkpoint that is read instead of the Hub.
        max_pixels: the most that Qwen2-VL leaves of a picture or frame; None is the checkpoint's own bound.
        sampling: which frames of a video the model sees; None is what its family was released with.
        tensor_parallel: how many processes share the decoder, each with a part of its heads and of its MLP. All of them must
            call this, and then `generate` or `prefill` with the same requests; each gets the whole answer. They are those
            that torchrun started, on a GPU each where `device` is "cuda".

    Raises:
        ValueError: an unknown name or option, a back end that cannot run here, a checkpoint that is not exactly right.
        FileNotFoundError: a folder without config.json, weights or tokenizer.
        WeightsUnavailable: a named model that can be neither found nor downloaded.
    """
    mesh = None
    if tensor_parallel != 1:
        processes = join_processes(torch.device(device).type, tensor_parallel)
        mesh, device = tensor_mesh(torch.device(device).type, tensor_parallel), processes.device(str(device))
    device, dtype = as_device(device), as_dtype(dtype)
    attention = resolve_backend(attention, device, dtype)
    if template is not None and template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; choose one of: {', '.join(sorted(TEMPLATES))}")
    spec, folder = locate(name_or_folder, weights)
    config = VLMConfig.from_folder(folder)
    family = FAMILIES[type(config)]
    if max_pixels is not None and not isinstance(config, Qwen2VLConfig):
        raise ValueError(f"max_pixels {max_pixels} has no meaning for {spec.name}: only Qwen2-VL's pictures come in any size")
    if sampling is not None and config.video_token_id is None:
        raise ValueError(f"{spec.name} takes pictures only: no frames of a video can be chosen for it")
    # The weights come last: everything else fails in milliseconds.
    image_processor = media_processor(folder, config, image_aspect_ratio, max_pixels)
    tokenizer = load_tokenizer(folder, config.vision_tokens)
    model = load_model(folder, config, device=device, dtype=dtype, attention=attention, mesh=mesh)
    template = template or spec.template or family.template
    frames = sampling or (family.sampling if spec.frames is None else UniformSampling(spec.frames))
    return VisionLanguageModel(spec.name, model, tokenizer, image_processor, template, frames, folder.resolve())


def locate(name_or_folder: str | Path, weights: str | Path | None = None) -> tuple[ModelSpec, Path]:
    """Find what to load and its folder, downloading a named model that is not here; raises as `load`."""
    name, folder = str(name_or_folder), Path(name_or_folder).expanduser()
    is_folder = (folder / "config.json").is_file() or (name not in MODELS and folder.is_dir())
    if is_folder and weights is None:
        return ModelSpec(folder.resolve().name, "local folder"), folder
    if name not in MODELS:
        raise ValueError(
            f"unknown model {name!r}; choose one of: {', '.join(MODELS)}; or give the folder of a checkpoint"
            + ("" if weights is None else " without naming other weights")
        )
    spec = MODELS[name]
    return spec, download(spec) if weights is None else Path(weights).expanduser()


def download(spec: ModelSpec) -> Path:
    """The folder of a named model: weights/NAME where that is there, else the Hub's, in its cache.

    What is in the cache is not fetched again, so an interrupted download goes on with the file that it had come to. The
    Hub is the one that huggingface_hub is set to (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE).
    Raises WeightsUnavailable where neither has it.
    """
    if (spec.folder / "config.json").is_file():
        return spec.folder
    if spec.repository is None:
        raise WeightsUnavailable(
            f"{spec.name}: its weights come with the repository, but {spec.folder} is not there\n"
            "work in a clone of the repository (pip install -e .), or give a copy of the folder with --weights DIR"
        )
    import huggingface_hub  # here: it takes a second to import, and the shipped model never needs it

    try:
        return Path(huggingface_hub.snapshot_download(spec.repository, allow_patterns=list(DOWNLOADED_FILES)))
    except Exception as error:  # the library's HTTP client, and so its errors, changed from release to release
        reason = str(error).strip().partition("\n")[0]
        raise WeightsUnavailable(
            f"{spec.name}: cannot get {spec.repository} from {huggingface_hub.constants.ENDPOINT} "
            f"({type(error).__name__}: {reason})\n"
            "give a local copy with --weights DIR, or fetch it where there is a network: "
            f"hf download {spec.repository} --local-dir {os.path.relpath(spec.folder)}"
        ) from error


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype that models run in, from itself or its name; raises ValueError for another."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose one of: {', '.join(DTYPES)}")
    return DTYPES[name]


def as_device(device: str | torch.device) -> torch.device:
    """A device that is there; raises ValueError for another."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # torch raises RuntimeError for an unknown name or a missing driver, AssertionError where it was built without CUDA.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}; use cpu") from error
    return found
