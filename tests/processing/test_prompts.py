"""Prompts and tokenizers: literal templates, and two tokenizer formats that must agree with each other and upstream."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from nanovlm_v2drop.models.vlm import VisionInput
from nanovlm_v2drop.processing.prompts import (
    DEFAULT_TEMPLATE,
    TEMPLATES,
    Request,
    build_prompt,
    encode_prompt,
    load_tokenizer,
)

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is shown in the picture? ASSISTANT: A red square  stands left of a blue circle.",
    "How many circles are there? Answer with one word. 0 1 2 3 4 5 6 7 8 9",
    "Über den Straßen: café, naïve, 東京の空, привет мир.",
] * 4
VOCAB_SIZE = 440
IMAGE_TOKEN_ID, PAD_TOKEN_ID = VOCAB_SIZE, VOCAB_SIZE + 1
SPECIAL_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": IMAGE_TOKEN_ID, "<pad>": PAD_TOKEN_ID}
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


def train_sentencepiece() -> bytes:
    """A LLaMA-like model (the same trainer settings as LLaMA's own), deterministic and tiny."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def merges_of(processor: sentencepiece.SentencePieceProcessor, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first."""
    merges = []
    for piece, token_id in vocabulary.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        merges += [(-processor.get_score(token_id), vocabulary[left], left, right) for left, right in known]
    return [(left, right) for _, _, left, right in sorted(merges)]


def llama_tokenizer(model: bytes) -> Tokenizer:
    """The tokenizer.json that LLaVA-1.5 ships, made for our tiny vocabulary."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {processor.id_to_piece(token_id): token_id for token_id in range(VOCAB_SIZE)}
    merges = merges_of(processor, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer


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


def picture() -> Image.Image:
    return Image.new("RGB", (2, 2))


# Templates


def test_vicuna_prompt_is_the_papers_string():
    assert build_prompt(Request(text="What is this?", images=[picture()])) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is this? ASSISTANT:"
    )


def test_hub_prompt_has_no_system_sentence():
    request = Request(text="What is this?", images=[picture()])
    assert build_prompt(request, "hub") == "USER: <image>\nWhat is this? ASSISTANT:"


def test_default_template_is_in_the_table():
    assert DEFAULT_TEMPLATE == "vicuna_v1"
    assert set(TEMPLATES) == {"vicuna_v1", "hub", "qwen_1_5", "qwen_hub", "qwen2_vl"}


def test_pictures_without_a_place_come_first():
    request = Request(text="Compare.", images=[picture(), picture()])
    assert build_prompt(request, "hub") == "USER: <image>\n<image>\nCompare. ASSISTANT:"


def test_placed_pictures_stay_where_they_are():
    request = Request(text="Is <image> in <image>?", images=(picture(), picture()))
    assert build_prompt(request, "hub") == "USER: Is <image> in <image>? ASSISTANT:"


def test_text_alone_needs_no_picture():
    assert build_prompt(Request(text="Hi"), "hub") == "USER: Hi ASSISTANT:"


def test_templated_prompt_passes_unchanged():
    prompt = "  USER: <image> {braces}\n"
    assert build_prompt(Request(prompt=prompt, images=[picture()])) == prompt


@given(text=st.text(min_size=1).filter(lambda text: text.strip() and "<video>" not in text))
@settings(max_examples=50, deadline=None)
def test_every_text_stands_in_the_prompt_verbatim(text):
    assert text in build_prompt(Request(text=text, images=[picture()] * max(1, text.count("<image>"))))


# Requests that cannot be meant


@pytest.mark.parametrize(("fields", "given"), [({}, "neither"), ({"text": "a", "prompt": "b"}, "both")])
def test_request_takes_exactly_one_of_text_and_prompt(fields, given):
    with pytest.raises(ValueError, match=f"either text or an already templated prompt, got {given}"):
        Request(**fields)


@pytest.mark.parametrize("images", [picture(), "picture.png", None])
def test_request_refuses_a_single_picture(images):
    with pytest.raises(ValueError, match="must be a list of pictures"):
        Request(text="a", images=images)


@pytest.mark.parametrize("blank", ["", "  ", "\n\t"])
@pytest.mark.parametrize("field", ["text", "prompt"])
def test_blank_request_is_refused(field, blank):
    with pytest.raises(ValueError, match="blank"):
        build_prompt(Request(**{field: blank}))


def test_unknown_template_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="'llama'; choose one of: hub, qwen2_vl, qwen_1_5, qwen_hub, vicuna_v1"):
        build_prompt(Request(text="Hi"), "llama")


@pytest.mark.parametrize(("text", "num_images", "counts"), [("<image> a", 0, "1 .* 0"), ("<image>" * 3, 2, "3 .* 2")])
def test_placeholder_count_must_match_the_pictures(text, num_images, counts):
    with pytest.raises(ValueError, match=f"has {counts} pictures .*write one <image> for each"):
        build_prompt(Request(text=text, images=[picture()] * num_images))


# Tokenizers


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


pieces = st.sampled_from([*SPECIAL_TOKENS, " ", "  ", "▁", "\n", "What", "picture", "🙂", "東", "<0x41>"]) | st.text(
    max_size=8
)


@given(text=st.lists(pieces, max_size=8).map("".join))
@settings(max_examples=300, deadline=None)
def test_both_formats_give_equal_ids_for_any_text(text, from_json, from_sentencepiece):
    assert from_sentencepiece.encode(text) == from_json.encode(text)


@given(token_ids=st.lists(st.integers(0, PAD_TOKEN_ID + 5), max_size=12))
@settings(max_examples=300, deadline=None)
def test_both_formats_decode_any_ids_equally(token_ids, from_json, from_sentencepiece):
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


# Prompt to ids


def medium(num_tokens: int) -> VisionInput:
    return VisionInput(torch.zeros(0), ((1, 1, num_tokens),), (1, 1))



def test_each_image_token_is_repeated_once_per_feature(from_json):
    plain = from_json.encode("a <image> b <image>")
    first, second = (index for index, token_id in enumerate(plain) if token_id == IMAGE_TOKEN_ID)
    media = [medium(3), medium(2)]
    expanded, ordered = encode_prompt(from_json, "a <image> b <image>", {IMAGE_TOKEN_ID: media})
    assert ordered == media
    assert expanded == [
        *plain[:first],
        *[IMAGE_TOKEN_ID] * 3,
        *plain[first + 1 : second],
        *[IMAGE_TOKEN_ID] * 2,
        *plain[second + 1 :],
    ]


def test_prompt_without_pictures_is_only_encoded(from_json):
    encoded = encode_prompt(from_json, "USER: Hi ASSISTANT:", {IMAGE_TOKEN_ID: []})
    assert encoded == (from_json.encode("USER: Hi ASSISTANT:"), [])


def test_media_come_in_the_order_of_their_tokens(from_json):
    other_id = from_json.token_to_id("<pad>")
    first, second, video = medium(2), medium(1), medium(4)
    _, ordered = encode_prompt(from_json, "<image> a <pad> b <image>", {IMAGE_TOKEN_ID: [first, second], other_id: [video]})
    assert ordered == [first, video, second]


@pytest.mark.parametrize(
    ("prompt", "tokens_per_image", "counts"), [("a", [4], "0 .* 1"), ("<image> <image>", [4], "2 .* 1")]
)
def test_image_token_count_must_match_the_pictures(from_json, prompt, tokens_per_image, counts):
    with pytest.raises(ValueError, match=f"has {counts.replace(' .* ', ' image or video tokens .* but ')} pictures"):
        encode_prompt(from_json, prompt, {IMAGE_TOKEN_ID: list(map(medium, tokens_per_image))})
