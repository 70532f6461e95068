"""nanoVLM: SigLIP, pixel shuffle, one projection and SmolLM2, as SmolVLM, but with a flat config.json of its own names."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Annotated, Any, ClassVar

from .rope import LengthScaling
from .settings import (
    FLAG,
    Flag,
    Kind,
    ListOf,
    MapOf,
    OneOf,
    Real,
    Text,
    Whole,
    checked,
    from_fields,
    kinds_of,
    or_null,
    require,
)
from .smolvlm import SCALE_FACTOR, SmolVLMConfig
from .text import TextConfig
from .vision import SiglipVisionConfig

# Our field -> nanoVLM's setting. Its files hold all of them.
VISION_NAMES = {
    "hidden_size": "vit_hidden_dim",
    "intermediate_size": "vit_inter_dim",
    "num_hidden_layers": "vit_n_blocks",
    "num_attention_heads": "vit_n_heads",
    "image_size": "vit_img_size",
    "patch_size": "vit_patch_size",
    "layer_norm_eps": "vit_ln_eps",
}
TEXT_NAMES = {
    "vocab_size": "lm_vocab_size",
    "hidden_size": "lm_hidden_dim",
    "intermediate_size": "lm_inter_dim",
    "num_hidden_layers": "lm_n_blocks",
    "num_attention_heads": "lm_n_heads",
    "num_key_value_heads": "lm_n_kv_heads",
    "max_position_embeddings": "lm_max_position_embeddings",
    "rms_norm_eps": "lm_rms_eps",
    "rope_theta": "lm_re_base",
}
SIZES = {
    **{name: kinds_of(SiglipVisionConfig)[ours] for ours, name in VISION_NAMES.items()},
    **{name: kinds_of(TextConfig)[ours] for ours, name in TEXT_NAMES.items()},
    "mp_pixel_shuffle_factor": SCALE_FACTOR,
    "lm_tie_weights": FLAG,
}
REPOSITORY = Text(r"(\w[\w.-]*(/\w[\w.-]*)?)?", "the name of a repository")
MAX_SIDE = Whole(1, 2**14)
SETTINGS: dict[str, Kind] = {
    **SIZES,
    "vit_cls_flag": OneOf(False),
    "lm_attn_scaling": Real(1, 1),
    "lm_use_tokens": OneOf(False),
    "lm_tokenizer": REPOSITORY,
    "lm_base_vocab_size": Whole(1, 2**24),
    "mp_image_token_length": Whole(1, 2**20),
    "max_img_size": MAX_SIDE,
    "resize_to_max_side_len": FLAG,
    "vlm_extra_tokens": MapOf(Text(r".{1,64}", "a token of at most 64 characters")),
}
IMAGE, GLOBAL = "<|image|>", "<|global_image|>"
EXTRA_TOKENS = ListOf(Text(r".{1,64}"), 0, 4096)


@dataclass(frozen=True)
class NanoVLMConfig(SmolVLMConfig):
    """nanoVLM 222M (one picture of one tile), 230M-8k and 450M (tiles).

    `extra_tokens`: the tokens that are added behind those of the tokenizer, in order; the models of one tile have none, and
    the id of their image token lies outside the vocabulary. `max_side`: pixels of the longest side behind the resize, or None
    for a model of one tile. `resize_to_max_side`: whether smaller pictures grow to it. `tokenizer`: the repository that holds
    the tokenizer.
    """

    model_types: ClassVar[tuple[str, ...]] = ("nanovlm",)
    vision_token_names: ClassVar[tuple[str, ...]] = (IMAGE, "<video>")
    extra_tokens: Annotated[tuple[str, ...], EXTRA_TOKENS] = ()
    max_side: Annotated[int | None, or_null(MAX_SIDE)] = None
    resize_to_max_side: Flag = False
    tokenizer: Annotated[str, REPOSITORY] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_side is None:
            return
        side, most = self.vision_config.image_size, isqrt(sum(token.startswith("<row_") for token in self.extra_tokens))
        if self.max_side % side or not side <= self.max_side <= most * side:
            raise ValueError(
                f"max_img_size {self.max_side} must be a multiple of vit_img_size {side}, at most {most * side}: "
                f"vlm_extra_tokens names {most} rows of tiles"
            )
        if self.extra_tokens[:1] != (IMAGE,) or GLOBAL not in self.extra_tokens:
            raise ValueError(f"vlm_extra_tokens must begin with {IMAGE} and hold {GLOBAL}, got {self.extra_tokens[:3]}")

    @property
    def added_tokens(self) -> dict[str, int]:
        """Name and id of each token that the tokenizer's own file does not have."""
        names = self.extra_tokens or (IMAGE,)
        return {name: self.image_token_id + number for number, name in enumerate(names)}

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "NanoVLMConfig":
        """From the parsed config.json; raises ValueError where it lacks a size, since nanoVLM writes all of them."""
        given = checked(raw, SETTINGS)
        if missing := [name for name in SIZES if name not in given]:
            raise ValueError(f"nanoVLM's config.json lacks {', '.join(missing)}; is it complete?")
        text = {ours: given[name] for ours, name in TEXT_NAMES.items()}
        scaling = LengthScaling(beyond=given["lm_max_position_embeddings"])
        vision = {ours: given[name] for ours, name in VISION_NAMES.items()}
        tokens = tuple(given.get("vlm_extra_tokens", {}).values())
        config = cls(
            text_config=from_fields(
                TextConfig, {**text, "tie_word_embeddings": given["lm_tie_weights"], "rotary_scaling": scaling}
            ),
            image_token_id=given.get("lm_base_vocab_size", given["lm_vocab_size"] - len(tokens)),
            eos_token_ids=(2,) if tokens else (0,),  # <|im_end|> of the chat, <|endoftext|> of the plain text
            vision_config=from_fields(SiglipVisionConfig, vision),
            scale_factor=given["mp_pixel_shuffle_factor"],
            extra_tokens=tokens,
            max_side=given.get("max_img_size") if tokens else None,
            resize_to_max_side=given.get("resize_to_max_side_len", False),
            tokenizer=given.get("lm_tokenizer", ""),
        )
        require("mp_image_token_length", given.get("mp_image_token_length", config.token_grid**2), OneOf(config.token_grid**2))
        return config
