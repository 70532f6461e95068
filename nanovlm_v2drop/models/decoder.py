"""The LLaMA / Qwen2 / Qwen3 decoder on packed tokens.

Shapes: T tokens of all sequences packed, D hidden_size, H query heads, K key/value heads.

A layer does not compute attention, write a cache or know the number of sequences. It passes its queries, keys and values to
`attend`, which prefill, decoding and training each supply. This is the only place where they differ.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import joined
from .config import TextConfig
from .linear import PrepackedLinear, QuantisedLinear, RowByRow, Values, added, added_and_product, products
from .linear_int4 import Int4Linear
from .linear_widened import WidenedLinear
from .parallel import TensorParallel
from .rotary import rotary_frequencies

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (T, H, head_dim), k and v (T, K, head_dim) -> (T, H, head_dim)
CPU_ROWS = 320  # of an MLP at once
CPU_VALUES = 2**18  # of a norm at once
Rotary = tuple[Tensor, Tensor]  # cos and sin, (T, 1, head_dim) each
Part = TypeVar("Part")


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 at least like the official one; bfloat16 would change the logits.

    The result has the dtype of the weight: the sums that it reads can be wider (see `Decoder.widened`).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        # On a CPU, the float32 copies of some rows stay in its cache.
        at_once = torch.compiler.is_compiling() or hidden_states.device.type != "cpu" or hidden_states.numel() <= CPU_VALUES
        if at_once:
            return self.some_rows(hidden_states)
        return joined([self.some_rows(rows) for rows in hidden_states.split(max(1, CPU_VALUES // hidden_states[0].numel()))])

    def some_rows(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        return self.weight * F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(self.weight.dtype)

    def precise(self, hidden_states: Tensor) -> Tensor:
        """Without the rounding to the dtype of the weight."""
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight.to(hidden_states.dtype), self.eps)

    def row_by_row(self, hidden_states: Tensor) -> RowByRow:
        """The norm of hidden_states (T, D), for `products`."""
        return RowByRow(self, self.precise, (hidden_states,))


def rotary_table(config: TextConfig, position_ids: Tensor, dtype: torch.dtype, lengths: Tensor | None = None) -> Rotary:
    """Cosines and sines for positions (T,), or (3, T) for Qwen2-VL's multimodal rotary embedding.

    `lengths` (T,), or () where it is one for all rows: one more than the largest position of the sequence that a row belongs
    to. Only `config.rope_follows_length` reads it.

    Computed in float32 from the positions themselves: kept tokens keep their original ids, however large.
    """
    frequencies = rotary_frequencies(config, position_ids.device, lengths)  # (half,) or (T, half)
    angles = position_ids[..., None].float() * frequencies  # (T, half) or (3, T, half)
    if config.mrope_section is not None and angles.dim() == 3:  # (T, half) is text only: all three axes agree
        angles = by_turns(angles, config.mrope_section) if config.mrope_interleaved else by_blocks(angles, config.mrope_section)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(-2)  # (T, 1, head_dim)
    factor = 1.0 if config.rotary_scaling is None else config.rotary_scaling.attention_scaling
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def by_blocks(angles: Tensor, mrope_section: tuple[int, ...]) -> Tensor:
    """Take each block of frequencies from its own axis (time, height, width): (3, T, half) -> (T, half)."""
    sections = angles.split(mrope_section, dim=-1)
    return torch.cat([section[axis % 3] for axis, section in enumerate(sections)], dim=-1)


def by_turns(angles: Tensor, mrope_section: tuple[int, ...]) -> Tensor:
    """Take the frequencies from time, height, width, time, ...: (3, T, half) -> (T, half).

    Height and width have as many as their sections say. All further frequencies are those of the time.
    """
    mixed = angles[0].clone()
    for axis in (1, 2):
        turns = slice(axis, 3 * mrope_section[axis], 3)
        mixed[:, turns] = angles[axis, :, turns]
    return mixed


def apply_rotary(heads: Tensor, rotary: Rotary) -> Tensor:
    """Rotate (T, heads, head_dim) in the half-split layout of the official checkpoints."""
    cos, sin = rotary
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


class SelfAttention(nn.Module):
    """The projections before and after attention. Attention itself is passed in: see `Attend`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def query_key_value(self, hidden_states: Values, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """(T, H, head_dim), and twice (T, K, head_dim); the first two rotated"""
        q, k, v = map(self.heads, products(hidden_states, self.q_proj, self.k_proj, self.v_proj))
        return apply_rotary(self.q_norm(q), rotary), apply_rotary(self.k_norm(k), rotary), v

    def query(self, hidden_states: Values, rotary: Rotary) -> Tensor:
        """(T, H, head_dim), rotated"""
        return apply_rotary(self.q_norm(self.heads(*products(hidden_states, self.q_proj))), rotary)

    def key(self, hidden_states: Values, rotary: Rotary) -> Tensor:
        """(T, K, head_dim), rotated"""
        return apply_rotary(self.k_norm(self.heads(*products(hidden_states, self.k_proj))), rotary)

    def heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))


