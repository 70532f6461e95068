"""The decoder in official names computes what transformers computes, for LLaMA, Qwen2, Qwen3 and the Qwen-VL families."""

from typing import Any

import pytest
import torch
from tiny import FAMILIES as TINY_FAMILIES
from tiny import pack_together, tiny_decoder, tiny_prompts
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule
from nanovlm_v2drop.inference import decode_one_token, prefill
from nanovlm_v2drop.loading.precision import DTYPE_NAMES, OBSTACLES, Precision, pack
from nanovlm_v2drop.models import decoder as decoder_module
from nanovlm_v2drop.models.config import TextConfig, flatten_rope, from_fields
from nanovlm_v2drop.models.decoder import Decoder, GatedMLP, RMSNorm, rotary_table
from nanovlm_v2drop.models.linear import PrepackedLinear, RowByRow
from nanovlm_v2drop.models.linear_int4 import Int4Linear
from nanovlm_v2drop.models.vlm import PackedInputs

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"rms_norm_eps": 1e-5}),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "llama, wide heads": ("LlamaForCausalLM", "LlamaConfig", {"head_dim": 16}),
    "llama, another base": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": False}),
    "qwen2, tied": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 12}),
    "qwen3, tied": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
}
MROPE_SECTION = [1, 2, 1]
UNEVEN_SECTION = [3, 2, 1]  # interleaved, time has more turns than the other axes, and width fewer than height


@torch.no_grad()
def randomised(model: Any) -> Any:
    """Weights so large that every one of them matters, biases and norms included."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if "norm" in name else noise * (0.5 if parameter.dim() == 1 else 0.3))
    return model.eval().requires_grad_(False)


def our_decoder(config: Any, state: dict[str, Tensor]) -> Decoder:
    """A Decoder that has read transformers' config and, strictly, its state dict."""
    text_config = from_fields(TextConfig, flatten_rope(config.to_dict()))
    decoder = Decoder(text_config)
    decoder.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()}, strict=True)
    return decoder.eval()


def all_prefixes(inputs_embeds: Tensor, position_ids: Tensor) -> PackedInputs:
    """Every prefix of one prompt in one packed batch: their last rows are all rows of one full forward."""
    seqlens = range(1, len(inputs_embeds) + 1)
    return PackedInputs(
        torch.cat([inputs_embeds[:length] for length in seqlens]),
        torch.cat([position_ids[..., :length] for length in seqlens], dim=-1),
        torch.zeros(sum(seqlens), dtype=torch.bool),
        list(seqlens),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_prefix_equal_those_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    model_name, config_name, changes = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**SIZES, **changes})
    reference = randomised(getattr(transformers, model_name)(config))
    decoder = our_decoder(config, reference.state_dict())
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == family.endswith("tied")
    assert (decoder.layers[0].self_attn.q_proj.bias is not None) == family.startswith("qwen2")
    assert isinstance(decoder.layers[0].self_attn.k_norm, RMSNorm) == family.startswith("qwen3")
    token_ids = torch.tensor([3, 60, 0, 17, 3, 42, 9])
    packed = all_prefixes(decoder.embed_tokens(token_ids), torch.arange(len(token_ids)))
    wanted = reference(input_ids=token_ids[None]).logits[0]
    torch.testing.assert_close(prefill(decoder, packed).logits, wanted, atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=["qwen2-vl", "qwen3-vl"])
