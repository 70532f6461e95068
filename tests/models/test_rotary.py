"""Scaled rotary frequencies are those of transformers, for every type, spelling, length, batch and answer."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import official_names, tiny_reference, tiny_tokenizer, write_processing_files
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tiny import pack_together, tiny_decoder
from torch import Tensor

from nanovlm_v2drop import Decoder, DropSchedule, Request, V2Drop, decode_one_token, generate, load, prefill
from nanovlm_v2drop.models.config import (
    DynamicScaling,
    Llama3Scaling,
    TextConfig,
    VLMConfig,
    YarnScaling,
    flatten_rope,
    from_fields,
)
from nanovlm_v2drop.models.decoder import rotary_table
from nanovlm_v2drop.models.rotary import dynamic_base
from nanovlm_v2drop.models.vlm import PackedInputs

transformers = pytest.importorskip("transformers")
LIMIT = 24  # max_position_embeddings of the tiny decoders
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "linear, whole factor": {"type": "linear", "factor": 4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic, factor 1": {"type": "dynamic", "factor": 1.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64},
    "llama3, original left out": LLAMA3,
    "yarn": YARN,
    "yarn, original left out": {"type": "yarn", "factor": 4.0},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, attention factor": {**YARN, "attention_factor": 0.7},
    "yarn, both mscales": {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.3},
    "yarn, one mscale": {**YARN, "factor": 40.0, "mscale": 0.707},
    "yarn, other turns": {**YARN, "beta_fast": 4, "beta_slow": 0.5, "rope_theta": 500.0},
    "yarn, one frequency is mixed": {**YARN, "original_max_position_embeddings": 4},
    "yarn, nothing is mixed": {**YARN, "truncate": False, "beta_fast": 2, "beta_slow": 2},
    "yarn, mixed beyond the slowest frequency": {**YARN, "original_max_position_embeddings": 4096, "rope_theta": 50.0},
}
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LIMIT,
    "pad_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}
every_scaling = pytest.mark.parametrize("name", SCALINGS)


def official_decoder(family: str, rope: dict[str, Any], **changes: Any) -> Any:
    """transformers' language model with large random weights; `sliding_window` only where it is asked for."""
    window = {"sliding_window": None} if family == "mistral" else {}
    kind = CLASSES[family]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **window, "rope_parameters": dict(rope), **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
    return model


def our_decoder(official: Any) -> Decoder:
    config = from_fields(TextConfig, flatten_rope(official.config.to_dict()))
    decoder = Decoder(config)
    state = {name.removeprefix("model."): tensor for name, tensor in official.state_dict().items()}
    decoder.load_state_dict(state, strict=True)
    return decoder.eval()


def prompt_ids(length: int) -> Tensor:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(length))


def packed_text(decoder: Decoder, prompts: list[Tensor]) -> PackedInputs:
    lengths = [len(prompt) for prompt in prompts]
    return PackedInputs(
        decoder.embed_tokens(torch.cat(prompts)),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.zeros(sum(lengths), dtype=torch.bool),
        lengths,
    )


