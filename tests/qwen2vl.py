"""A tiny random Qwen2-VL, made by transformers and laid out as the hub lays out its checkpoints; what transformers makes of it.

Shapes: T tokens of one prompt, D hidden_size of the decoder, V vocabulary.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import with_prefixes
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from nanovlm_v2drop.demo.data import qwen2_tokenizer
from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.models.vision_qwen2 import Grid
from nanovlm_v2drop.processing.prompts import TEMPLATES, Request

# In the order of their ids, which come last.
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
}
ROPE_THETA, MROPE_SECTION = 1e6, [2, 3, 3]
TOWER = {"depth": 3, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2}
PATCH_SIZE, MERGE_SIZE = 14, 2


def qwen2vl_tokenizer() -> Tokenizer:
    """A tokenizer in the form of Qwen2-VL's tokenizer.json, trained on its template."""
    lines = [TEMPLATES["qwen2_vl"]("What colour is the digit? yes no")] * 4
    raw = json.loads(qwen2_tokenizer(lines).to_str())
    tokenizer = Tokenizer.from_str(json.dumps({**raw, "added_tokens": []}))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    return tokenizer


def qwen2vl_reference(tokenizer: Tokenizer, tie_word_embeddings: bool = False) -> Any:
    """transformers' Qwen2-VL: 6 layers with grouped queries, 3 blocks in the tower, weights so large that each matters."""
    return reference("Qwen2VL", {**TOWER, "hidden_size": TEXT["hidden_size"]}, tokenizer, tie_word_embeddings)


def reference(
    family: str, vision_config: dict[str, Any], tokenizer: Tokenizer, tie_word_embeddings: bool, **text: Any
) -> Any:
    """transformers' model of a family with this tower and these settings of the decoder, with random weights."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": MROPE_SECTION}
    vocab_size = -(-tokenizer.get_vocab_size() // 64) * 64
    config = getattr(transformers, f"{family}Config")(
        text_config={
            **TEXT,
            "vocab_size": vocab_size,
            "rope_parameters": rope,
            "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
            "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
            **text,
        },
        vision_config=vision_config,
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
        tie_word_embeddings=tie_word_embeddings,
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.copy_(drawn(name, torch.randn(parameter.shape, generator=generator)))
    return model


def drawn(name: str, noise: Tensor) -> Tensor:
    if noise.dim() == 1:
        return 0.3 * noise if name.endswith("bias") else 1 + 0.1 * noise
    return 1.5 * noise * noise[0].numel() ** -0.5


def hub_tensors(official: Any) -> dict[str, Tensor]:
    """The hub's names for transformers 5's parameters, written down apart from the loader's table; a tied head is left out."""
    prefixes = {"model.language_model.": "model.", "model.visual.": "visual.", "lm_head.": "lm_head."}
    renamed = {name: tensor.contiguous() for name, tensor in with_prefixes(official.state_dict(), prefixes).items()}
    if official.config.tie_word_embeddings:
        del renamed["lm_head.weight"]
    return renamed


def hub_config(official: Any) -> dict[str, Any]:
    """Qwen's own config.json: flat, with other names for the tower's fields or without them."""
    text, config = official.config.text_config, official.config
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **TEXT,
        "vocab_size": text.vocab_size,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        **{name: getattr(config, name) for name in tokens},
        "hidden_act": "silu",
        "max_window_layers": TEXT["num_hidden_layers"],
        "rope_theta": ROPE_THETA,
        "rope_scaling": {"type": "mrope", "mrope_section": MROPE_SECTION},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
        "vision_config": {
            **TOWER,
            "hidden_size": TEXT["hidden_size"],
            "in_chans": 3,
            "model_type": "qwen2_vl",
            "spatial_patch_size": PATCH_SIZE,
        },
    }


def write_qwen2vl_folder(
    folder: Path, official: Any, tokenizer: Tokenizer, config: dict[str, Any] | None = None
) -> Path:
    """A checkpoint in the layout of Qwen's repositories, float32. `config` is its config.json, by default Qwen2-VL's."""
    picture = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "merge_size": MERGE_SIZE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    files = {"config.json": config or hub_config(official), "preprocessor_config.json": picture}
    return write_folder(folder, files, hub_tensors(official), tokenizer)


def write_folder(
    folder: Path, settings: dict[str, dict[str, Any]], tensors: dict[str, Tensor], tokenizer: Tokenizer
) -> Path:
    """A folder with these settings by file, these weights and the files that all families have."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    files: dict[str, dict[str, Any]] = {
        **settings,
        "generation_config.json": {"eos_token_id": ends, "pad_token_id": ends[1], "do_sample": True, "temperature": 0.01},
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng((seed, width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(num_frames: int, width: int, height: int) -> list[Image.Image]:
    return [picture(width, height, seed=100 + index) for index in range(num_frames)]


def official_inputs(vlm: VisionLanguageModel, request: Request) -> dict[str, Tensor]:
    """The arguments of transformers' forward, with our token ids and patches of the request."""
    token_ids, media = vlm.tokens_and_media(request)
    kinds = {vlm.config.image_token_id: 1, vlm.config.video_token_id: 2}
    inputs = {
        "input_ids": torch.tensor([token_ids]),
        "mm_token_type_ids": torch.tensor([[kinds.get(token, 0) for token in token_ids]]),
    }
    for is_video, pixels, grids in ((False, "pixel_values", "image_grid_thw"), (True, "pixel_values_videos", "video_grid_thw")):
        if chosen := [medium for medium in media if medium.is_video == is_video]:
            inputs[pixels] = torch.cat([medium.pixel_values for medium in chosen])
            merged = torch.tensor([grid for medium in chosen for grid in medium.grids])
            inputs[grids] = merged * torch.tensor([1, MERGE_SIZE, MERGE_SIZE])
    return inputs