def qwen_vl(request: pytest.FixtureRequest) -> tuple[Any, Decoder]:
    """transformers' text model of a Qwen-VL family, and ours, whose head is tied to the embeddings."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": MROPE_SECTION}
    if request.param == "qwen2-vl":
        config = transformers.Qwen2VLTextConfig(**SIZES, rope_parameters=rope, tie_word_embeddings=True)
        reference = randomised(transformers.Qwen2VLTextModel(config))
    else:
        rope = {**rope, "mrope_section": UNEVEN_SECTION, "mrope_interleaved": True}
        config = transformers.Qwen3VLTextConfig(**SIZES, head_dim=12, rope_parameters=rope, tie_word_embeddings=True)
        reference = randomised(transformers.Qwen3VLTextModel(config))
    state = reference.state_dict()
    return reference, our_decoder(config, {**state, "lm_head.weight": state["embed_tokens.weight"]})


def test_positions_that_differ_by_axis_give_the_hidden_states_of_transformers(qwen_vl: tuple[Any, Decoder]) -> None:
    reference, decoder = qwen_vl
    assert decoder.config.mrope_section == tuple(UNEVEN_SECTION if decoder.config.qk_norm else MROPE_SECTION)
    assert decoder.config.mrope_interleaved == decoder.config.qk_norm
    time, height, width = [0, 1, 2, 2, 2, 2, 5, 6], [0, 1, 2, 2, 3, 3, 5, 6], [0, 1, 2, 3, 2, 3, 5, 6]  # text, 2 x 2, text
    position_ids = torch.tensor([time, height, width])
    inputs_embeds = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    hidden_states = reference(inputs_embeds=inputs_embeds[None], position_ids=position_ids[:, None]).last_hidden_state[0]
    wanted = hidden_states @ reference.embed_tokens.weight.T
    logits = prefill(decoder, all_prefixes(inputs_embeds, position_ids)).logits
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    one_axis = prefill(decoder, all_prefixes(inputs_embeds, position_ids[0])).logits
    assert (logits - one_axis).abs().max() > 0.01


def test_text_positions_mean_the_same_position_on_every_axis(qwen_vl: tuple[Any, Decoder]) -> None:
    config, position_ids = qwen_vl[1].config, torch.tensor([0, 3, 700])
    short, long = (rotary_table(config, ids, torch.float32) for ids in (position_ids, position_ids.expand(3, -1)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(short, long, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotary_table_equals_the_official_one_bit_for_bit_at_large_positions(dtype: torch.dtype) -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = modeling.LlamaConfig(hidden_size=256, num_attention_heads=2)
    position_ids = torch.tensor([0, 1, 575, 4095, 100_000])
    official = modeling.LlamaRotaryEmbedding(config)(torch.empty(1, dtype=dtype), position_ids[None])
    ours = rotary_table(from_fields(TextConfig, flatten_rope(config.to_dict())), position_ids, dtype)
    for table, wanted in zip(ours, official, strict=True):
        assert table.dtype == dtype
        assert torch.equal(table[:, 0], wanted[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_norm_equals_the_official_one_bit_for_bit(dtype: torch.dtype) -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    generator = torch.Generator().manual_seed(0)
    hidden_states = (torch.randn(50, 64, generator=generator) * 30).to(dtype)
    weight = torch.randn(64, generator=generator)
    ours, official = RMSNorm(64, 1e-5), modeling.LlamaRMSNorm(64, 1e-5)
    for norm in (ours, official):
        norm.weight.data.copy_(weight)
        norm.to(dtype)
    assert torch.equal(ours(hidden_states), official(hidden_states))


def test_an_mlp_that_takes_some_rows_at_a_time_gives_what_it_gives_for_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, values, sums, calls = GatedMLP(32, 48), torch.randn(21, 32), torch.randn(21, 32), []
    wanted, gated = mlp(values), mlp.gated
    monkeypatch.setattr(decoder_module, "CPU_ROWS", 8)
    monkeypatch.setattr(mlp, "gated", lambda rows: calls.append(rows.shape[0]) or gated(rows))
    torch.testing.assert_close(mlp(values), wanted, atol=1e-6, rtol=0)
    normed = RowByRow(torch.neg, torch.neg, (-values,))
    for given in (values, normed):
        torch.testing.assert_close(mlp.added(sums, given), sums + wanted, atol=1e-6, rtol=0)
    assert calls == [8, 8, 5] * 3


CPU = torch.device("cpu")


def test_an_mlp_takes_all_rows_at_once_where_pieces_would_be_slower() -> None:
    mlp, values = GatedMLP(32, 48), torch.randn(decoder_module.CPU_ROWS + 1, 32)
    assert mlp.rows_at_once(values) == decoder_module.CPU_ROWS
    assert mlp.rows_at_once(values.to("meta")) == len(values)
    mlp.gate_proj = Int4Linear.__new__(Int4Linear)
    assert mlp.rows_at_once(values) == len(values)


PRECISIONS = [
    *(Precision(name, getattr(torch, name)) for name in DTYPE_NAMES if name not in OBSTACLES),
    *(Precision(name, dtype) for name in OBSTACLES for dtype in (torch.bfloat16, torch.float32)),
    Precision("bfloat16", torch.float32),  # a processor without bfloat16 instructions
]


def packed_decoder(precision: Precision) -> Decoder:
    """A decoder in the form in which `load` leaves one; the kernel of 4-bit weights needs multiples of 64."""
    if precision.is_quantised and (reason := OBSTACLES[precision.name](CPU)) is not None:
        pytest.skip(reason)
    decoder = tiny_decoder(hidden_size=64, intermediate_size=128, num_key_value_heads=4).to(precision.dtype)
    pack(decoder, precision, CPU)
    return decoder.requires_grad_(False)


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: precision.noted)
def test_a_layer_that_shows_its_module_outputs_computes_the_same_to_the_last_bit(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "CPU_ROWS", 8)
    decoder, shown = packed_decoder(precision), []
    hidden_states = decoder.widened(torch.randn(21, 64, generator=torch.Generator().manual_seed(0)).to(precision.dtype))
    rotary = rotary_table(decoder.config, torch.arange(21), precision.dtype)
    for layer in decoder.layers:
        wanted = layer(hidden_states, rotary, lambda q, k, v: q + v)
        assert torch.equal(layer(hidden_states, rotary, lambda q, k, v: q + v, shown.append), wanted)
        attention_input, attention_output, mlp_input, mlp_output = shown.pop()
        assert torch.equal(attention_input, layer.input_layernorm(hidden_states))
        middle = hidden_states + attention_output
        tolerance = {"rtol": 0, "atol": 0.1 if precision.is_quantised else 1e-6}  # the norm that the MLP reads is not rounded
        torch.testing.assert_close(mlp_input, layer.post_attention_layernorm(middle), **tolerance)
        torch.testing.assert_close(middle + mlp_output, wanted, rtol=0, atol=1e-5)
        hidden_states = wanted


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: precision.noted)
def test_queries_and_keys_of_a_layer_that_has_not_run_are_those_of_its_run(precision: Precision) -> None:
    decoder, seen = packed_decoder(precision), []
    hidden_states = decoder.widened(torch.randn(41, 64, generator=torch.Generator().manual_seed(0)).to(precision.dtype))
    rotary, rows = rotary_table(decoder.config, torch.arange(41), precision.dtype), torch.arange(20, 41)
    layer = decoder.layers[1]
    layer(hidden_states, rotary, lambda q, k, v: seen.extend((q, k)) or v)
    queries, keys = decoder.row_queries_and_keys(layer, hidden_states, rotary, rows)
    assert torch.equal(keys, seen[1])
    # A product with fewer rows can be rounded otherwise, but not that of whole numbers.
    tolerance = 0 if precision.is_quantised else 16 * torch.finfo(queries.dtype).eps
    torch.testing.assert_close(queries, seen[0][rows], rtol=0, atol=tolerance)


@pytest.mark.slow  # it runs a compiler
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_compiled_layers_answer_as_before_and_are_compiled_once_for_all_layers_and_lengths(family: str) -> None:
    torch.compiler.reset()
    decoder, parts = tiny_decoder(**TINY_FAMILIES[family]), tiny_prompts(family=family)
    prompts, token = [*parts, pack_together(parts)], torch.tensor([3])

    def logits() -> list[Tensor]:
        out = [prefill(decoder, prompt, dropper) for prompt in prompts for dropper in (None, *droppers)]
        decoded = [decode_one_token(decoder, token.expand(len(each.logits)), each.cache) for each in out]
        return [*(each.logits for each in out), *decoded]

    schedule = DropSchedule({2: 0.5, 4: 0.1})
    droppers = [DROPPERS[name](schedule) for name in ("v2drop", "fastv", "pdrop")]
    wanted, graphs = logits(), CompileCounterWithBackend("inductor")
    decoder.compile_layers(backend=graphs)
    for ours, theirs in zip(logits(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # Two parts, for the first number of rows, for any, for one; and a second form of what attention gives.
    assert graphs.frame_count <= 8


def test_a_decoder_that_cannot_be_compiled_says_so() -> None:
    decoder = tiny_decoder()
    decoder.layers[0].mlp.up_proj = PrepackedLinear.__new__(PrepackedLinear)
    with pytest.raises(ValueError, match="with prepacked or quantised weights on a CPU cannot be compiled; run it as it is"):
        decoder.compile_layers()


def test_a_norm_of_many_rows_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = RMSNorm(24, 1e-5)
    norm.weight.data.normal_()
    rows = torch.randn(11, 3, 24)
    whole = norm(rows)
    monkeypatch.setattr(decoder_module, "CPU_VALUES", 4 * 3 * 24 + 1)  # 4, 4 and 3 rows
    assert torch.equal(norm(rows), whole)