def official_answer(official: Any, prompt: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens (N,) and the logits (N, V) before each, by a model that has seen no other prompt."""
    fresh = copy.deepcopy(official)
    out = fresh.generate(prompt[None], max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return out.sequences[0, len(prompt) :], torch.cat(out.logits)


def our_answers(decoder: Decoder, prompts: list[Tensor], new: int) -> tuple[Tensor, Tensor]:
    """The same for a packed batch: (B, N) and (B, N, V)."""
    prefilled = prefill(decoder, packed_text(decoder, prompts))
    logits, tokens = [prefilled.logits], []
    while True:
        tokens.append(logits[-1].argmax(-1))
        if len(tokens) == new:
            return torch.stack(tokens, 1), torch.stack(logits, 1)
        logits.append(decode_one_token(decoder, tokens[-1], prefilled.cache))


# Frequencies


@every_scaling
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("beside", [{}, {"original_max_position_embeddings": 20}], ids=["", "original beside"])
def test_the_rotary_table_equals_the_official_one(name: str, section: str, beside: dict[str, Any]) -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 128, **beside}
    config = transformers.LlamaConfig(**sizes, **{section: dict(SCALINGS[name])})
    read = [{**sizes, section: SCALINGS[name]}, config.to_dict()]  # as it was written, and as transformers writes it
    for length in (100, 128, 129, 3000):
        positions = torch.arange(length)
        official = modeling.LlamaRotaryEmbedding(config)(torch.empty(1), positions[None])
        for raw in read:
            ours = from_fields(TextConfig, flatten_rope(raw))
            tables = rotary_table(ours, positions, torch.float32, torch.tensor(length))
            for table, wanted in zip(tables, official, strict=True):
                # Bit for bit, but for the power of a base that a prompt has grown.
                tolerance = 1e-6 * length if ours.rope_follows_length and length > 128 else 0
                torch.testing.assert_close(table[:, 0], wanted[0], atol=tolerance, rtol=0)


def test_a_decoder_whose_frequencies_follow_the_length_must_be_told_it() -> None:
    config = TextConfig(hidden_size=64, num_attention_heads=4, rotary_scaling=DynamicScaling(factor=2.0))
    with pytest.raises(ValueError, match="follow the length of a sequence; pass its length"):
        rotary_table(config, torch.arange(3), torch.float32)


# Decoders


@every_scaling
@pytest.mark.parametrize("family", CLASSES)
def test_a_packed_batch_of_short_and_long_prompts_and_its_answers_equal_transformers(name: str, family: str) -> None:
    official = official_decoder(family, SCALINGS[name])
    decoder = our_decoder(official)
    # Far below the limit; below it, with an answer that goes beyond it; at it; beyond it.
    prompts = [prompt_ids(length) for length in (5, LIMIT - 3, LIMIT, 50)]
    tokens, logits = our_answers(decoder, prompts, 6)
    for index, prompt in enumerate(prompts):
        wanted_tokens, wanted_logits = official_answer(official, prompt, 6)
        torch.testing.assert_close(logits[index], wanted_logits, atol=2e-4, rtol=1e-4)
        assert torch.equal(tokens[index], wanted_tokens)


@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "yarn"])
def test_the_scaling_changes_the_answer(name: str) -> None:
    official = official_decoder("llama", SCALINGS[name])
    decoder = our_decoder(official)
    plain = Decoder(replace(decoder.config, rotary_scaling=None)).eval()
    plain.load_state_dict(decoder.state_dict())
    for length in (10, 50):
        scaled, unscaled = (prefill(each, packed_text(each, [prompt_ids(length)])).logits for each in (decoder, plain))
        assert torch.equal(scaled, unscaled) == (name == "dynamic" and length <= LIMIT)


def test_each_sequence_of_a_batch_has_its_own_frequencies_where_transformers_takes_the_longest() -> None:
    official = official_decoder("llama", SCALINGS["dynamic"])
    decoder = our_decoder(official)
    short, long = prompt_ids(30), prompt_ids(60)
    both = prefill(decoder, packed_text(decoder, [short, long])).logits
    for index, prompt in enumerate((short, long)):
        alone = prefill(decoder, packed_text(decoder, [prompt])).logits
        torch.testing.assert_close(both[index : index + 1], alone, atol=1e-5, rtol=1e-5)
    padded = torch.zeros(2, 60, dtype=torch.long)
    padded[0, :30], padded[1] = short, long  # a causal model's row does not see what stands behind it
    theirs = copy.deepcopy(official)(padded).logits[[0, 1], [29, 59]]
    torch.testing.assert_close(both[1], theirs[1], atol=2e-4, rtol=1e-4)
    assert (both[0] - theirs[0]).abs().max() > 0.01


def test_a_request_does_not_depend_on_earlier_ones_where_transformers_keeps_the_longest_prompt() -> None:
    official = official_decoder("llama", SCALINGS["dynamic"])
    decoder = our_decoder(official)
    short, long = prompt_ids(30), prompt_ids(60)  # both beyond the limit

    def ours(prompt: Tensor) -> Tensor:
        return prefill(decoder, packed_text(decoder, [prompt])).logits[0]

    before = ours(short)
    torch.testing.assert_close(before, copy.deepcopy(official)(short[None]).logits[0, -1], atol=2e-4, rtol=1e-4)
    ours(long)
    assert torch.equal(ours(short), before)
    official(long[None])
    assert (official(short[None]).logits[0, -1] - before).abs().max() > 0.01
    official(prompt_ids(5)[None])  # a prompt below the limit resets it
    torch.testing.assert_close(official(short[None]).logits[0, -1], before, atol=2e-4, rtol=1e-4)


@every_scaling
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_multimodal_positions_and_scaling_work_together(family: str, name: str) -> None:
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    kind = f"{family.replace('_vl', '').capitalize()}VLText"
    rope = {**SCALINGS[name], "mrope_section": [3, 3, 2]}
    config = getattr(modeling, f"{kind}Config")(**{**SIZES, "head_dim": 16}, rope_parameters=rope)
    reference = getattr(modeling, f"{kind}Model")(config).eval().requires_grad_(False)
    for number, (parameter_name, parameter) in enumerate(reference.named_parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.copy_(1 + 0.1 * noise if "norm" in parameter_name else 0.3 * noise)
    decoder = Decoder(from_fields(TextConfig, flatten_rope(config.to_dict()))).eval()
    state = reference.state_dict()
    decoder.load_state_dict({**state, "lm_head.weight": state["embed_tokens.weight"]})
    assert (decoder.config.mrope_section, decoder.config.mrope_interleaved) == ((3, 3, 2), family == "qwen3_vl")
    for far in (10, 40):  # the largest position, below the limit and beyond it
        time, height, width = [0, 1, 2, 2, 2, 2, 5, far], [0, 1, 2, 2, 3, 3, 5, far], [0, 1, 2, 3, 2, 3, 5, far]
        position_ids = torch.tensor([time, height, width])
        embeds = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
        found = copy.deepcopy(reference)(inputs_embeds=embeds[None], position_ids=position_ids[:, None])
        wanted = found.last_hidden_state[0, -1] @ decoder.embed_tokens.weight.T
        packed = PackedInputs(embeds, position_ids, torch.zeros(8, dtype=torch.bool), [8])
        torch.testing.assert_close(prefill(decoder, packed).logits[0], wanted, atol=2e-4, rtol=1e-4)


def test_dropping_leaves_the_frequencies_of_the_whole_prompt() -> None:
    decoder = tiny_decoder(max_position_embeddings=24, rotary_scaling=DynamicScaling(factor=3.0), head_dim=16)
    prompts = [seeded_prompt(10, 40, 6, 1), seeded_prompt(3, 12, 4, 2)]
    out = prefill(decoder, pack_together(prompts), V2Drop(DropSchedule({2: 0.25})))
    for index, (prompt, length) in enumerate(zip(prompts, (56, 19), strict=True)):
        base = dynamic_base(decoder.config, 3.0, torch.tensor(length)).item()
        assert (base > decoder.config.rope_theta) == (length > 24)
        fixed = Decoder(replace(decoder.config, rotary_scaling=None, rope_theta=base)).eval()
        fixed.load_state_dict(decoder.state_dict())
        expected = prefill(fixed, prompt, V2Drop(DropSchedule({2: 0.25})))
        torch.testing.assert_close(out.logits[index], expected.logits[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(out.kept[0][1][index], expected.kept[0][1][0])


def seeded_prompt(before: int, vision: int, behind: int, seed: int) -> PackedInputs:
    length = before + vision + behind
    rows = torch.arange(length)
    embeds = torch.randn(length, 32, generator=torch.Generator().manual_seed(seed))
    return PackedInputs(embeds, rows, (rows >= before) & (rows < before + vision), [length], seeds=(seed,))


# Models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A tiny LLaVA for each type, whose context holds a picture and a few words."""
    made = {}
    for name in ("linear", "dynamic", "llama3", "yarn"):
        rope = {**SCALINGS[name], **({"original_max_position_embeddings": 80} if name == "yarn" else {})}
        reference = tiny_reference(tiny_tokenizer(), rope_parameters=rope)
        reference.config.text_config.max_position_embeddings = 100
        folder = tmp_path_factory.mktemp(name)
        reference.config.save_pretrained(folder)
        write_processing_files(folder, tiny_tokenizer())
        save_file(official_names(reference.state_dict()), folder / "model.safetensors")
        loaded = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
        made[name] = (folder, loaded)
    return made


@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "yarn"])
@pytest.mark.parametrize("pictures", [1, 3])
def test_answers_of_a_whole_model_equal_transformers(name: str, pictures: int, folders: dict[str, tuple[Path, Any]]) -> None:
    folder, official = folders[name]
    vlm = load(folder)
    images = [Image.new("RGB", (42, 42), colour) for colour in ("red", "blue", "white")[:pictures]]
    request = Request("What is shown?", images=images)
    if name == "llama3" and pictures == 3:
        with pytest.raises(ValueError, match=r"tokens .* but the context of .* holds 100"):
            vlm.prepare([request])
        return
    token_ids, media = vlm.tokens_and_media(request)
    assert (len(token_ids) > 100) == (pictures == 3)
    (answer,) = generate(vlm, [request], max_new_tokens=5)
    pixels = torch.cat([medium.pixel_values for medium in media])
    inputs = {"input_ids": torch.tensor([token_ids]), "pixel_values": pixels}
    theirs = copy.deepcopy(official).generate(**inputs, max_new_tokens=5, do_sample=False)[0, len(token_ids) :].tolist()
    assert answer.token_ids == theirs[: len(answer.token_ids)]
    assert len(answer.token_ids) == len(theirs) or answer.token_ids[-1] == 2