class GatedMLP(nn.Module):
    """(T, D) -> (T, D): silu(gate) * up, and down."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.split(self.rows_at_once(hidden_states))
        return joined([products(self.gated(some), self.down_proj)[0] for some in rows])

    def added(self, sums: Tensor, values: Values) -> Tensor:
        """The sums (T, D) and what `forward` gives for the values."""
        return joined(self.in_pieces(added, sums, values))

    def added_and_product(self, sums: Tensor, values: Values) -> tuple[Tensor, Tensor]:
        """What `added` gives, to the last bit, and what `forward` gives."""
        together, outputs = zip(*self.in_pieces(added_and_product, sums, values), strict=True)
        return joined(together), joined(outputs)

    def in_pieces(self, add: Callable[..., Part], sums: Tensor, values: Values) -> list[Part]:
        """What `add` gives for some rows at a time."""
        at_once = self.rows_at_once(sums)
        rows = zip(sums.split(at_once), values.split(at_once), strict=True)
        return [add(some, self.gated(own), self.down_proj) for some, own in rows]

    def rows_at_once(self, hidden_states: Tensor) -> int:
        """On a CPU, the values of a few rows are still in its cache when down_proj reads them.

        A GPU is faster with all rows at once, and so are 4-bit weights, which are unpacked for each product. Compiled code must
        be the same for any number of rows, so it takes no pieces.
        """
        in_pieces = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
        return CPU_ROWS if in_pieces and not isinstance(self.gate_proj, Int4Linear) else max(1, len(hidden_states))

    def gated(self, values: Values) -> RowByRow:
        return RowByRow(silu_product, silu_product, tuple(products(values, self.gate_proj, self.up_proj)))


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class ModuleOutputs(NamedTuple):
    """Inputs and outputs of a layer's two modules, (T, D) each: the input is behind the norm, the output before the sum."""

    attention_input: Tensor
    attention_output: Tensor
    mlp_input: Tensor
    mlp_output: Tensor


