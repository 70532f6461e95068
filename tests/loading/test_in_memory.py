"""A transformers model in memory: its weights are shared, and its logits and prompts stay the same."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwen2vl import qwen2vl_reference, qwen2vl_tokenizer
from test_zoo import picture
from tiny import logits_of

from nanovlm_v2drop.evaluation.fingerprints import held_fingerprint
from nanovlm_v2drop.loading.files import CheckpointError
from nanovlm_v2drop.loading.zoo import load
from nanovlm_v2drop.processing.prompts import Request

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::nanovlm_v2drop.processing.tokenizer.RewrittenTokenizer")


class Settings:
    """What an image processor tells of itself."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        return self.settings


@pytest.fixture(scope="module")
def processor(tiny_llava_folder: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llava_folder)
    images = Settings(**json.loads((tiny_llava_folder / "preprocessor_config.json").read_text()))
    return SimpleNamespace(tokenizer=tokenizer, image_processor=images, chat_template="{{ messages[0].content[0].text }}")


def test_the_weights_are_those_of_the_model(tiny_reference_model: Any, processor: Any) -> None:
    vlm = load(tiny_reference_model, processor=processor)
    theirs = {tensor.data_ptr() for tensor in tiny_reference_model.state_dict().values()}
    ours = [tensor.data_ptr() for tensor in vlm.model.state_dict().values()]
    assert set(ours) <= theirs
    assert len(set(ours)) == len(ours) > 100
    weight = tiny_reference_model.model.language_model.layers[2].mlp.down_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1
        assert vlm.model.language_model.layers[2].mlp.down_proj.weight[0, 0] == weight[0, 0]
        weight[0, 0] -= 1


def test_a_model_in_memory_answers_as_the_folder_that_it_was_saved_to(
    tiny_reference_model: Any, processor: Any, tiny_llava_folder: Path
) -> None:
    request = Request(text="What colour is the digit?", images=[picture(0)])
    shared, folder = load(tiny_reference_model, processor=processor), load(tiny_llava_folder)
    assert shared.template == folder.template == "vicuna_v1"
    assert shared.config == folder.config
    assert torch.equal(shared.image_processor([picture(0)]), folder.image_processor([picture(0)]))
    prompts = [vlm.prepare([Request(prompt="<image></s>", images=request.images)]) for vlm in (shared, folder)]
    logits = [logits_of(vlm.model, packed) for vlm, packed in zip((shared, folder), prompts, strict=True)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert shared.folder is None
    assert shared.name == "LlavaForConditionalGeneration"


def test_the_transformers_model_stays_as_it_was(tiny_reference_model: Any, processor: Any) -> None:
    trainable = torch.nn.Parameter(tiny_reference_model.lm_head.weight)
    before = [parameter.requires_grad for parameter in tiny_reference_model.parameters()]
    load(tiny_reference_model, processor=processor)
    assert [parameter.requires_grad for parameter in tiny_reference_model.parameters()] == before
    assert trainable.requires_grad


def test_the_processors_own_chat_template_can_be_chosen(tiny_reference_model: Any, processor: Any) -> None:
    vlm = load(tiny_reference_model, processor=processor, template="checkpoint")
    assert vlm.template == "chat_template.jinja"
    assert vlm.conversation.write([], ["What?"], ("<image>",)) == "What?"


def test_a_16_bit_model_keeps_its_dtype_and_is_not_repacked(tiny_reference_model: Any, processor: Any) -> None:
    halved = transformers.LlavaForConditionalGeneration(tiny_reference_model.config).bfloat16().eval()
    vlm = load(halved, processor=processor)
    assert vlm.dtype == torch.bfloat16
    theirs = {tensor.data_ptr() for tensor in halved.state_dict().values()}
    assert {tensor.data_ptr() for tensor in vlm.model.state_dict().values()} <= theirs
    assert vlm.prepare([Request(prompt="<image>no", images=[picture(0)])]).inputs_embeds.dtype == torch.bfloat16


def test_tied_embeddings_of_qwen2_vl_are_one_tensor(tmp_path: Path) -> None:
    tokenizer = qwen2vl_tokenizer()
    reference = qwen2vl_reference(tokenizer, tie_word_embeddings=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    held = SimpleNamespace(
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")),
        image_processor=Settings(patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=3136, max_pixels=12845056),
    )
    vlm = load(reference, processor=held)
    embeddings = reference.get_input_embeddings().weight
    assert vlm.model.language_model.lm_head.weight.data_ptr() == embeddings.data_ptr()
    assert vlm.model.language_model.embed_tokens.weight.data_ptr() == embeddings.data_ptr()
    assert vlm.template == "qwen2_vl"
    prompt = "<|vision_start|><|image_pad|><|vision_end|>yes"
    assert vlm.prepare([Request(prompt=prompt, images=[picture(1)])]).vision_counts == (6,)  # 56 x 84 pixels


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no processor": (
        "model",
        {"processor": None},
        r"needs its processor, and NoneType has no tokenizer; pass load\(model, proc",
    ),
    "a tokenizer as processor": ("model", {"processor": "tokenizer"}, "a model in memory needs its processor, and"),
    "another device": ("model", {"device": "meta"}, r"lies on cpu; move it with model\.to\('meta'\) first"),
    "another dtype": ("model", {"dtype": "float16"}, r"in torch\.float32, not in float16; convert it with model\.to\(torch\.f"),
    "int8": ("model", {"dtype": "int8"}, r"is in torch\.float32, not in int8; load a checkpoint folder for that"),
    "other weights": ("model", {"weights": "folder"}, "has its own weights in one process; leave out weights and tensor_par"),
    "several processes": ("model", {"tensor_parallel": 2}, "has its own weights in one process; leave out weights and tensor"),
    "no model": (5, {}, "a model is a name, a folder or a transformers model, not int"),
    "a module without config": (torch.nn.Linear(2, 2), {}, "not Linear"),
    "a name with a processor": ("demo", {}, "a processor belongs to a model in memory; 'demo' comes with its own files"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shared_is_refused(case: str, tiny_reference_model: Any, processor: Any) -> None:
    given, options, message = REFUSED[case]
    options = {"processor": processor, **options}
    if options["processor"] == "tokenizer":
        options["processor"] = processor.tokenizer
    with pytest.raises(ValueError, match=message):
        load(tiny_reference_model if given == "model" else given, **options)


def test_a_model_with_broken_or_scattered_weights_is_refused(tiny_reference_model: Any, processor: Any) -> None:
    spoiled = transformers.LlavaForConditionalGeneration(tiny_reference_model.config)
    with torch.no_grad():
        spoiled.lm_head.weight[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"lm_head\.weight \(model in memory\) has 48 of \d+ values that are not finite"):
        load(spoiled, processor=processor)
    spoiled.lm_head.half()
    with pytest.raises(ValueError, match=r"has torch\.float16 on cpu, torch\.float32 on cpu; move it to one device and dtype"):
        load(spoiled, processor=processor)
    with pytest.raises(ValueError, match=r"has torch\.float32 on meta; move it"):
        load(spoiled.float().to("meta"), processor=processor)


def test_other_weights_in_memory_have_another_fingerprint(tiny_reference_model: Any, processor: Any) -> None:
    tensors = load(tiny_reference_model, processor=processor).model.state_dict()
    same = {name: tensor.clone() for name, tensor in tensors.items()}
    assert held_fingerprint(same) == held_fingerprint(tensors)
    for name in ("language_model.norm.weight", "language_model.lm_head.weight"):
        changed = {**same, name: same[name] * 1.01}
        assert held_fingerprint(changed) != held_fingerprint(tensors), name