def test_a_prompt_may_be_as_long_as_the_scaled_context(folders: dict[str, tuple[Path, Any]]) -> None:
    limits = {name: load(folder).config.text_config.context_length for name, (folder, _) in folders.items()}
    assert limits == {"linear": 250, "dynamic": None, "llama3": 100, "yarn": 320}


# Spelling


SECTIONS = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["default", "linear", "yarn", "dynamic"]),
        "rope_type": st.sampled_from(["default", "linear", "llama3"]),
        "factor": st.sampled_from([2.0, 3]),
        "rope_theta": st.sampled_from([100.0, 200.0]),
        "low_freq_factor": st.just(1.0),
        "high_freq_factor": st.just(4.0),
        "original_max_position_embeddings": st.sampled_from([32, 64]),
    },
)


@settings(deadline=None, max_examples=150)
@given(
    rope=st.fixed_dictionaries(
        {},
        optional={
            "rope_scaling": SECTIONS,
            "rope_parameters": SECTIONS,
            "rope_theta": st.sampled_from([300.0, 400.0]),
            "original_max_position_embeddings": st.just(16),
        },
    )
)
def test_every_mixture_of_spellings_is_read_as_transformers_reads_it(rope: dict[str, Any]) -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
    try:
        embedding = modeling.LlamaRotaryEmbedding(transformers.LlamaConfig(**sizes, **copy.deepcopy(rope)))
    except KeyError:  # a setting is missing
        with pytest.raises(ValueError, match=r"rope_(scaling|parameters)\.\w+ is missing: rope_type"):
            flatten_rope({**sizes, **rope})
        return
    config, positions = from_fields(TextConfig, flatten_rope({**sizes, **rope})), torch.arange(50)
    tables = rotary_table(config, positions, torch.float32, torch.tensor(50))
    for table, wanted in zip(tables, embedding(torch.empty(1), positions[None]), strict=True):
        assert torch.equal(table[:, 0], wanted[0])


