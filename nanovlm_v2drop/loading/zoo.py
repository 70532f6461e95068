"""`load`: from a name, a folder or a model in memory to something that takes requests."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from ..models.attention import resolve_backend
from ..models.config import NanoVLMConfig, Qwen2VLConfig, VLMConfig
from ..models.kv_cache import KV_CACHE_DTYPES, check_kv_cache_dtype
from ..models.vlm import VLM, Encode, PackedInputs, VisionInput
from ..processing.images import DEFAULT_ASPECT_RATIO, PlannedMedium
from ..processing.prompts import Conversation, Given, Request, build_prompt, encode_prompt, named_template, write_media
from ..processing.tokenizer import Tokenizer, load_tokenizer
from ..processing.video import FrameSampling, sample_video
from .checkpoint import load_model, share_model
from .device import as_device, find_place
from .families import MediaProcessor, find_conversation, media_processor, released_sampling
from .files import check_folder, has_tokenizer, list_tensors
from .in_memory import HeldModel, held_name, held_weights, is_held_model, write_settings
from .precision import Precision, check_not_split, chosen_precision, named_precision
from .quantised import load_quantised, saved_precision
from .specs import AUTO, MODELS, OWN_TEMPLATE, ModelSpec, WeightsUnavailable, find_spec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Loaded = TypeVar("Loaded", bound=Any)  # a VisionLanguageModel or a TextModel


@dataclass(eq=False)
class VisionLanguageModel:
    """A model with everything between it and a request: tokenizer, image processor, conversation, frame sampling.

    `template` names the conversation: a name in prompts.TEMPLATES, or the file in which the checkpoint stores its own.
    `folder` is where its weights were read; None for a model in memory. `precision` says how its matrices are stored.
    """

    name: str
    model: VLM
    tokenizer: Tokenizer
    image_processor: MediaProcessor
    template: str
    conversation: Conversation
    sampling: FrameSampling
    folder: Path | None
    precision: Precision

    @property
    def config(self) -> VLMConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in."""
        return self.model.language_model.dtype

    def prepare(self, requests: Sequence[Request]) -> PackedInputs:
        """Turn requests into one packed batch; all their pictures and videos go through the tower together.

        Raises ValueError for no request, a video where the model takes none, a prompt that does not fit into the model's
        context, or image tokens that do not match the pictures; and what open_image and read_frames raise.
        """
        if not requests:
            raise ValueError("no request given; pass at least one")
        prompts, media = zip(*map(self.tokens_and_media, requests), strict=True)
        return self.pack(prompts, media)

    def pack(
        self, prompts: Sequence[Sequence[int]], media: Sequence[Sequence[VisionInput]], encode: Encode | None = None
    ) -> PackedInputs:
        """The packed batch of prompts as `tokens_and_media` gives them; `encode` stands in for the model's run of the tower.

        Every prompt gets a seed of its own contents, so that a method which draws at random draws the same for it in every
        batch.
        """
        seeds = tuple(content_seed(*contents) for contents in zip(prompts, media, strict=True))
        with torch.no_grad():  # not inference mode: the embeddings may be differentiated through later
            return self.model.pack(prompts, media, seeds, encode)

    def token_ids(self, request: Request) -> list[int]:
        """The prompt that the model reads, each vision token repeated once a feature; raises ValueError as `prepare`."""
        return self.tokens_and_media(request)[0]

    def prompt_length(self, request: Request) -> int:
        """The number of tokens of a prompt, by the headers of its pictures and videos; raises ValueError as `prepare`."""
        return len(self.encode(*self.planned(request))[0])

    def tokens_and_media(self, request: Request) -> tuple[list[int], list[VisionInput]]:
        """A request's token ids, and its pictures and videos in the order of their tokens; raises as `prepare`."""
        prompt, planned = self.planned(request)
        media = {mark: [medium.read() for medium in given] for mark, given in planned.items()}
        # Counted again: a damaged video may hold fewer frames than it announces.
        return self.encode(prompt, media)

    def planned(self, request: Request) -> tuple[str, dict[str, list[PlannedMedium]]]:
        """A request's prompt and its pictures and videos, not decoded yet: a prompt that does not fit costs nothing."""
        planned = self.planned_media(request)
        prompt = build_prompt(request, self.conversation, self.config.marks)
        token_ids, ordered = self.encode(prompt, planned)
        self.check_prompt(token_ids, sum(medium.num_tokens for medium in ordered))
        return prompt, planned

    def planned_media(self, request: Request) -> dict[str, list[PlannedMedium]]:
        """A request's pictures and videos by the mark for them in a prompt, not decoded yet; raises as `prepare`."""
        processor, (image_mark, *video_marks) = self.image_processor, self.config.marks
        alone = len(request.images) == 1
        media = {image_mark: [processor.plan_image(image, alone) for image in request.images]}
        if request.videos and not video_marks:
            raise ValueError(f"{self.name} takes pictures only, not a video; give its frames as images")
        for mark in video_marks:
            media[mark] = [processor.plan_video(sample_video(video, self.sampling)) for video in request.videos]
        return media

    def encode(self, prompt: str, media: Mapping[str, Sequence[Given]]) -> tuple[list[int], list[Given]]:
        """Token ids of a prompt, and its pictures and videos in the order of their tokens."""
        ordered = [(mark, medium) for mark, given in media.items() for medium in given]
        if any(medium.text for _, medium in ordered):
            prompt, ordered = write_media(prompt, media)
        by_token: dict[int, list[Given]] = {token: [] for token in self.config.marks.values()}
        for mark, medium in ordered:
            by_token[self.config.marks[mark]].append(medium)
        return encode_prompt(self.tokenizer, prompt, by_token)

    def check_prompt(self, token_ids: Sequence[int], num_vision_tokens: int) -> None:
        """Raise ValueError for a prompt that is too long, that ends with a picture, or that has an unknown token."""
        text, length, vision_tokens = self.config.text_config, len(token_ids), set(self.config.vision_tokens.values())
        if text.context_length is not None and length > text.context_length:
            raise ValueError(
                f"the prompt has {length} tokens ({num_vision_tokens} of them from pictures and frames), but the context of "
                f"{self.name} holds {text.context_length}; shorten the text, give fewer of them, or lower --frames or "
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


@dataclass(frozen=True)
class Options:
    """How a model is surrounded; see `load`."""

    image_aspect_ratio: str = DEFAULT_ASPECT_RATIO
    template: str | None = None
    max_pixels: int | None = None
    sampling: FrameSampling | None = None


def load(
    model: "str | Path | HeldModel",
    *,
    processor: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = AUTO,
    image_aspect_ratio: str = DEFAULT_ASPECT_RATIO,
    template: str | None = None,
    attention: str = "auto",
    weights: str | Path | None = None,
    max_pixels: int | None = None,
    sampling: FrameSampling | None = None,
    kv_cache_dtype: str = KV_CACHE_DTYPES[0],
    tensor_parallel: int = 1,
) -> VisionLanguageModel:
    """Load a model by name, from the Hub, from a folder, or around a transformers model that is in memory.

    Args:
        model: a name in MODELS or an id on the Hugging Face Hub (OWNER/NAME), which may end with @REVISION; a folder in the
            layout of the official checkpoints; or a transformers model, whose weights are shared and not copied.
        processor: of a transformers model, with its tokenizer and its image_processor.
        device: None is "cpu", or where a transformers model lies.
        dtype: a name in specs.DTYPE_NAMES, or a floating torch.dtype. "auto" chooses by processor and memory (see
            precision.chosen_precision), and keeps the dtype of a transformers model.
        image_aspect_ratio: how LLaVA-1.5 makes a picture square: "pad" (as the papers do) or "crop" (as llava-hf does).
        template: a name in prompts.TEMPLATES, or "checkpoint" for the chat template in the folder; None is the papers' where
            their decoder is this one, else the folder's.
        attention: back end, see attention.resolve_backend; model.language_model.attention names the one that runs.
        weights: for a named model, a local folder of its official checkpoint that is read instead of the Hub.
        max_pixels: the most that a Qwen-VL leaves of a picture or frame; None is the checkpoint's own bound.
        sampling: which frames of a video the model sees; None is what its family was released with.
        kv_cache_dtype: "auto" is what attention computes in; "int8" takes half of the memory of bfloat16.
        tensor_parallel: how many processes share the decoder, each with a part of its heads and of its MLP. All of them must
            call this, and then `generate` or `prefill` with the same requests; each gets the whole answer. They are those
            that torchrun started, on a GPU each where `device` is "cuda".

    Raises:
        ValueError: an unknown name or option, a back end that cannot run here, a checkpoint that is not exactly right.
        FileNotFoundError: a folder without config.json, weights or tokenizer.
        WeightsUnavailable: a model that can be neither found nor downloaded.
    """
    options = Options(image_aspect_ratio, template, max_pixels, sampling)
    check_kv_cache_dtype(kv_cache_dtype)
    if template not in (None, OWN_TEMPLATE):
        named_template(str(template))
    if isinstance(model, str | Path):
        if processor is not None:
            raise ValueError(f"a processor belongs to a model in memory; {str(model)!r} comes with its own files")
        vlm = read(model, weights, *find_place(device or "cpu", tensor_parallel), dtype, attention, options)
    else:
        if weights is not None or tensor_parallel != 1:
            raise ValueError("a model in memory has its own weights in one process; leave out weights and tensor_parallel")
        vlm = share(model, processor, device, dtype, attention, options)
    return with_cache_dtype(vlm, kv_cache_dtype)


def read(
    model: str | Path,
    weights: str | Path | None,
    place: torch.device,
    mesh: "DeviceMesh | None",
    dtype: str | torch.dtype,
    attention: str,
    options: Options,
) -> VisionLanguageModel:
    """A model from files; raises as `load`."""
    precision = None if dtype == AUTO else named_precision(dtype, place)  # before anything is downloaded
    spec, folder = locate(model, weights)
    config, surroundings = surround(spec, folder, options)
    saved = saved_precision(folder, precision, place)
    precision = saved or precision or chosen_precision(place, sum(prod(tensor.shape) for tensor in list_tensors(folder)))
    attention = resolve_backend(attention, place, precision.dtype)
    # The weights come last: everything else fails in milliseconds.
    if saved is not None:
        check_not_split(precision, mesh is not None)
        network = load_quantised(folder, config, precision, attention)
    else:
        network = load_model(folder, config, device=place, precision=precision, attention=attention, mesh=mesh)
    return VisionLanguageModel(model=network, folder=folder.resolve(), precision=precision, **surroundings)


def with_cache_dtype(loaded: Loaded, kv_cache_dtype: str) -> Loaded:
    """The model, whose caches will be in this dtype."""
    loaded.model.language_model.kv_cache_dtype = kv_cache_dtype
    loaded.precision = replace(loaded.precision, kv_cache_dtype=kv_cache_dtype)
    return loaded


def share(
    model: HeldModel,
    processor: Any,
    device: str | torch.device | None,
    dtype: str | torch.dtype,
    attention: str,
    options: Options,
) -> VisionLanguageModel:
    """A transformers model in memory, with its own weights; raises as `load`."""
    if not is_held_model(model):
        raise ValueError(f"a model is a name, a folder or a transformers model, not {type(model).__name__}")
    tensors, place, number_format = held_weights(model)
    if device is not None and as_device(device) != place:
        raise ValueError(f"the model in memory lies on {place}; move it with model.to({str(device)!r}) first")
    held = str(number_format).removeprefix("torch.")
    if dtype != AUTO and (asked := named_precision(dtype, place)).name != held:
        way = "load a checkpoint folder for that" if asked.is_quantised else f"convert it with model.to(torch.{asked}) first"
        raise ValueError(f"the model in memory is in torch.{held}, not in {asked}; {way}")
    attention = resolve_backend(attention, place, number_format)
    with TemporaryDirectory() as folder:
        write_settings(model, processor, Path(folder))
        spec = ModelSpec(held_name(model), "in memory")
        config, surroundings = surround(spec, Path(folder), options)
    precision = Precision(held, number_format)
    network = share_model(tensors, config, attention)
    return VisionLanguageModel(model=network, folder=None, precision=precision, **surroundings)


def surround(spec: ModelSpec, folder: Path, options: Options) -> tuple[VLMConfig, dict[str, Any]]:
    """Everything but the weights, from the small files of a folder: the config, and fields of VisionLanguageModel."""
    check_folder(folder)
    config = VLMConfig.from_folder(folder)
    if options.max_pixels is not None and not isinstance(config, Qwen2VLConfig):
        raise ValueError(
            f"max_pixels {options.max_pixels} has no meaning for {spec.name}: only Qwen-VL's pictures come in any size"
        )
    if options.sampling is not None and not config.takes_video:
        raise ValueError(f"{spec.name} takes pictures only: no frames of a video can be chosen for it")
    image_processor = media_processor(folder, config, options.image_aspect_ratio, options.max_pixels)
    tokenizer = load_tokenizer(tokenizer_folder(folder, config), config.added_tokens)
    template, conversation = find_conversation(folder, config, options.template or spec.template)
    return config, {
        "name": spec.name,
        "tokenizer": tokenizer,
        "image_processor": image_processor,
        "template": template,
        "conversation": conversation,
        "sampling": options.sampling or released_sampling(folder, config, spec.frames),
    }


def tokenizer_folder(folder: Path, config: VLMConfig) -> Path:
    """Where the tokenizer is: in the model's folder, or in the repository that nanoVLM's config names."""
    if not isinstance(config, NanoVLMConfig) or not config.tokenizer or has_tokenizer(folder):
        return folder
    if has_tokenizer(folder / config.tokenizer):
        return folder / config.tokenizer
    from .hub import download_tokenizer

    return download_tokenizer(config.tokenizer)


def locate(model: str | Path, weights: str | Path | None = None) -> tuple[ModelSpec, Path]:
    """Find what to load and its folder, downloading a model that is not here; raises as `load`."""
    folder = Path(model).expanduser()
    is_folder = (folder / "config.json").is_file() or (str(model) not in MODELS and folder.is_dir())
    if is_folder and weights is None:
        return ModelSpec(folder.resolve().name, "local folder"), folder
    if is_folder:
        raise ValueError(f"{folder} is a folder; choose one of: {', '.join(MODELS)}; or give the folder without other weights")
    spec = find_spec(str(model))
    return spec, find_folder(spec) if weights is None else Path(weights).expanduser()


def find_folder(spec: ModelSpec) -> Path:
    """The folder of a model: weights/NAME where that is there, else the Hub's; raises WeightsUnavailable where neither is."""
    if spec.has_local_copy:
        return spec.folder
    if spec.repository is None:
        raise WeightsUnavailable(
            f"{spec.name}: its weights come with the repository, but {spec.folder} is not there; "
            "work in a clone of the repository (pip install -e .), or give a copy of the folder with --weights DIR"
        )
    from .hub import download  # here: it takes a second to import, and the shipped models never need it

    return download(spec)