def official_embeds(official: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(T, D) the input of transformers' decoder: embedded text, and vision features at the places of their tokens."""
    seen: list[Tensor] = []
    decoder = official.model.language_model
    hook = decoder.register_forward_pre_hook(lambda *call: seen.append(call[2]["inputs_embeds"][0]), with_kwargs=True)
    official(**inputs)
    hook.remove()
    return seen[0]


def official_greedy(
    official: Any, inputs_embeds: Tensor, position_ids: Tensor, count: int, deepstack: tuple[Tensor, Any] | None = None
) -> tuple[list[int], Tensor]:
    """`count` greedy token ids and their logits (count, V), by full forwards of transformers' decoder without any cache.

    inputs_embeds (T, D), position_ids (3, T): a new token stands behind the largest position, on all three axes.
    `deepstack`: the mask (T,) of the vision tokens, and what Qwen3-VL's tower adds to them, as transformers takes it.
    """
    token_ids: list[int] = []
    logits = []
    for step in range(count):
        added = {}
        if deepstack is not None:
            mask = torch.cat([deepstack[0], torch.zeros(step, dtype=torch.bool)])
            added = {"visual_pos_masks": mask[None], "deepstack_visual_embeds": deepstack[1]}
        sizes = {"inputs_embeds": inputs_embeds[None], "position_ids": position_ids[:, None]}
        hidden = official.model.language_model(**sizes, **added)
        logits.append(official.lm_head(hidden.last_hidden_state[0, -1]))
        token_ids.append(int(logits[-1].argmax()))
        inputs_embeds = torch.cat([inputs_embeds, official.get_input_embeddings()(torch.tensor(token_ids[-1:]))])
        position_ids = torch.cat([position_ids, (position_ids.max() + 1).expand(3, 1)], dim=1)
    return token_ids, torch.stack(logits)


def positions_by_the_rule(
    token_ids: Sequence[int], grids: Sequence[Grid], vision_tokens: Collection[int], steps: Sequence[float] = ()
) -> Tensor:
    """(3, T), token by token: the rule of transformers up to 4.57, in its slowest form.

    Text takes the next free number on all axes; a grid counts each axis from there; the next free number is one more than
    the largest that was given on any axis. The frames of a grid are its `steps` apart, by default 1.
    """
    places: list[tuple[int, int, int]] = []
    waiting = zip(grids, steps or [1] * len(grids), strict=True)
    while len(places) < len(token_ids):
        free = max((max(place) for place in places), default=-1) + 1
        if token_ids[len(places)] not in vision_tokens:
            places.append((free, free, free))
            continue
        (frames, rows, columns), step = next(waiting)
        for frame in range(frames):
            time = free + int(np.float32(frame) * np.float32(step))
            for row in range(rows):
                places += [(time, free + row, free + column) for column in range(columns)]
    return torch.tensor(places).T


def official_dropping(
    official: Any,
    inputs_embeds: Tensor,
    position_ids: Tensor,
    is_vision: Tensor,
    ratios: dict[int, float],
    deepstack: Sequence[Tensor] = (),
    with_deepstack: bool = False,
) -> tuple[Tensor, dict[int, list[int]]]:
    """V2Drop on transformers' own layers, following the paper: logits (V) of the last row, and the rows left at each layer.

    Rows behind the last vision token may be decoded ones: no row that is dropped or kept depends on what follows it.
    `deepstack`: what Qwen3-VL's tower adds to the rows (T, D) behind each of the first layers. It counts as variation only
    `with_deepstack`.
    """
    decoder = official.model.language_model
    rows = torch.arange(len(inputs_embeds))
    hidden_states, before, left = inputs_embeds, inputs_embeds, {}
    changed = hidden_states
    for layer_idx, layer in enumerate(decoder.layers):
        if layer_idx in ratios:
            vision = [index for index, row in enumerate(rows) if is_vision[row]]
            variation = [(changed[index] - before[index]).norm().item() for index in vision]
            kept = sorted(range(len(vision)), key=variation.__getitem__)[len(vision) - int(len(vision) * ratios[layer_idx]) :]
            alive = torch.tensor([index for index in range(len(rows)) if index not in vision or vision.index(index) in kept])
            rows, hidden_states, position_ids = rows[alive], hidden_states[alive], position_ids[:, alive]
            left[layer_idx] = rows.tolist()
        length = len(rows)
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        rotary = decoder.rotary_emb(hidden_states[None], position_ids[:, None])
        before = hidden_states
        changed = hidden_states = layer(hidden_states[None], attention_mask=mask, position_embeddings=rotary)[0]
        if layer_idx < len(deepstack):
            hidden_states = hidden_states + deepstack[layer_idx][rows]
            changed = hidden_states if with_deepstack else changed
    return official.lm_head(decoder.norm(hidden_states[-1])), left
