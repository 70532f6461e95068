"""Bad inputs, one a row: each ends in one line that names what is wrong, the value and what is allowed.

A row of another kind of input is a `BadInput` in a list of its own, which `BAD_INPUTS` then includes.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nanovlm_v2drop import load

WEIGHTS = Path(__file__).parents[1] / "weights"
REPORTED = (ValueError, OSError, ImportError)  # what the command line shows as one line
PINPOINTS = [[144, 144], [144, 288], [288, 144], [288, 288]]
MISSING = "(removed)"  # as a value: the entry is removed


class BadInput(NamedTuple):
    """What is attempted in an empty folder, and the pattern that the message must hold."""

    name: str
    attempt: Callable[[Path], object]
    message: str


# Settings of a checkpoint: (model, file, "section.name", value, pattern). The pattern follows the name of the file.

QWEN2_VL: dict[str, dict[str, Any]] = {  # as Qwen/Qwen2-VL-2B-Instruct, of which no weights are read
    "config.json": {
        "model_type": "qwen2_vl",
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "image_token_id": 151655,
        "intermediate_size": 8960,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "video_token_id": 151656,
        "vision_config": {"hidden_size": 1536, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
        "vocab_size": 151936,
    },
    "generation_config.json": {"eos_token_id": [151645, 151643]},
    "preprocessor_config.json": {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": 12845056,
        "merge_size": 2,
        "min_pixels": 3136,
        "patch_size": 14,
        "temporal_patch_size": 2,
    },
}


def write_model(folder: Path, model: str, with_weights: bool = False) -> None:
    """The settings of a shipped model, or those of Qwen2-VL, which has no weights; they are wrong before weights are read."""
    if model == "qwen2-vl":
        for name, content in QWEN2_VL.items():
            (folder / name).write_text(json.dumps(content))
        return
    for file in (WEIGHTS / model).glob("*.json"):
        shutil.copy(file, folder)
    if with_weights:
        shutil.copy(WEIGHTS / model / "model.safetensors", folder)


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """With one entry, given as "section.name" or "name", set or removed."""
    name, _, inner = path.partition(".")
    if inner:
        return {**content, name: changed(content.get(name) or {}, inner, value)}
    return {key: entry for key, entry in {**content, name: value}.items() if entry != MISSING}


def setting(model: str, file: str, path: str, value: Any, message: str) -> BadInput:
    """A checkpoint with one setting changed."""

    def attempt(folder: Path) -> object:
        write_model(folder, model)
        content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        (folder / file).write_text(json.dumps(changed(content, path, value)))
        return load(folder)

    return BadInput(f"{model} {file} {path}={str(value)[:30]}", attempt, rf"{re.escape(file)}: {message}")


def contents(model: str, file: str, content: bytes, message: str) -> BadInput:
    """A checkpoint with one file replaced."""

    def attempt(folder: Path) -> object:
        write_model(folder, model)
        (folder / file).write_bytes(content)
        return load(folder)

    return BadInput(f"{model} {file} {content[:12]!r}", attempt, rf"{re.escape(file)}\b.*{message}")


CONFIG, GENERATION, PREPROCESSOR = "config.json", "generation_config.json", "preprocessor_config.json"
WHOLE, NUMBER = "expected a whole number from", "expected a number from"
SETTINGS = [
    # Types: null, texts, booleans, fractions, lists and objects in the place of something else.
    setting("demo", CONFIG, "text_config.num_hidden_layers", "12", rf"text_config\.num_hidden_layers = '12' .*{WHOLE} 1 to"),
    setting("demo", CONFIG, "text_config.num_hidden_layers", 6.5, rf"text_config\.num_hidden_layers = 6\.5 .*{WHOLE}"),
    setting("demo", CONFIG, "text_config.num_hidden_layers", True, rf"text_config\.num_hidden_layers = True .*{WHOLE}"),
    setting("demo", CONFIG, "text_config.hidden_size", None, rf"text_config\.hidden_size = None .*{WHOLE}"),
    setting("demo", CONFIG, "text_config.hidden_size", [192], rf"text_config\.hidden_size = \[192\] .*{WHOLE}"),
    setting("demo", CONFIG, "text_config.vocab_size", {"size": 576}, rf"text_config\.vocab_size = \{{'size': 576\}} .*{WHOLE}"),
    setting("demo", CONFIG, "text_config.rms_norm_eps", "1e-5", rf"text_config\.rms_norm_eps = '1e-5' .*{NUMBER}"),
    setting("demo", CONFIG, "text_config.rms_norm_eps", None, rf"text_config\.rms_norm_eps = None .*{NUMBER}"),
    setting("demo", CONFIG, "text_config.rope_theta", "10000", rf"text_config\.rope_theta = '10000' .*{NUMBER}"),
    setting("demo", CONFIG, "text_config.rope_scaling", "yarn", r"text_config\.rope_scaling = 'yarn' .*a JSON object, or None"),
    setting("demo", CONFIG, "text_config.rope_scaling", {"type": "yarn"}, r"text_config\.rope_scaling\.factor is missing: .*"),
    setting("demo", CONFIG, "text_config.rope_scaling", {"type": "su"}, r"text_config\.rope_scaling\.type = 'su' .*'yarn'"),
    setting("demo", CONFIG, "text_config.rope_scaling", {"type": "linear", "factor": -1}, rf"text_.*factor = -1 .*{NUMBER} 1"),
    setting("demo", CONFIG, "text_config.tie_word_embeddings", 1, r"text_config\.tie_word_embeddings = 1 .*False, True"),
    setting("demo", CONFIG, "text_config.attention_bias", 0, r"text_config\.attention_bias = 0 .*expected False"),
    setting("demo", CONFIG, "text_config.model_type", ["llama"], r"text_config\.model_type = \['llama'\] .*'llama'"),
    setting("demo", CONFIG, "text_config", None, r"text_config = None .*expected a JSON object"),
    setting("demo", CONFIG, "text_config", [], r"text_config = \[\] .*expected a JSON object"),
    setting("demo", CONFIG, "vision_config", "clip", r"vision_config = 'clip' .*expected a JSON object"),
    setting("demo", CONFIG, "vision_config.image_size", [144, 144], rf"vision_config\.image_size = \[144, 144\] .*{WHOLE}"),
    setting("demo", CONFIG, "vision_config.hidden_act", None, r"vision_config\.hidden_act = None .*'quick_gelu'"),
    setting("demo", CONFIG, "model_type", ["llava"], r"model_type = \['llava'\] .*expected one of 'llava'"),
    setting("demo", CONFIG, "model_type", MISSING, r"model_type = None .*expected one of 'llava'"),
    setting("demo", CONFIG, "vision_feature_layer", [-2], rf"vision_feature_layer = \[-2\] .*{WHOLE}"),
    setting("demo", CONFIG, "image_token_index", "564", rf"image_token_index = '564' .*{WHOLE}"),
    setting("demo-video", CONFIG, "video_token_index", 1.5, rf"video_token_index = 1\.5 .*{WHOLE}"),
    setting("qwen2-vl", CONFIG, "vision_config.mlp_ratio", 4.0, rf"vision_config\.mlp_ratio = 4\.0 .*{WHOLE}"),
    setting("qwen2-vl", CONFIG, "use_sliding_window", "no", r"use_sliding_window = 'no' .*False, True"),
    # Bounds: what no model can have.
    setting("demo", CONFIG, "text_config.num_hidden_layers", 10**6, rf"text_config\.num_hidden_layers = 1000000 .*{WHOLE}"),
    setting("demo", CONFIG, "text_config.hidden_size", 6 * 10**12, rf"text_config\.hidden_size = 6000000000000 .*{WHOLE}"),
    setting("demo", CONFIG, "text_config.vocab_size", -1, rf"text_config\.vocab_size = -1 .*{WHOLE}"),
    setting("demo", CONFIG, "text_config.head_dim", -32, rf"text_config\.head_dim = -32 .*{WHOLE}"),
    setting("demo", CONFIG, "text_config.num_key_value_heads", 0, rf"text_config\.num_key_value_heads = 0 .*{WHOLE}"),
    setting("demo", CONFIG, "text_config.rms_norm_eps", -1e3, rf"text_config\.rms_norm_eps = -1000\.0 .*{NUMBER}"),
    setting("demo", CONFIG, "text_config.rms_norm_eps", float("nan"), rf"text_config\.rms_norm_eps = nan .*{NUMBER}"),
    setting("demo", CONFIG, "text_config.rms_norm_eps", 1e3, rf"text_config\.rms_norm_eps = 1000\.0 .*{NUMBER}"),
    setting("demo", CONFIG, "text_config.rope_theta", 0, rf"text_config\.rope_theta = 0 .*{NUMBER} 1 to"),
    setting("demo", CONFIG, "text_config.rope_theta", float("inf"), rf"text_config\.rope_theta = inf .*{NUMBER}"),
    setting("demo", CONFIG, "text_config.max_position_embeddings", 0, rf"text_config\.max_position_embeddings = 0 .*{WHOLE}"),
    setting("demo", CONFIG, "vision_config.layer_norm_eps", -1e-5, rf"vision_config\.layer_norm_eps = -1e-05 .*{NUMBER}"),
    setting("demo", CONFIG, "vision_config.num_hidden_layers", 10**6, rf"vision_config\.num_hidden_layers = 1000000 .*{WHOLE}"),
    setting("demo", CONFIG, "vision_feature_layer", -10**6, rf"vision_feature_layer = -1000000 .*{WHOLE}"),
    setting("demo", CONFIG, "image_token_index", -200, rf"image_token_index = -200 .*{WHOLE} 0"),
    setting("demo-video", CONFIG, "image_grid_pinpoints", [], r"image_grid_pinpoints = \[\] .*a list of 1 to 1024"),
    setting("demo-video", CONFIG, "image_grid_pinpoints", [[144]], r"image_grid_pinpoints = \[\[144\]\] .*a list of 2"),
    setting("demo-video", CONFIG, "image_grid_pinpoints", PINPOINTS * 300, r"image_grid_pinpoints = .*\.\.\..*of 1 to 1024"),
    setting("demo-video", CONFIG, "image_grid_pinpoints", "(1x1),...,(9999999x9999999)", r"image_grid_pinpoints = .*\(6x6\)"),
    setting("demo-video", CONFIG, "image_grid_pinpoints", "(3x3),...,(1x1)", r"image_grid_pinpoints = \(\) .*a list of 1"),
    setting("demo-video", CONFIG, "vision_aspect_ratio", "anyres_max_0", r"vision_aspect_ratio = 'anyres_max_0' .*max_9"),
    setting("demo-video", CONFIG, "vision_aspect_ratio", 9, r"vision_aspect_ratio = 9 .*expected a text like"),
    # Values that do not fit together.
    setting("demo", CONFIG, "text_config.num_attention_heads", 5, r"text_config\.num_attention_heads 5 must be .*heads 6"),
    setting("demo", CONFIG, "text_config.num_key_value_heads", 4, r"text_config\.num_attention_heads 6 must be .*heads 4"),
    setting("demo", CONFIG, "text_config.head_dim", 33, r"text_config\.head_dim 33 must be even"),
    setting("demo", CONFIG, "text_config.vocab_size", 500, r"image_token_index 564 is outside .* vocab_size is 500"),
    setting("demo", CONFIG, "vision_config.num_attention_heads", 3, r"vision_config\.hidden_size 128 must be .*heads 3"),
    setting("demo", CONFIG, "vision_config.patch_size", 7, r"vision_config\.image_size 144 must be .*patch_size 7"),
    setting("demo", CONFIG, "vision_feature_layer", -6, r"vision_feature_layer -6 is outside a tower of 4 layers"),
    setting("demo", CONFIG, "image_token_index", 576, r"image_token_index 576 is outside .* vocab_size is 576"),
    setting("demo-video", CONFIG, "video_token_index", 482, r"image and video token have the same id 482"),
    setting("demo-video", CONFIG, "image_grid_pinpoints", [[100, 144]], r"image_grid_pinpoints 100 must be .*image_size 144"),
    setting("qwen2-vl", CONFIG, "rope_scaling.mrope_section", [16, 24], r"rope_scaling\.mrope_section = \[16, 24\] .*of 3"),
    setting("qwen2-vl", CONFIG, "rope_scaling.mrope_section", [16, 24, 16], r"mrope_section \(16, 24, 16\) must sum .* 128"),
    setting("qwen2-vl", CONFIG, "rope_scaling.mrope_section", ["16", "24", "24"], r".*mrope_section = .*whole"),
    setting("qwen2-vl", CONFIG, "vision_config.num_heads", 7, r"vision_config\.embed_dim 1280 must be .* 28"),
    setting("qwen2-vl", CONFIG, "vision_config.hidden_size", 1280, r"vision_config\.hidden_size 1280 must be .*1536"),
    setting("qwen2-vl", CONFIG, "image_token_id", 151936, r"image_token_id 151936 is outside .* vocab_size is 151936"),
    # The ends of an answer.
    setting("demo", GENERATION, "eos_token_id", "2", rf"eos_token_id = '2' .*{WHOLE} 0 .*or a list"),
    setting("demo", GENERATION, "eos_token_id", ["</s>"], r"eos_token_id = \['</s>'\] .*or a list"),
    setting("demo", GENERATION, "eos_token_id", [], r"eos_token_id = \[\] .*or a list of 1 to 64"),
    setting("demo", GENERATION, "eos_token_id", -7, r"eos_token_id = -7 .*"),
    setting("demo", GENERATION, "eos_token_id", [2, None], r"eos_token_id = \[2, None\] .*"),
    setting("demo", GENERATION, "eos_token_id", False, r"eos_token_id = False .*"),
    setting("demo", GENERATION, "eos_token_id", 576, r"eos_token_id 576 is outside .* vocab_size is 576"),
    setting("qwen2-vl", GENERATION, "eos_token_id", [151645, 999999], r"eos_token_id 999999 is outside .* 151936"),
    # Pictures.
    setting("demo", PREPROCESSOR, "image_mean", None, r"image_mean = None .*a list of 3, each a number from 0 to 1"),
    setting("demo", PREPROCESSOR, "image_mean", 0.5, r"image_mean = 0\.5 .*a list of 3"),
    setting("demo", PREPROCESSOR, "image_mean", [0.5, 0.5], r"image_mean = \[0\.5, 0\.5\] .*a list of 3"),
    setting("demo", PREPROCESSOR, "image_mean", ["a", "b", "c"], r"image_mean = \['a', 'b', 'c'\] .*a list of 3"),
    setting("demo", PREPROCESSOR, "image_std", [float("inf")] * 3, r"image_std = \[inf, inf, inf\] .*from 0\.001"),
    setting("demo", PREPROCESSOR, "image_std", [0.5, 0.0, 0.5], r"image_std = \[0\.5, 0\.0, 0\.5\] .*from 0\.001"),
    setting("demo", PREPROCESSOR, "image_std", [0.5, float("nan"), 0.5], r"image_std = \[0\.5, nan, 0\.5\] .*each a number"),
    setting("demo", PREPROCESSOR, "size", [144, 144, 3], rf"size = \[144, 144, 3\] .*{WHOLE} 1 .*or a JSON object"),
    setting("demo", PREPROCESSOR, "size", {"shortest_edge": "144"}, r"size\.shortest_edge = '144' .*"),
    setting("demo", PREPROCESSOR, "do_normalize", "yes", r"do_normalize = 'yes' .*False, True"),
    setting("demo", PREPROCESSOR, "rescale_factor", -1, rf"rescale_factor = -1 .*{NUMBER}"),
    setting("demo", PREPROCESSOR, "resample", "bicubic", rf"resample = 'bicubic' .*{WHOLE} 0 to 5"),
    setting("qwen2-vl", PREPROCESSOR, "min_pixels", "3136", rf"min_pixels = '3136' .*{WHOLE} 1"),
    setting("qwen2-vl", PREPROCESSOR, "min_pixels", 2**31, rf"min_pixels = 2147483648 .*{WHOLE} 1"),
    setting("qwen2-vl", PREPROCESSOR, "merge_size", 0, rf"merge_size = 0 .*{WHOLE} 1"),
    setting("qwen2-vl", "video_preprocessor_config.json", "max_pixels", -1, rf"max_pixels = -1 .*{WHOLE} 1"),
    setting("qwen2-vl", "processor_config.json", "video_processor", 5, r"video_processor = 5 .*a JSON object"),
    setting("qwen2-vl", "processor_config.json", "video_processor.patch_size", "14", r"video_processor\.patch_size = '14'"),
    # Tokens.
    setting("demo", "tokenizer_config.json", "bos_token", 5, r"bos_token = 5 .*expected a text"),
    setting("demo", "tokenizer_config.json", "bos_token", {"x": 1}, r"bos_token\.content = None .*expected a text"),
    setting("demo", "tokenizer_config.json", "eos_token", ["</s>"], r"eos_token = \['</s>'\] .*expected a text"),
    setting("demo", "special_tokens_map.json", "eos_token", {"content": 2}, r"eos_token\.content = 2 .*expected a text"),
    # Files that hold no settings at all.
    *[
        contents("demo", file, content, message)
        for file in (CONFIG, GENERATION, PREPROCESSOR, "tokenizer_config.json")
        for content, message in (
            (b"", "is not valid JSON"),
            (b'{"model_type": "llava"', "is not valid JSON"),
            (b"[" * 200_000, "nested too deeply"),
            (b'{"a":' * 200_000, "nested too deeply"),
            (b"[]", "must hold a JSON object, got list"),
            (b"null", "must hold a JSON object, got NoneType"),
            (b'\xef\xbb\xbf{"model_type": "llava"}', "is not valid JSON: Unexpected UTF-8 BOM"),
            (b'{"model_type": "llav\xe4"}', "is not valid JSON: 'utf-8' codec can't decode byte 0xe4"),
            ('{"model_type": "llava"}'.encode("utf-16"), "is not valid JSON: 'utf-8' codec"),
            (b'{"size": 1, "size": 2}', "one object has 2 entries named 'size'; keep one of them"),
            (b'{"size": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        )
    ],
]  # fmt: skip


def config_of_more_layers(folder: Path) -> object:
    """The most layers that config.json may say, where the weights hold twelve."""
    write_model(folder, "demo", with_weights=True)
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(changed(content, "text_config.num_hidden_layers", 1024)))
    return load(folder)


def index_of(content: object) -> Callable[[Path], object]:
    """A checkpoint in shards, whose index holds this."""

    def attempt(folder: Path) -> object:
        write_model(folder, "demo")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        return load(folder)

    return attempt


NO_MAP = r"index\.json has no weight_map \(tensor name -> file name\)"
WEIGHTS_ROWS = [
    BadInput("an index without a map", index_of({"metadata": {}}), NO_MAP),
    BadInput("an index with a list", index_of({"weight_map": ["model-00001-of-00001.safetensors"]}), NO_MAP),
    BadInput("an index with a number", index_of({"weight_map": {"lm_head.weight": 1}}), NO_MAP),
    BadInput("an index with null", index_of({"weight_map": {"lm_head.weight": None}}), NO_MAP),
    BadInput("an index with an endless name", index_of({"weight_map": {"lm_head.weight": "x" * 5000}}), NO_MAP),
    BadInput("an index that is a list", index_of([]), r"index\.json must hold a JSON object, got list; download it again"),
    BadInput("layers not stored", config_of_more_layers, r"config\.json says num_hidden_layers 1024, .* 12 decoder layers"),
]
BAD_INPUTS = [*SETTINGS, *WEIGHTS_ROWS]


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=[bad.name for bad in BAD_INPUTS])
def test_a_bad_input_ends_in_one_line_that_says_what_is_wrong(bad: BadInput, tmp_path: Path) -> None:
    with pytest.raises(REPORTED) as caught:
        bad.attempt(tmp_path)
    message = str(caught.value)
    assert re.search(bad.message, message), message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("model", ["demo", "demo-video", "qwen2-vl"])
def test_the_folders_that_are_changed_load_unchanged(model: str, tmp_path: Path) -> None:
    write_model(tmp_path, model, with_weights=True)
    if model == "qwen2-vl":
        with pytest.raises(FileNotFoundError, match="no tokenizer"):  # everything before the tokenizer is accepted
            load(tmp_path)
    else:
        load(tmp_path)
