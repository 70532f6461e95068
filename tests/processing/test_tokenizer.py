"""Tokenizers: two formats that must agree with each other and with transformers."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from llama import IMAGE_TOKEN_ID, PAD_TOKEN_ID, SPECIAL_TOKENS, VOCAB_SIZE, llama_tokenizer, train_sentencepiece
from tokenizers import Tokenizer, pre_tokenizers

from nanovlm_v2drop.processing.tokenizer import RewrittenTokenizer, load_tokenizer

PROBES = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "two  three   spaces",
    "line\nbreak\n\n\ttab\r\n",
    "naïve café 東京 привет",
    "emoji 🙂👩‍👩‍👧 and unseen ∮ 𝔘",
    "typed ▁ underscore and <0x0A> byte",
    "12345 + 678",
    "nul \0 byte",
    "<image>",
    "<image>\nWhat is this?",
    "USER: <image>\nWhat? ASSISTANT:",
    "<image><image> <image>x<pad>y",
    "a</s><s> b<unk>c",
    "<imag> <image > < image>",
]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece()


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory: pytest.TempPathFactory, model: bytes) -> Path:
    folder = tmp_path_factory.mktemp("json")
    llama_tokenizer(model).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory, model: bytes) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": IMAGE_TOKEN_ID, "<pad>": PAD_TOKEN_ID}))
    return folder


@pytest.fixture(scope="module")
def from_json(json_folder: Path):
    return load_tokenizer(json_folder)


@pytest.fixture(scope="module")
def from_sentencepiece(sentencepiece_folder: Path):
    return load_tokenizer(sentencepiece_folder)


@pytest.fixture(scope="module")
def official(json_folder: Path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(json_folder)


@pytest.mark.parametrize("text", PROBES)
def test_both_formats_give_the_official_ids(text, from_json, from_sentencepiece, official):
    assert from_json.encode(text) == official.encode(text)
    assert from_sentencepiece.encode(text) == official.encode(text)


@pytest.mark.parametrize("text", PROBES)
def test_both_formats_decode_as_the_official_tokenizer(text, from_json, from_sentencepiece, official):
    token_ids = official.encode(text)
    expected = official.decode(token_ids, skip_special_tokens=True)
    assert from_json.decode(token_ids) == expected
    assert from_sentencepiece.decode(token_ids) == expected


pieces = st.sampled_from([*SPECIAL_TOKENS, " ", "  ", "▁", "\n", "What", "picture", "🙂", "東", "<0x41>"]) | st.text(max_size=8)


@given(text=st.lists(pieces, max_size=8).map("".join))
@settings(max_examples=300, deadline=None)
def test_both_formats_give_equal_ids_for_any_text(text, from_json, from_sentencepiece):
    assert from_sentencepiece.encode(text) == from_json.encode(text)


@given(token_ids=st.lists(st.integers(0, PAD_TOKEN_ID + 5), max_size=12))
@settings(max_examples=300, deadline=None)
def test_both_formats_decode_any_ids_equally(token_ids, from_json, from_sentencepiece):
    said = [token_id for token_id in token_ids if 2 < token_id < VOCAB_SIZE]
    assume(said[:1] != byte_tokens(from_json, " "))  # no text begins with this token; only tokenizer.json's decoder drops it
    assert from_sentencepiece.decode(token_ids) == from_json.decode(token_ids)


@given(text=st.text().filter(lambda text: not any(special in text for special in SPECIAL_TOKENS)))
@settings(max_examples=100, deadline=None)
def test_decode_returns_the_text_that_was_encoded(text, from_json, from_sentencepiece):
    assert from_sentencepiece.decode(from_json.encode(text)) == text.replace("▁", " ")


def test_word_after_a_special_token_gets_its_prefix_again(from_json, from_sentencepiece):
    prefix = from_json.token_to_id("▁")
    for tokenizer in (from_json, from_sentencepiece):
        assert tokenizer.encode("<image>\nWhat")[:4] == [1, IMAGE_TOKEN_ID, prefix, tokenizer.token_to_id("<0x0A>")]


def test_special_tokens_and_padded_rows_leave_no_trace_in_the_text(from_json, from_sentencepiece):
    for tokenizer in (from_json, from_sentencepiece):
        token_ids = [*tokenizer.encode("red square"), IMAGE_TOKEN_ID, PAD_TOKEN_ID, 2, PAD_TOKEN_ID + 60]
        assert tokenizer.decode(token_ids) == "red square"


def test_both_formats_know_the_same_tokens(from_json, from_sentencepiece, official):
    for tokenizer in (from_json, from_sentencepiece):
        assert len(tokenizer) == len(official) == VOCAB_SIZE + 2
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (official.bos_token_id, official.eos_token_id)
        assert {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS} == SPECIAL_TOKENS
        assert tokenizer.token_to_id("no such token") is None


def test_special_tokens_default_to_llamas_where_the_folder_names_none(tmp_path, json_folder):
    (tmp_path / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_special_token_set_to_null_is_absent(tmp_path, json_folder):
    (tmp_path / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<pad>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, PAD_TOKEN_ID)


def test_cutting_and_padding_stored_in_the_file_are_ignored(tmp_path, model, from_json):
    tokenizer = llama_tokenizer(model)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "What is shown in the picture?"
    assert load_tokenizer(tmp_path).encode(text) == from_json.encode(text)


# Folders


def test_original_layout_gets_its_image_token_from_the_caller(tmp_path, model, from_json):
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = load_tokenizer(tmp_path, {"<image>": IMAGE_TOKEN_ID})
    assert tokenizer.encode("a <image>\nb") == from_json.encode("a <image>\nb")
    assert len(tokenizer) == VOCAB_SIZE + 1


def test_original_layout_without_an_image_token_id_is_refused(tmp_path, model):
    (tmp_path / "tokenizer.model").write_bytes(model)
    with pytest.raises(ValueError, match="does not know <image>; pass the config's vision_tokens"):
        load_tokenizer(tmp_path)


def test_json_without_an_image_token_takes_the_callers_as_the_next_id(tmp_path, model):
    tokenizer = json.loads(llama_tokenizer(model).to_str())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_tokenizer(tmp_path).token_to_id("<image>") is None
    assert IMAGE_TOKEN_ID in load_tokenizer(tmp_path, {"<image>": IMAGE_TOKEN_ID}).encode("a <image>")
    with pytest.raises(ValueError, match=f"is token {IMAGE_TOKEN_ID}, but the model's config says 500"):
        load_tokenizer(tmp_path, {"<image>": 500})


@pytest.mark.parametrize("folder", ["json_folder", "sentencepiece_folder"])
def test_image_token_id_that_disagrees_with_the_folder_is_refused(folder, request):
    folder = request.getfixturevalue(folder)
    assert load_tokenizer(folder, {"<image>": IMAGE_TOKEN_ID}).token_to_id("<image>") == IMAGE_TOKEN_ID
    with pytest.raises(ValueError, match=f"is token {IMAGE_TOKEN_ID}, but the model's config says 7"):
        load_tokenizer(folder, {"<image>": 7})


@pytest.mark.parametrize("taken_id", [300, 0, -200])
def test_image_token_cannot_take_an_ordinary_tokens_id(tmp_path, model, taken_id):
    (tmp_path / "tokenizer.model").write_bytes(model)
    with pytest.raises(ValueError, match=f"token id {taken_id} cannot stand for <image>: ids 0 to {VOCAB_SIZE - 1}"):
        load_tokenizer(tmp_path, {"<image>": taken_id})


def test_json_is_preferred_over_sentencepiece(tmp_path, json_folder):
    (tmp_path / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(b"never read")
    assert load_tokenizer(tmp_path).encode("a")[0] == 1


def test_folder_without_a_tokenizer_is_an_error_that_names_the_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for tokenizer\.json and tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"not a tokenizer"])
def test_broken_tokenizer_file_is_an_error_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read .*{name}"):
        load_tokenizer(tmp_path, {"<image>": IMAGE_TOKEN_ID})


# Answers that end inside a character


def byte_tokens(tokenizer: Any, text: str) -> list[int]:
    return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


@pytest.mark.parametrize("missing", [1, 2])
def test_an_answer_cut_inside_a_character_keeps_the_finished_ones(missing, from_json, from_sentencepiece):
    for tokenizer in (from_json, from_sentencepiece):
        token_ids = [*tokenizer.encode("square"), *byte_tokens(tokenizer, "東京")[:-missing]]
        assert tokenizer.decode(token_ids) == "square東" + "�" * (3 - missing)


@given(token_ids=st.lists(st.integers(3, PAD_TOKEN_ID) | st.integers(3, 258), max_size=14))
@settings(max_examples=300, deadline=None)
def test_a_longer_answer_continues_the_text_of_a_shorter_one(token_ids, from_json, from_sentencepiece):
    for tokenizer in (from_json, from_sentencepiece):
        whole = tokenizer.decode(token_ids)
        for length in range(len(token_ids)):
            assert whole.startswith(tokenizer.decode(token_ids[:length]).rstrip("�")), length


# What transformers 5 writes


@pytest.fixture(scope="module")
def rewritten_folder(json_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers 5 saves after it has read `json_folder` as a LLaMA tokenizer."""
    transformers = pytest.importorskip("transformers")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("rewritten")
    shutil.copytree(json_folder, source, dirs_exist_ok=True)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False, **names}))
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    pre_tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")).pre_tokenizer
    if not isinstance(pre_tokenizer, pre_tokenizers.Metaspace):
        pytest.skip("this version of transformers leaves the file as it was")
    return folder


