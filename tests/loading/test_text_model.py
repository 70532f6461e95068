"""Text checkpoints as decoders: parity with transformers, droppable spans, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import serve
from test_hub import environment
from text_models import OWN, text_reference, write_text_folder

from nanovlm_v2drop import (
    DROPPERS,
    Droppable,
    DropSchedule,
    TextModel,
    TextPrompt,
    V2Drop,
    generate,
    load,
    load_decoder,
    prefill,
)
from nanovlm_v2drop.dropping.before_decoder import BeforeDecoder
from nanovlm_v2drop.loading.files import CheckpointError

PROMPT = TextPrompt(tuple(range(3, 43)), ((5, 20), (24, 33)))

NEEDS_FRAMES = "dycoke"
NEED_NO_PICTURE = sorted(
    name for name, method in DROPPERS.items() if not issubclass(method, BeforeDecoder) and name != NEEDS_FRAMES
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("text")
    return {name: write_text_folder(place / name, text_reference(name)) for name in OWN}


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path]) -> TextModel:
    return load_decoder(folders["llama"])


@pytest.mark.parametrize("model_type", OWN)
def test_logits_and_generated_ids_equal_those_of_transformers(model_type: str, folders: dict[str, Path]) -> None:
    model, reference = load_decoder(folders[model_type]), text_reference(model_type)
    prompts = [TextPrompt(tuple(range(3, 43))), TextPrompt((7, 9, 7, 300, 21))]
    logits = prefill(model.decoder, model.prepare(prompts)).logits
    for prompt, own, answer in zip(prompts, logits, generate(model, prompts, max_new_tokens=12), strict=True):
        ids = torch.tensor([prompt.token_ids])
        torch.testing.assert_close(own, reference(ids).logits[0, -1], atol=2e-5, rtol=1e-4)
        expected = reference.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert answer.token_ids == expected.tolist()


@pytest.mark.parametrize("model_type", OWN)
def test_a_config_means_what_transformers_reads_in_it(model_type: str, folders: dict[str, Path]) -> None:
    text, official = load_decoder(folders[model_type]).config.text_config, text_reference(model_type).config
    for name in ("vocab_size", "hidden_size", "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(text, name) == getattr(official, name)
    assert text.rope_theta == official.rope_parameters["rope_theta"]


def test_dropping_rows_of_a_span_is_masking_them_in_transformers(llama: TextModel) -> None:
    """From layer 0 on, keeping some rows at their own positions is a prompt of these rows alone."""
    reference = text_reference("llama")

    class Odd(V2Drop):
        name = "odd"
        earliest_layer = 0

        def score(self, state: Any) -> torch.Tensor:
            return (state.vision_indices % 2).float()

    packed = llama.prepare([PROMPT])
    prefilled = prefill(llama.decoder, packed, Odd(DropSchedule({0: 0.5})))
    ((_, (kept,)),) = prefilled.kept
    assert kept.tolist() == [number for number in range(24) if number % 2]
    droppable = [place for start, end in PROMPT.spans for place in range(start, end)]
    rows = sorted(set(range(40)) - {place for number, place in enumerate(droppable) if number % 2 == 0})
    ids = torch.tensor([[PROMPT.token_ids[row] for row in rows]])
    expected = reference(ids, position_ids=torch.tensor([rows])).logits[0, -1]
    torch.testing.assert_close(prefilled.logits[0], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NEED_NO_PICTURE)
def test_every_method_that_needs_no_picture_drops_from_the_spans_alone(name: str, llama: TextModel) -> None:
    packed, method = llama.prepare([PROMPT, TextPrompt(tuple(range(60, 90)), ((2, 26),))]), DROPPERS[name]
    schedule = method.schedule_for(12, 24, 6)
    counts = schedule.vision_tokens_per_layer(24, 6)
    prefilled = prefill(llama.decoder, packed, method(schedule), max_new_tokens=1)
    assert prefilled.logits.isfinite().all()
    layers = [layer for layer, _ in prefilled.kept]
    assert layers
    assert layers == list(schedule)
    if method.merges:
        return
    for layer, kept in prefilled.kept:
        assert [len(rows) for rows in kept] == [counts[layer]] * 2


def test_generate_answers_prompts_with_a_budget(llama: TextModel) -> None:
    (answer,) = generate(llama, [PROMPT], V2Drop, retain=1 / 3, max_new_tokens=3)
    assert len(answer.token_ids) == 3
    assert next(len(kept) for _, kept in answer.kept) < 24


def test_a_prompt_is_written_in_pieces_of_which_some_may_be_dropped(llama: TextModel) -> None:
    prompt = llama.prompt(["What colour", Droppable(" is the digit?"), " yes", Droppable(" no"), "\n"])
    spans = [llama.tokenizer.decode(prompt.token_ids[start:end]) for start, end in prompt.spans]
    assert spans == [" is the digit?", " no"]
    assert llama.tokenizer.decode(prompt.token_ids) == "What colour is the digit? yes no\n"


def test_a_message_is_written_in_the_chat_template_of_the_folder(llama: TextModel) -> None:
    prompt = llama.chat([Droppable("What colour"), " is the digit?"])
    written = "<|im_start|>user\nWhat colour is the digit?<|im_end|>\n<|im_start|>assistant\n"
    assert list(prompt.token_ids) == llama.tokenizer.encode(written)
    ((start, end),) = prompt.spans
    assert llama.tokenizer.decode(prompt.token_ids[start:end]) == "What colour"


@pytest.mark.parametrize("template", ["no message", "{{ messages[0].content }} {{ messages[0].content }}"])
def test_a_chat_template_must_write_the_message_once(template: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=r"chat_template\.jinja: the chat template does not write the user's message once"):
        load_decoder(folder).chat(["a"])


def test_a_folder_without_a_chat_template_or_tokenizer_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folders["qwen2"] / name) if name == "config.json" else (tmp_path / name).write_bytes(
            (folders["qwen2"] / name).read_bytes()
        )
    model = load_decoder(tmp_path)
    assert prefill(model.decoder, model.prepare([PROMPT])).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"holds no chat template; write the whole prompt"):
        model.chat(["a"])
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        model.prompt(["a"])


@pytest.mark.parametrize(
    ("token_ids", "spans", "said"),
    [
        ((), (), "the prompt is empty"),
        ((1, 2, 3), ((0, 3),), "end before the last token"),
        ((1, 2, 3), ((1, 1),), "not empty"),
        ((1, 2, 3, 4), ((1, 3), (2, 3)), "in order"),
        ((1, 2, 3), ((-1, 1),), "in order"),
    ],
)
def test_a_span_that_cannot_be_dropped_is_refused(token_ids: Any, spans: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TextPrompt(token_ids, spans)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (TextPrompt((1,) * 2049), "has 2049 tokens, but the context of llama holds 2048"),
        (TextPrompt((1, 100_000)), "has token 100000, but llama has embeddings for 0 to"),
        (TextPrompt((-1, 1)), "has token -1"),
    ],
)
def test_a_prompt_that_does_not_fit_the_model_is_refused(prompt: TextPrompt, said: str, llama: TextModel) -> None:
    with pytest.raises(ValueError, match=said):
        llama.prepare([prompt])
    with pytest.raises(ValueError, match="no prompt given"):
        llama.prepare([])


def test_a_vision_language_model_is_refused_by_name_and_a_decoder_by_load(
    folders: dict[str, Path], tiny_llava_folder: Path
) -> None:
    for model in (tiny_llava_folder, "demo", "qwen2-vl-2b", "Qwen/Qwen2-VL-2B-Instruct@main"):
        with pytest.raises(ValueError, match=r"is a vision-language model, not a decoder alone: load\("):
            load_decoder(model)
    with pytest.raises(ValueError, match=r"model_type 'llama' is a decoder alone: load_decoder\("):
        load(folders["llama"])
    with pytest.raises(ValueError, match="give the folder of a text checkpoint, or an id"):
        load_decoder("no-such-model")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "mistral3"}, "model_type = 'mistral3' is not supported; expected one of 'llama', 'qwen2', 'qwen3'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"hidden_size": "48"}, "hidden_size = '48'"),
        ({"eos_token_id": 10**6}, "eos_token_id 1000000 is outside the vocabulary"),
        ({"num_hidden_layers": 7}, "lacks tensors of the model: config.json says num_hidden_layers 7"),
        ({"intermediate_size": 64}, "config.json disagrees on shapes"),
        ({"tie_word_embeddings": False}, "lacks tensors of the model: language_model.lm_head.weight"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised checkpoint"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], said: str, folders: dict[str, Path], tmp_path: Path) -> None:
    raw = json.loads((folders["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **settings}))
    (tmp_path / "model.safetensors").write_bytes((folders["llama"] / "model.safetensors").read_bytes())
    with pytest.raises((ValueError, CheckpointError), match=said):
        load_decoder(tmp_path)


def test_generation_config_has_the_last_word_on_what_ends_an_answer(folders: dict[str, Path], tmp_path: Path) -> None:
    assert load_decoder(folders["llama"]).config.eos_token_ids == (2,)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders["llama"] / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 2]}))
    assert load_decoder(tmp_path).config.eos_token_ids == (4, 2)


SCRIPT = """
import sys
from nanovlm_v2drop import load_decoder
for name in sys.argv[1:]:
    try:
        print(load_decoder(name).chat(["a"]).token_ids)
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, error)
"""


def test_a_text_checkpoint_comes_from_the_hub_and_then_from_its_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "weights" / "demo"
    with serve({"someone/tiny-llama": folders["llama"], "someone/demo": demo}) as hub:
        names = ["someone/tiny-llama", "someone/tiny-llama", "someone/demo", "someone/nothing"]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *names],
            env=environment(hub.endpoint, tmp_path / "cache", {}), capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    fetched, cached, vision, unknown = done.stdout.strip().split("\n", 3)
    assert fetched == cached == str(load_decoder(folders["llama"]).chat(["a"]).token_ids)
    assert hub.downloads.count("model.safetensors") == 1
    assert vision.startswith("CheckpointError")
    assert "is a vision-language model, not a decoder alone" in vision
    assert unknown.startswith("WeightsUnavailable nothing: cannot get someone/nothing")
