"""A GGUF file of noise with the layer shapes of one of our decoders: llama.cpp's speed is measured without a download.

Source of the names and keys: PyPI's gguf, constants.py. Values are repeated inside a matrix, because quantising is slow and
the speed does not depend on them. The answers of the model mean nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..models.config import TextConfig

FILE_TYPES = {"Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}  # by the name of a quantisation
REPEATED_ROWS = 64  # of a matrix
SPECIALS = ("<unk>", "<s>", "</s>")
EMBEDDINGS = "token_embd.weight"
# Kinds of tokens in a GGUF file.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def write_gguf(file: Path, config: TextConfig, quantisation: str) -> int:
    """Write a decoder with the matrices in a quantisation of FILE_TYPES. Returns the bytes of weights that one token reads."""
    import gguf

    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    writer = gguf.GGUFWriter(file, kind)
    write_settings(writer, config)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[quantisation]])
    write_vocabulary(writer, config.vocab_size)
    number_format, read_bytes = gguf.GGMLQuantizationType[quantisation], 0
    for name, shape in tensor_shapes(config):
        if len(shape) == 1:
            tensor = np.ones(shape, np.float32)
            writer.add_tensor(name, tensor)
        else:
            tensor = noise(shape, number_format)
            writer.add_tensor(name, tensor, raw_dtype=number_format)
        read_bytes += tensor.nbytes * (name != EMBEDDINGS or config.tie_word_embeddings)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_bytes


def noise(shape: tuple[int, ...], number_format: Any) -> np.ndarray:
    """Random values of a size that keeps activations near one, quantised: (N, bytes of a row)."""
    from gguf import quants

    rows = np.random.default_rng(0).standard_normal((min(shape[0], REPEATED_ROWS), shape[1]), np.float32)
    quantised = quants.quantize(rows * shape[1] ** -0.5, number_format)
    return np.resize(quantised, (shape[0], quantised.shape[1]))


def tensor_shapes(config: TextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a decoder under llama.cpp's names, as (out_features, in_features)."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    projections = {"attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width)}
    others = {"attn_output": (width, queries), "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    yield EMBEDDINGS, (config.vocab_size, width)
    yield "output_norm.weight", (width,)
    if not config.tie_word_embeddings:
        yield "output.weight", (config.vocab_size, width)
    for layer in range(config.num_hidden_layers):
        matrices = [(f"blk.{layer}.{name}.weight", shape) for name, shape in {**projections, **others}.items()]
        yield from [*matrices, *((f"blk.{layer}.{name}.weight", (width,)) for name in ("attn_norm", "ffn_norm"))]
        if config.qkv_bias:
            yield from ((f"blk.{layer}.{name}.bias", projections[name][:1]) for name in projections)
        if config.qk_norm:
            yield from ((f"blk.{layer}.{name}.weight", (config.head_dim,)) for name in ("attn_q_norm", "attn_k_norm"))


def write_settings(writer: Any, config: TextConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)


def write_vocabulary(writer: Any, size: int) -> None:
    """Three special tokens, the 256 bytes, and invented words: llama.cpp loads no model without a vocabulary."""
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    words = [f"word{number}" for number in range(len(pieces), size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*pieces, *words][:size])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([*kinds, *[NORMAL] * len(words)][:size])
    for number, add in enumerate((writer.add_unk_token_id, writer.add_bos_token_id, writer.add_eos_token_id)):
        add(number)