def test_a_rewritten_tokenizer_alone_is_used_with_a_warning(rewritten_folder: Path, from_json):
    with pytest.warns(
        RewrittenTokenizer, match=r"tokenizer\.json has the form that transformers 5 writes.*tokenizer\.model beside"
    ):
        rewritten = load_tokenizer(rewritten_folder)
    text = "<image>\nWhat"
    assert len(rewritten.encode(text)) == len(from_json.encode(text)) - 1  # the space after the picture is lost


@pytest.mark.parametrize("text", PROBES)
def test_a_tokenizer_model_beside_a_rewritten_file_gives_the_ids_of_the_original_one(
    text, rewritten_folder: Path, model: bytes, tmp_path: Path, from_json
):
    shutil.copytree(rewritten_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.model").write_bytes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_tokenizer(tmp_path, {"<image>": IMAGE_TOKEN_ID})
    assert tokenizer.encode(text) == from_json.encode(text)
    assert len(tokenizer) == len(from_json)


def test_an_original_file_needs_no_warning_and_is_preferred_over_a_tokenizer_model(json_folder: Path, tmp_path: Path):
    shutil.copytree(json_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.model").write_bytes(b"never read")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(tmp_path)


# legacy


def without_prefix_after_specials(model: bytes) -> Tokenizer:
    """transformers' rule for legacy=False: only the first word of a text gets a space before it."""
    tokenizer = llama_tokenizer(model)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def tokenizer_with(folder: Path, model: bytes, settings: dict[str, Any]):
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder, {"<image>": IMAGE_TOKEN_ID, "<pad>": PAD_TOKEN_ID})


LEGACY_PROBES = [
    "USER: Hi ASSISTANT: Yes</s>USER: What? ASSISTANT:",
    "a</s> b</s>\nc",
    "a </s>",
    "a<s>  b",
    "two  spaces</s> x",
]


@pytest.mark.parametrize("text", LEGACY_PROBES)
def test_what_follows_an_end_token_inside_a_prompt_follows_the_folders_legacy(text, model: bytes, tmp_path: Path, from_json):
    assert (
        tokenizer_with(tmp_path, model, {"legacy": False}).encode(text) == without_prefix_after_specials(model).encode(text).ids
    )
    for settings_of_old in ({"legacy": True}, {"legacy": None}, {}):
        assert tokenizer_with(tmp_path, model, settings_of_old).encode(text) == from_json.encode(text)


def test_a_picture_is_followed_by_a_space_whatever_legacy_says(model: bytes, tmp_path: Path, from_json):
    text = "USER: <image>\nWhat? ASSISTANT:"
    assert tokenizer_with(tmp_path, model, {"legacy": False}).encode(text) == from_json.encode(text)


# Settings that cannot be right

BAD_SETTINGS: dict[str, tuple[str, str, Any, str]] = {
    "number as bos": ("json", "tokenizer_config.json", {"bos_token": 5}, r"bos_token = 5 is not supported; expected a text"),
    "object without content": (
        "json",
        "tokenizer_config.json",
        {"bos_token": {"x": 1}},
        r"bos_token\.content = None is not supported; expected a text",
    ),
    "list as eos": ("json", "tokenizer_config.json", {"eos_token": ["</s>"]}, r"eos_token = \['</s>'\] is not supported"),
    "number in content": (
        "json",
        "special_tokens_map.json",
        {"eos_token": {"content": 2}},
        r"eos_token\.content = 2 is not supported",
    ),
    "no object": ("json", "tokenizer_config.json", [1], r"tokenizer_config\.json must hold a JSON object"),
    "word as legacy": (
        "model",
        "tokenizer_config.json",
        {"legacy": "yes"},
        r"legacy = 'yes' is not supported; expected one of False, True",
    ),
    "text as id": (
        "model",
        "added_tokens.json",
        {"<pad>": "441"},
        r"added_tokens\.json: the file = \{'<pad>': '441'\} is not supported; expected .* each value a whole number",
    ),
    "boolean as id": ("model", "added_tokens.json", {"<pad>": True}, r"the file = \{'<pad>': True\} is not supported"),
    "fraction as id": ("model", "added_tokens.json", {"<pad>": 441.0}, r"the file = \{'<pad>': 441\.0\} is not supported"),
    "null as id": ("model", "added_tokens.json", {"<pad>": None}, r"the file = \{'<pad>': None\} is not supported"),
    "negative id": ("model", "added_tokens.json", {"<pad>": -1}, r"the file = \{'<pad>': -1\} is not supported"),
    "taken id": ("model", "added_tokens.json", {"<pad>": 300}, r"token id 300 cannot stand for <pad>.* use a larger one"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_setting_that_cannot_be_right_is_refused_by_name(case, json_folder: Path, model: bytes, tmp_path: Path):
    kind, file, content, message = BAD_SETTINGS[case]
    source = (json_folder / "tokenizer.json").read_bytes() if kind == "json" else model
    (tmp_path / f"tokenizer.{kind}").write_bytes(source)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path, {"<image>": IMAGE_TOKEN_ID})
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_settings_that_are_not_utf8_are_one_line(file, json_folder: Path, tmp_path: Path):
    shutil.copytree(json_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes('{"bos_token": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{file} is not valid JSON") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
