"""Tiny random text checkpoints, made by transformers and laid out as the official ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from smolvlm import smollm2_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 1e5, "tie_word_embeddings": True},
    "qwen2": {"rope_theta": 1e6, "tie_word_embeddings": False},
    "qwen3": {"rope_theta": 1e6, "tie_word_embeddings": False, "head_dim": 16},
}
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def text_reference(model_type: str, **changes: Any) -> Any:
    """transformers' model with weights so large that every layer matters."""
    transformers = pytest.importorskip("transformers")
    settings = {"vocab_size": len_of_vocabulary(), **SIZES, **OWN[model_type], "bos_token_id": 1, "eos_token_id": 2, **changes}
    config = getattr(transformers, f"{CLASSES[model_type]}Config")(**settings)
    model = getattr(transformers, f"{CLASSES[model_type]}ForCausalLM")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    return model


def len_of_vocabulary() -> int:
    return -(-smollm2_tokenizer(()).get_vocab_size() // 64) * 64


def write_text_folder(folder: Path, reference: Any) -> Path:
    """The checkpoint of a reference: settings as transformers writes them, weights, tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(reference.config.to_json_string(use_diff=False))
    tied = reference.config.tie_word_embeddings
    tensors = {name: tensor.contiguous() for name, tensor in reference.state_dict().items() if not (tied and "lm_head" in name)}
    save_file(tensors, folder / "model.safetensors")
    smollm2_tokenizer(()).save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