def test_the_original_length_of_a_scaling_is_that_of_the_decoder_where_it_has_none() -> None:
    config = TextConfig(max_position_embeddings=128, rotary_scaling=YarnScaling(factor=4.0))
    assert config.rotary_scaling == YarnScaling(factor=4.0, original_max_position_embeddings=128)
    assert replace(config, max_position_embeddings=512) != config


BAD: list[tuple[dict[str, Any], str]] = [
    ({"type": "longrope", "factor": 4.0}, r"rope_scaling\.type = 'longrope' .*'linear', 'dynamic', 'llama3', 'yarn'"),
    ({"type": "linear"}, r"rope_scaling\.factor is missing: rope_type 'linear' needs factor"),
    ({"type": "linear", "factor": None}, r"rope_scaling\.factor = None .*a number from 1 to 10000"),
    ({"type": "linear", "factor": "4"}, r"rope_scaling\.factor = '4' .*a number from 1"),
    ({"type": "dynamic", "factor": 0.5}, r"rope_scaling\.factor = 0\.5 .*a number from 1"),
    ({"type": "dynamic", "factor": float("nan")}, r"rope_scaling\.factor = nan .*a number from 1"),
    ({"type": "linear", "factor": True}, r"rope_scaling\.factor = True .*a number from 1"),
    ({"rope_type": "llama3", "factor": 8.0}, r"rope_scaling\.low_freq_factor is missing: rope_type 'llama3' needs"),
    ({**LLAMA3, "high_freq_factor": 1.0}, r"rope_scaling\.high_freq_factor 1 must be above low_freq_factor 1"),
    ({**LLAMA3, "low_freq_factor": 0}, r"rope_scaling\.low_freq_factor = 0 .*a number from 0\.001"),
    ({**YARN, "original_max_position_embeddings": 0}, r"rope_scaling\.original_max_position_embeddings = 0 .*a whole number"),
    ({**YARN, "beta_fast": 0.5}, r"rope_scaling\.beta_fast 0\.5 must not be below beta_slow 1"),
    ({**YARN, "truncate": "no"}, r"rope_scaling\.truncate = 'no' .*False, True"),
    ({**YARN, "attention_factor": -1.0}, r"rope_scaling\.attention_factor = -1\.0 .*a number from 0\.001"),
    ({**YARN, "rope_theta": 1}, r"rope_type 'yarn' needs a rope_theta above 1"),
    ({"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}, r"rope_scaling\.partial_rotary_factor = 0\.5 is not"),
    ({"full_attention": YARN}, r"rope_scaling\.full_attention = .* is not supported; expected None"),
]


@pytest.mark.parametrize(("rope", "message"), BAD, ids=[str(rope)[:60] for rope, _ in BAD])
def test_a_setting_that_is_missing_or_out_of_bounds_is_refused_in_one_line(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^text_config.{message}") as error:
        VLMConfig.from_official({"model_type": "llava", "text_config": {"model_type": "llama", "rope_scaling": rope}})
    assert "\n" not in str(error.value)


def test_one_frequency_cannot_be_scaled_by_the_length() -> None:
    with pytest.raises(ValueError, match="rope_type 'dynamic' needs a head_dim above 2, not 2"):
        TextConfig(hidden_size=8, num_attention_heads=4, rotary_scaling=DynamicScaling(factor=2.0))


def test_settings_made_in_python_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"high_freq_factor 1 must be above low_freq_factor 2"):
        Llama3Scaling(factor=2.0, low_freq_factor=2.0, high_freq_factor=1.0)
    with pytest.raises(ValueError, match=r"factor = 0 is not supported"):
        YarnScaling(factor=0)
    with pytest.raises(ValueError, match=r"rotary_scaling = 'yarn' is not supported; expected a RopeScaling, or None"):
        TextConfig(rotary_scaling="yarn")