class DecoderLayer(nn.Module):
    """Two parts with attention between them. `Decoder.compile_layers` replaces the parts by compiled ones."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.before_part, self.behind_part = DecoderLayer.before_attention, DecoderLayer.behind_attention

    def forward(
        self, hidden_states: Tensor, rotary: Rotary, attend: Attend, show: Callable[[ModuleOutputs], None] | None = None
    ) -> Tensor:
        """The layer's input (T, D) -> the next layer's input. `show`, if given, receives the module outputs."""
        attended = attend(*self.before_part(self, hidden_states, rotary))
        if show is None:
            return self.behind_part(self, hidden_states, attended)
        return self.shown_behind_attention(hidden_states, attended, show)

    def before_attention(self, hidden_states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's input (T, D) -> queries, keys and values"""
        return self.self_attn.query_key_value(self.input_layernorm.row_by_row(hidden_states), rotary)

    def behind_attention(self, hidden_states: Tensor, attended: Tensor) -> Tensor:
        """The layer's input (T, D) and the attention's result (T, H, head_dim) -> the next layer's input"""
        hidden_states = added(hidden_states, attended.flatten(-2), self.self_attn.o_proj)
        return self.mlp.added(hidden_states, self.post_attention_layernorm.row_by_row(hidden_states))

    def shown_behind_attention(self, hidden_states: Tensor, attended: Tensor, show: Callable[[ModuleOutputs], None]) -> Tensor:
        """As `behind_attention`, to the last bit."""
        middle, attention_output = added_and_product(hidden_states, attended.flatten(-2), self.self_attn.o_proj)
        sums, mlp_output = self.mlp.added_and_product(middle, self.post_attention_layernorm.row_by_row(middle))
        attention_input, mlp_input = self.input_layernorm(hidden_states), self.post_attention_layernorm(middle)
        show(ModuleOutputs(attention_input, attention_output, mlp_input, mlp_output))
        return sums

    def row_queries_and_keys(self, hidden_states: Tensor, rotary: Rotary, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (R, H, head_dim) of `rows` (R,) and all keys (T, K, head_dim), as `forward` computes them."""
        normed, (cos, sin) = self.input_layernorm.row_by_row, rotary
        queries = self.self_attn.query(normed(hidden_states[rows]), (cos[rows], sin[rows]))
        return queries, self.self_attn.key(normed(hidden_states), rotary)


class Decoder(nn.Module):
    """The decoder's parameters, with official names, so an official checkpoint loads with `strict=True`.

    The loop over the layers is `inference.prefill`, because tokens leave in it.
    Source: transformers models/llama/modeling_llama.py, models/qwen2/modeling_qwen2.py, models/qwen3/modeling_qwen3.py.
    """

    def __init__(self, config: TextConfig, attention: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention = attention  # the requested back end; see attention.resolve_backend
        self.kv_cache_dtype = "auto"  # see kv_cache.KV_CACHE_DTYPES
        self.cuda_graph = False  # decode by a CUDA graph; see inference.GraphedSteps
        self.float32_sums = True  # see `widened`
        self.tensor_parallel: TensorParallel | None = None  # the processes that hold the other parts of it
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def compile_layers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Let torch compile the parts between two attentions: the same code for all layers and any number of tokens.

        Norms, rotary embedding, activations and sums become few kernels. With few tokens left, a GPU otherwise waits for the
        launches of many kernels. CPUs gain almost nothing. The compiler, the `backend` of torch.compile, runs at the first
        prompts of unequal length and at the first decoded token. Raises ValueError for a decoder that cannot be compiled.
        """
        is_shared = self.tensor_parallel is not None
        is_packed = any(isinstance(module, PrepackedLinear | WidenedLinear | QuantisedLinear) for module in self.modules())
        if is_shared or is_packed:
            reason = "shared by processes" if is_shared else "with prepacked or quantised weights on a CPU"
            raise ValueError(f"a decoder {reason} cannot be compiled; run it as it is, or in float32 by one process")
        before_part = torch.compile(DecoderLayer.before_attention, fullgraph=True, backend=backend)
        behind_part = torch.compile(DecoderLayer.behind_attention, fullgraph=True, backend=backend)
        for layer in cast(Iterable[DecoderLayer], self.layers):
            layer.before_part, layer.behind_part = before_part, behind_part

    @property
    def dtype(self) -> torch.dtype:
        """What attention computes in, and what the cache holds."""
        return self.embed_tokens.weight.dtype

    def widened(self, hidden_states: Tensor) -> Tensor:
        """What enters layer 0: in float32 at least, in which the sums of all layers then stay.

        Methods rank tokens by small differences of these sums. Rounding the sums to bfloat16 disturbs that order: see
        research/precision.py. On a CPU, float32 costs less than 1 % of the time. Without `float32_sums`, the sums keep their
        dtype, as in transformers.
        """
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        return hidden_states.to(wide) if self.float32_sums else hidden_states

    def all_heads(self, heads: Tensor) -> Tensor:
        """(..., own heads, head_dim) -> (..., all heads, head_dim)"""
        return heads if self.tensor_parallel is None else self.tensor_parallel.all_heads(heads)

    def row_queries_and_keys(
        self, layer: DecoderLayer, hidden_states: Tensor, rotary: Rotary, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The layer's `row_queries_and_keys` for all heads, also where processes share the decoder."""
        queries, keys = layer.row_queries_and_keys(hidden_states, rotary, rows)
        return self.all_heads(queries), self.all_heads(keys)
