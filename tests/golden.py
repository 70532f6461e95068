"""Results of the authors' dropping codes on tiny random models: tests/goldens/*.safetensors.

Weights and embeddings are not stored: they are drawn again from the seeds in each file's header and checked by sha256.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from nanovlm_v2drop.dropping import TokenDropper
from nanovlm_v2drop.inference import Prefilled, decode_one_token, prefill
from nanovlm_v2drop.models.config import TextConfig, flatten_rope, from_fields
from nanovlm_v2drop.models.decoder import Decoder
from nanovlm_v2drop.models.vlm import PackedInputs

FOLDER = Path(__file__).parent / "goldens"


@dataclass
class Golden:
    meta: dict
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, name: str) -> "Golden":
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            return cls(json.loads(file.metadata()["meta"]), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118

    def decoder(self) -> Decoder:
        """The model, with a strictly loaded state dict in official names."""
        weights = draw_weights(self.meta["weight_shapes"], self.meta["weights_seed"])
        assert fingerprint(weights) == self.meta["weights_sha256"]
        official = {"rope_theta": self.meta["rope_theta"], **self.meta["config"]}
        bias = any(name.endswith("q_proj.bias") for name in weights)
        decoder = Decoder(from_fields(TextConfig, {**flatten_rope(official), "qkv_bias": bias}))
        decoder.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()}, strict=True)
        return decoder.eval()

    def inputs_embeds(self, variant: str = "") -> Tensor:
        """(T, D), stored or drawn again."""
        if f"{variant}inputs_embeds" in self.tensors:
            return self.tensors[f"{variant}inputs_embeds"][0]
        generator = torch.Generator().manual_seed(self.meta["embeds_seed"])
        return torch.randn(self.meta["embeds_shape"], generator=generator)[0]

    def packed(self, inputs_embeds: Tensor) -> PackedInputs:
        length = len(inputs_embeds)
        start, count = self.tensors["vision_span"].tolist()
        rows = torch.arange(length)
        positions = self.tensors["position_ids"][:, 0] if "position_ids" in self.tensors else rows
        return PackedInputs(inputs_embeds, positions, (rows >= start) & (rows < start + count), [length])


def check_run(golden: Golden, decoder: Decoder, packed: PackedInputs, dropper: TokenDropper) -> Prefilled:
    """Check prefill and decoding against the authors' run: cache lengths, and logits of the prompt and all decoded tokens."""
    out = prefill(decoder, packed, dropper)
    assert [lengths[0] for lengths in out.cache.seqlens] == golden.tensors["kv_lengths"].tolist()
    wanted = golden.tensors["logits"]  # (1 + steps, B, V)
    wanted = wanted.reshape(len(wanted), -1, wanted.shape[-1])
    torch.testing.assert_close(out.logits, wanted[0], atol=2e-4, rtol=0)
    steps = golden.tensors["tokens"].reshape(len(wanted) - 1, -1)
    for tokens, logits in zip(steps, wanted[1:], strict=True):
        torch.testing.assert_close(decode_one_token(decoder, tokens, out.cache), logits, atol=2e-4, rtol=0)
    return out


def draw_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """Weights in sorted order of their names from one generator, scaled by the kind that the name tells."""
    generator = torch.Generator().manual_seed(seed)
    return {name: scaled(name, torch.randn(shape, generator=generator)) for name, shape in sorted(shapes.items())}


def scaled(name: str, noise: Tensor) -> Tensor:
    if "embed_tokens" in name:
        return noise
    if noise.dim() == 1:
        return 0.3 * noise if "bias" in name else 1 + 0.1 * noise
    gain = 1 / math.sqrt(noise.shape[1])
    gain *= 1.5 if "q_proj" in name or "k_proj" in name else 1.0
    gain *= 2.0 if "lm_head" in name else 1.0
    return noise * gain


def fingerprint(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
