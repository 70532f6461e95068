"""`load_decoder`: a text checkpoint as a decoder with its tokenizer, for prompts whose spans may be dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch

from ..models.attention import resolve_backend
from ..models.config import LanguageModelConfig
from ..models.decoder import Decoder
from ..models.kv_cache import KV_CACHE_DTYPES, check_kv_cache_dtype
from ..models.language_model import LanguageModel, TextPrompt
from ..models.vlm import PackedInputs
from ..processing.chat_template import read_chat_template
from ..processing.prompts import DEFAULT_TEMPLATE, TEMPLATES
from ..processing.tokenizer import Tokenizer, load_tokenizer
from .checkpoint import load_model
from .device import as_device
from .files import check_folder, list_tensors
from .precision import Precision, chosen_precision, named_precision
from .specs import AUTO, HUB_ID, MODELS, find_spec
from .zoo import content_seed, with_cache_dtype

MESSAGE = "\ue000"  # stands for the message while its surroundings are written


class Droppable(str):
    """A piece of a prompt that may be dropped; see `TextModel.prompt`."""

    __slots__ = ()


@dataclass(eq=False)
class TextModel:
    """A decoder alone with its tokenizer. `generate` and `stream` take it, with TextPrompts in place of requests.

    The tokenizer is read when it is first used, so a folder of weights alone loads too.
    """

    name: str
    model: LanguageModel
    precision: Precision
    folder: Path

    @property
    def decoder(self) -> Decoder:
        return self.model.language_model

    @property
    def config(self) -> LanguageModelConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises FileNotFoundError where the folder has none, and ValueError for a broken one."""
        return load_tokenizer(self.folder, None)

    def prompt(self, pieces: Sequence[str]) -> TextPrompt:
        """A prompt of texts, each encoded by itself; those that are `Droppable` may be dropped.

        The beginning-of-sequence token, where the checkpoint uses one, stands before the first piece only. Raises ValueError
        for a prompt that is empty or ends with a droppable piece.
        """
        token_ids: list[int] = []
        spans = []
        for piece in pieces:
            start = len(token_ids)
            token_ids += self.encode(piece, is_first=not token_ids)
            if isinstance(piece, Droppable) and len(token_ids) > start:
                spans.append((start, len(token_ids)))
        return TextPrompt(tuple(token_ids), tuple(spans))

    def encode(self, text: str, is_first: bool) -> list[int]:
        """Token ids of a text, without a beginning-of-sequence token unless it `is_first`."""
        ids = self.tokenizer.encode(text)
        return ids[1:] if ids[:1] == [self.tokenizer.bos_token_id] and not is_first else ids

    def chat(self, pieces: Sequence[str]) -> TextPrompt:
        """The prompt for a user's message of these pieces, in the checkpoint's own chat template.

        Raises ValueError where the folder has no template or one that does not write the message once.
        """
        template = read_chat_template(self.folder, TEMPLATES[DEFAULT_TEMPLATE])
        if template is None:
            raise ValueError(f"{self.folder} holds no chat template; write the whole prompt and use `prompt`")
        before, found, behind = template.render([{"role": "user", "content": MESSAGE}]).partition(MESSAGE)
        if not found or MESSAGE in behind:
            raise ValueError(f"{template.file}: the chat template does not write the user's message once")
        return self.prompt([before, *pieces, behind])

    def prepare(self, prompts: Sequence[TextPrompt]) -> PackedInputs:
        """Prompts as one packed batch, each with a seed of its own contents.

        Raises ValueError for no prompt, one that is longer than the context, or a token without embedding.
        """
        if not prompts:
            raise ValueError("no prompt given; pass at least one")
        for prompt in prompts:
            self.check(prompt)
        seeds = tuple(content_seed(prompt.token_ids, ()) for prompt in prompts)
        with torch.no_grad():
            return self.model.pack(prompts, seeds)

    def check(self, prompt: TextPrompt) -> None:
        """Raise ValueError as `prepare`."""
        text, length = self.config.text_config, len(prompt.token_ids)
        if text.context_length is not None and length > text.context_length:
            raise ValueError(
                f"the prompt has {length} tokens, but the context of {self.name} holds {text.context_length}; shorten it"
            )
        smallest, largest = min(prompt.token_ids), max(prompt.token_ids)
        if smallest < 0 or largest >= text.vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise ValueError(f"the prompt has token {wrong}, but {self.name} has embeddings for 0 to {text.vocab_size - 1}")


def load_decoder(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = AUTO,
    attention: str = "auto",
    kv_cache_dtype: str = KV_CACHE_DTYPES[0],
) -> TextModel:
    """Load a text checkpoint (LLaMA, Qwen2 or Qwen3) as a decoder, with its tokenizer.

    Args:
        model: a folder in the layout of the official checkpoints, or an id on the Hugging Face Hub (OWNER/NAME), which may
            end with @REVISION.
        device: None is "cpu".
        dtype: a name in specs.DTYPE_NAMES, or a floating torch.dtype. "auto" chooses by processor and memory, as in `load`.
        attention: back end, see attention.resolve_backend.
        kv_cache_dtype: as in `load`.

    Raises:
        ValueError: a vision-language model, an unknown name or option, a checkpoint that is not exactly right.
        FileNotFoundError: a folder without config.json or weights.
        WeightsUnavailable: a model that can be neither found nor downloaded.
    """
    if not isinstance(model, str | Path):
        raise ValueError(f"a text model is a folder or an id on the Hub, not {model!r}")
    check_kv_cache_dtype(kv_cache_dtype)
    place = as_device(device or "cpu")
    precision = None if dtype == AUTO else named_precision(dtype, place)  # before anything is downloaded
    name, folder = locate_decoder(model)
    check_folder(folder)
    config = LanguageModelConfig.from_folder(folder)
    precision = precision or chosen_precision(place, sum(prod(tensor.shape) for tensor in list_tensors(folder)))
    attention = resolve_backend(attention, place, precision.dtype)
    network = load_model(folder, config, device=place, precision=precision, attention=attention)
    return with_cache_dtype(TextModel(name, network, precision, folder.resolve()), kv_cache_dtype)


def locate_decoder(model: str | Path) -> tuple[str, Path]:
    """The name and folder of a text checkpoint, downloaded where it is not here; raises as `load_decoder`."""
    folder, repository = Path(model).expanduser(), str(model).partition("@")[0]
    if folder.is_dir() and str(model) not in MODELS:
        return folder.resolve().name, folder
    if repository in MODELS or any(repository == spec.repository for spec in MODELS.values()):
        raise ValueError(f"{model} is a vision-language model, not a decoder alone: load(...) reads it")
    if not HUB_ID.fullmatch(repository):
        raise ValueError(
            f"no folder and no model {str(model)!r}: give the folder of a text checkpoint, or an id of the Hugging Face Hub as "
            "OWNER/NAME"
        )
    spec = find_spec(str(model))
    from .hub import download  # here: it takes a second to import

    return spec.name, download(spec, LanguageModelConfig.from_folder)
