"""nanoVLM restated plainly: its arithmetic in one function a step, and a tiny random checkpoint in its own layout."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

TILE, PATCH, SCALE = 32, 4, 2
EXTRA = {
    "image_token": "<|image|>",
    "global_image_token": "<|global_image|>",
    **{f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)},
}
CONFIG: dict[str, Any] = {
    "vit_hidden_dim": 32,
    "vit_inter_dim": 64,
    "vit_patch_size": PATCH,
    "vit_img_size": TILE,
    "vit_n_heads": 2,
    "vit_dropout": 0.0,
    "vit_n_blocks": 3,
    "vit_ln_eps": 1e-6,
    "vit_cls_flag": False,
    "vit_model_type": "google/siglip2-base-patch16-512",
    "lm_hidden_dim": 48,
    "lm_inter_dim": 96,
    "lm_rms_eps": 1e-5,
    "lm_re_base": 100000,
    "lm_max_position_embeddings": 8192,
    "lm_n_heads": 6,
    "lm_n_kv_heads": 2,
    "lm_dropout": 0.0,
    "lm_n_blocks": 6,
    "lm_attn_scaling": 1.0,
    "lm_max_length": 8192,
    "lm_use_tokens": False,
    "lm_tie_weights": True,
    "lm_model_type": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "lm_tokenizer": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "mp_pixel_shuffle_factor": SCALE,
    "vlm_load_backbone_weights": True,
    "vlm_checkpoint_path": "checkpoints",
}


def config(tokenizer: Tokenizer, tiled: bool = True, **changes: Any) -> dict[str, Any]:
    """A config.json; the first model's has no settings of tiles and no extra tokens."""
    base = tokenizer.get_vocab_size()
    tiles = {
        "lm_base_vocab_size": base,
        "extra_token_amount": len(EXTRA),
        "mp_image_token_length": (TILE // PATCH // SCALE) ** 2,
        "max_img_size": 4 * TILE,
        "resize_to_max_side_len": False,
        "vlm_extra_tokens": EXTRA,
    }
    return {**CONFIG, "lm_vocab_size": base + (len(EXTRA) if tiled else 0), **(tiles if tiled else {}), **changes}


def random_tensors(settings: dict[str, Any]) -> dict[str, Tensor]:
    """Weights under nanoVLM's names; of the two names of the tied embeddings, safetensors keeps the head's."""
    wide, inner = settings["vit_hidden_dim"], settings["vit_inter_dim"]
    text, text_inner = settings["lm_hidden_dim"], settings["lm_inter_dim"]
    keys = text // settings["lm_n_heads"] * settings["lm_n_kv_heads"]
    side = settings["vit_img_size"] // settings["vit_patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_embedding.conv.weight": (wide, 3, settings["vit_patch_size"], settings["vit_patch_size"]),
        "vision_encoder.patch_embedding.conv.bias": (wide,),
        "vision_encoder.patch_embedding.position_embedding": (1, side**2, wide),
        "vision_encoder.layer_norm.weight": (wide,),
        "vision_encoder.layer_norm.bias": (wide,),
        "MP.proj.weight": (text, wide * settings["mp_pixel_shuffle_factor"] ** 2),
        "decoder.norm.weight": (text,),
        "decoder.head.weight": (settings["lm_vocab_size"], text),
    }
    for block in range(settings["vit_n_blocks"]):
        attention = {"attn.qkv_proj": (3 * wide, wide), "attn.out_proj": (wide, wide)}
        others = {"mlp.fc1": (inner, wide), "mlp.fc2": (wide, inner), "ln1": (wide,), "ln2": (wide,)}
        for name, shape in {**attention, **others}.items():
            shapes[f"vision_encoder.blocks.{block}.{name}.weight"] = shape
            shapes[f"vision_encoder.blocks.{block}.{name}.bias"] = shape[:1]
    for block in range(settings["lm_n_blocks"]):
        linear = {"q_proj": (text, text), "k_proj": (keys, text), "v_proj": (keys, text), "out_proj": (text, text)}
        gated = {"gate_proj": (text_inner, text), "up_proj": (text_inner, text), "down_proj": (text, text_inner)}
        shapes |= {f"decoder.blocks.{block}.attn.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"decoder.blocks.{block}.mlp.{name}.weight": shape for name, shape in gated.items()}
        shapes |= {f"decoder.blocks.{block}.norm{number}.weight": (text,) for number in (1, 2)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: noise(name, shape, generator) for name, shape in shapes.items()}
    half = torch.arange(0, text // settings["lm_n_heads"], 2).float() / (text // settings["lm_n_heads"])
    return tensors | {"decoder.rotary_embd.inv_freq": 1.0 / settings["lm_re_base"] ** half}


def noise(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 and "position" not in name else 0.1
    scale *= 2 if "qkv_proj.weight" in name or name.endswith(("q_proj.weight", "k_proj.weight")) else 1
    centre = 1 if re.search(r"(norm\d?|ln\d|layer_norm)\.weight$", name) else 0
    return centre + scale * torch.randn(shape, generator=generator)


def write_nanovlm_folder(
    folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Tokenizer | None
) -> Path:
    """The two files of nanoVLM, and the tokenizer that another repository holds."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class Restated:
    """What nanoVLM computes, from its tensors."""

    def __init__(self, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.settings, self.tensors = settings, tensors

    def linear(self, name: str, values: Tensor) -> Tensor:
        return F.linear(values, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def layer_norm(self, name: str, values: Tensor) -> Tensor:
        return F.layer_norm(values, values.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], 1e-6)

    def rms_norm(self, name: str, values: Tensor) -> Tensor:
        return values * torch.rsqrt((values**2).mean(-1, keepdim=True) + 1e-5) * self.tensors[f"{name}.weight"]

    def features(self, pixels: Tensor) -> Tensor:
        """(tiles, 3, S, S) -> (tiles, n, D)"""
        begin = "vision_encoder.patch_embedding"
        conv = (self.tensors[f"{begin}.conv.weight"], self.tensors[f"{begin}.conv.bias"])
        hidden = F.conv2d(pixels, *conv, stride=self.settings["vit_patch_size"]).flatten(2).transpose(1, 2)
        hidden = hidden + self.tensors[f"{begin}.position_embedding"]
        for block in range(self.settings["vit_n_blocks"]):
            name = f"vision_encoder.blocks.{block}"
            q, k, v = self.linear(f"{name}.attn.qkv_proj", self.layer_norm(f"{name}.ln1", hidden)).chunk(3, -1)
            heads = (each.unflatten(-1, (self.settings["vit_n_heads"], -1)).transpose(1, 2) for each in (q, k, v))
            hidden = hidden + self.linear(f"{name}.attn.out_proj", attend(*heads, causal=False))
            inner = F.gelu(self.linear(f"{name}.mlp.fc1", self.layer_norm(f"{name}.ln2", hidden)), approximate="tanh")
            hidden = hidden + self.linear(f"{name}.mlp.fc2", inner)
        hidden, scale = self.layer_norm("vision_encoder.layer_norm", hidden), self.settings["mp_pixel_shuffle_factor"]
        side = math.isqrt(hidden.shape[1])
        cells = hidden.reshape(-1, side // scale, scale, side // scale, scale, hidden.shape[-1]).transpose(2, 3)
        return self.linear("MP.proj", cells.reshape(len(hidden), (side // scale) ** 2, -1))

    def logits(self, token_ids: list[int], features: Tensor, image_id: int, new: int = 0) -> Tensor:
        """(T, V) of a prompt with features (n, D) in the places of the image tokens, and `new` decoded tokens."""
        ids = torch.tensor(token_ids)
        table = self.tensors["decoder.head.weight"]
        hidden = table[ids.where(ids != image_id, 0)].clone()
        hidden[ids == image_id] = features
        cos, sin = self.rotary(len(ids) - new, new)
        for block in range(self.settings["lm_n_blocks"]):
            name = f"decoder.blocks.{block}"
            normed = self.rms_norm(f"{name}.norm1", hidden)
            q, k, v = (self.heads(self.linear(f"{name}.attn.{letter}_proj", normed)) for letter in "qkv")
            q, k = (each * cos + torch.cat([-each.chunk(2, -1)[1], each.chunk(2, -1)[0]], -1) * sin for each in (q, k))
            groups = self.settings["lm_n_heads"] // self.settings["lm_n_kv_heads"]
            k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
            hidden = hidden + self.linear(f"{name}.attn.out_proj", attend(q[None], k[None], v[None], causal=True)[0])
            normed = self.rms_norm(f"{name}.norm2", hidden)
            gate = F.silu(self.linear(f"{name}.mlp.gate_proj", normed)) * self.linear(f"{name}.mlp.up_proj", normed)
            hidden = hidden + self.linear(f"{name}.mlp.down_proj", gate)
        return F.linear(self.rms_norm("decoder.norm", hidden), table)

    def heads(self, values: Tensor) -> Tensor:
        """(T, heads * head_dim) -> (heads, T, head_dim)"""
        head_dim = self.settings["lm_hidden_dim"] // self.settings["lm_n_heads"]
        return values.unflatten(-1, (-1, head_dim)).transpose(0, 1)

    def rotary(self, prompt: int, new: int) -> tuple[Tensor, Tensor]:
        """Frequencies are divided where the sequence is longer than the original context; cached keys stay as they are."""
        lengths = torch.tensor([prompt] * prompt + [prompt + count + 1 for count in range(new)])
        scale = (lengths / self.settings["lm_max_position_embeddings"]).clamp(min=1.0)[:, None]
        angles = torch.arange(prompt + new).float()[:, None] * (self.tensors["decoder.rotary_embd.inv_freq"] / scale)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(N, heads, T, head_dim) -> (N, T, heads * head_dim)"""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def pixels(picture: Image.Image, max_side: int = 4 * TILE, to_max: bool = False) -> tuple[Tensor, tuple[int, int]]:
    """The tiles of a picture, the whole one first, and how many rows and columns there are."""
    width, height = picture.size
    long, short = max(width, height), min(width, height)
    target = max_side if to_max else min(max_side, math.ceil(long / TILE) * TILE)
    other = max(math.ceil(short * (target / long) / TILE) * TILE, TILE)
    size = (target, other) if width >= height else (other, target)
    values = torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BICUBIC))).permute(2, 0, 1).float() / 255
    rows, columns = size[1] // TILE, size[0] // TILE
    tiles = [
        values[:, row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        for row in range(rows)
        for column in range(columns)
    ]
    if len(tiles) == 1:
        return values[None], (rows, columns)
    whole = F.interpolate(values[None], (TILE, TILE), mode="bilinear", antialias=True)
    return torch.cat([whole, torch.stack(tiles)]), (rows, columns)


def image_string(grids: list[tuple[int, int]], length: int) -> str:
    """How nanoVLM writes the pictures of a message."""
    written = ""
    for index, (rows, columns) in enumerate(grids):
        written += f"<image: {index}>" if len(grids) > 1 else ""
        written += "<|global_image|>" + "<|image|>" * length
        if (rows, columns) != (1, 1):
            for row in range(rows):
                for column in range(columns):
                    written += f"<row_{row + 1}_col_{column + 1}>" + "<|image|>" * length
    return written
