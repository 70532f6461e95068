"""Loading by name and by folder, downloads from a Hub of our own, and requests that become packed inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from nanovlm_v2drop.loading import specs, zoo
from nanovlm_v2drop.loading.specs import MODELS, ModelSpec
from nanovlm_v2drop.loading.zoo import VisionLanguageModel, WeightsUnavailable, load
from nanovlm_v2drop.processing.prompts import Request, build_prompt

ROOT = Path(__file__).parents[2]
REPO = "llava-hf/llava-1.5-7b-hf"


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def vlm(tiny_llava_folder: Path) -> VisionLanguageModel:
    return load(tiny_llava_folder)


@pytest.fixture
def empty_weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository without any weights, so that tests do not depend on what lies in this one."""
    monkeypatch.setattr(specs, "WEIGHTS_FOLDER", tmp_path / "weights")
    return tmp_path / "weights"


def link(folder: Path, target: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(target)


def test_a_folder_loads_under_its_own_name(vlm: VisionLanguageModel, tiny_llava_folder: Path) -> None:
    assert vlm.name == tiny_llava_folder.name
    assert vlm.template == "vicuna_v1"
    assert (vlm.device, vlm.dtype) == (torch.device("cpu"), torch.float32)
    assert vlm.config.vision_config.num_patches == 36
    assert vlm.image_processor.image_aspect_ratio == "pad"
    assert vlm.model.language_model.attention == "sdpa"  # what "auto" is on a CPU


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_may_be_given_by_name(dtype: Any, tiny_llava_folder: Path) -> None:
    assert load(tiny_llava_folder, dtype=dtype).dtype == torch.bfloat16


def test_a_named_model_is_read_from_a_local_copy_of_its_checkpoint(tiny_llava_folder: Path) -> None:
    vlm = load("llava-1.5-7b", weights=tiny_llava_folder, image_aspect_ratio="crop", template="hub")
    assert (vlm.name, vlm.template, vlm.image_processor.image_aspect_ratio) == ("llava-1.5-7b", "hub", "crop")


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_below_weights_comes_before_the_hub(name: str, empty_weights_folder: Path, tiny_llava_folder: Path) -> None:
    link(empty_weights_folder / name, tiny_llava_folder)
    assert load(name).name == name


def test_a_folder_of_the_same_name_counts_only_with_a_config(
    empty_weights_folder: Path, tiny_llava_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(WeightsUnavailable):
        load("demo")
    link(empty_weights_folder / "demo", tiny_llava_folder)
    assert load("demo").template == "vicuna_v1"


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "name": (
        {"model": "llava-9"},
        "unknown model 'llava-9'; choose one of: demo, demo-video, llava-1.5-7b, llava-1.5-13b, .*nanovlm-450m;",
    ),
    "dtype": ({"dtype": "int3"}, "unknown dtype 'int3'; choose one of: auto, float32, bfloat16, float16, float64, int8, int4"),
    "device": ({"device": "gpu"}, "device 'gpu' cannot be used here: .*; use cpu"),
    "attention": ({"attention": "flash"}, "unknown attention back end 'flash'"),
    "flash on a CPU": ({"attention": "flash-attn"}, "'flash-attn' cannot run: it needs a CUDA device, not cpu"),
    "template": ({"template": "chatml"}, "unknown template 'chatml'; choose one of: hub, mistral_instruct, .*vic"),
    "aspect ratio": ({"image_aspect_ratio": "anyres"}, "unknown image_aspect_ratio 'anyres'; choose one of: pad, crop"),
    "aspect ratio of another model": (
        {"model": "demo-video", "image_aspect_ratio": "crop"},
        "image_aspect_ratio 'crop' is a choice of LLaVA-1.5 alone; leave it out",
    ),
    "folder and weights": ({"weights": "elsewhere"}, "or give the folder without other weights"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_wrong_option_fails_before_any_weight_is_read(
    option: str, tiny_llava_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = OPTIONS[option]
    monkeypatch.setattr(zoo, "load_model", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=message):
        load(**{"model": tiny_llava_folder, **arguments})


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; is it a checkpoint folder\?"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json"):
        load("llava-1.5-7b", weights=tmp_path / "nowhere")


def test_a_folder_without_tokenizer_is_named(
    copy_without_weights: Callable[..., Path], tiny_hub_tensors: dict[str, Tensor]
) -> None:
    folder = copy_without_weights("tokenless")
    save_file(tiny_hub_tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*tokenless.*tokenizer\.json and tokenizer\.model"):
        load(folder)


def test_prepare_packs_text_and_pictures_in_order(vlm: VisionLanguageModel) -> None:
    requests = [
        Request(text="What colour? <image> And now? <image>", images=[picture(0), picture(1)]),
        Request(text="Is it?"),
        Request(prompt="USER: <image>\nWhat? ASSISTANT:", images=[picture(2)]),
    ]
    packed = vlm.prepare(requests)
    assert packed.vision_counts == (72, 0, 36)
    alone = vlm.image_processor([picture(2)])
    features = vlm.model.encode_images(alone)[0]
    assert packed.seqlens[1] == len(vlm.tokenizer.encode(build_prompt(requests[1])))
    last = packed.inputs_embeds[-packed.seqlens[2] :]
    torch.testing.assert_close(last[packed.vision_mask[-packed.seqlens[2] :]], features)


def test_prepared_embeddings_equal_those_of_transformers(vlm: VisionLanguageModel, tiny_reference_model: Any) -> None:
    request = Request(text="What colour is the digit?", images=[picture(0)])
    token_ids = torch.tensor([vlm.token_ids(request)])
    captured = {}
    decoder = tiny_reference_model.model.language_model
    hook = decoder.register_forward_pre_hook(lambda _, __, named: captured.update(named), with_kwargs=True)
    tiny_reference_model(input_ids=token_ids, pixel_values=vlm.image_processor([picture(0)]))
    hook.remove()
    torch.testing.assert_close(vlm.prepare([request]).inputs_embeds, captured["inputs_embeds"][0], rtol=1e-5, atol=1e-5)


def test_pictures_may_be_files(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    from_file = vlm.prepare([Request(text="What?", images=[tmp_path / "a.png"])])
    from_memory = vlm.prepare([Request(text="What?", images=[picture(0)])])
    assert torch.equal(from_file.inputs_embeds, from_memory.inputs_embeds)
    assert from_file.seeds == from_memory.seeds


def test_a_seed_depends_on_the_request_alone(vlm: VisionLanguageModel, tiny_llava_folder: Path) -> None:
    requests = [
        Request(text="What?", images=[picture(0)]),
        Request(text="What?", images=[picture(1)]),
        Request(text="Which?", images=[picture(0)]),
        Request(text="What?"),
    ]
    seeds = vlm.prepare(requests).seeds
    assert len(set(seeds)) == 4
    assert vlm.prepare(requests[::-1]).seeds == seeds[::-1]
    assert load(tiny_llava_folder, dtype="bfloat16").prepare(requests[1:2]).seeds == seeds[1:2]


def test_prepared_inputs_are_in_the_dtype_of_the_model(tiny_llava_folder: Path) -> None:
    packed = load(tiny_llava_folder, dtype="bfloat16").prepare([Request(text="What?", images=[picture(0)])])
    assert packed.inputs_embeds.dtype == torch.bfloat16
    assert not packed.inputs_embeds.requires_grad


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(vlm: VisionLanguageModel) -> None:
    longest = Request(prompt="<s>" * 510 + "no", images=[])
    assert vlm.prepare([longest]).seqlens == (512,)
    with pytest.raises(ValueError, match=r"has 549 tokens \(36 of them from pictures and frames\), .* holds 512; shorten"):
        vlm.prepare([longest, Request(prompt="<image>" + "<s>" * 512, images=[picture(0)])])


def test_a_prompt_that_ends_with_a_picture_is_refused(vlm: VisionLanguageModel) -> None:
    picture = Image.new("RGB", (42, 42))
    with pytest.raises(ValueError, match="the prompt ends with a picture"):
        vlm.prepare([Request(prompt="USER: <image>", images=[picture])])


def test_a_token_without_embedding_is_refused(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    size = vlm.config.text_config.vocab_size
    monkeypatch.setattr(vlm.tokenizer, "encode", lambda _: [1, size - 1])
    assert vlm.prepare([Request(text="What?")]).seqlens == (2,)
    monkeypatch.setattr(vlm.tokenizer, "encode", lambda _: [1, size])
    with pytest.raises(ValueError, match=rf"the tokenizer gives token {size}, but .* has embeddings for {size}; use the"):
        vlm.prepare([Request(text="What?")])


def test_no_request_and_a_video_are_refused(vlm: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match="no request given"):
        vlm.prepare([])
    with pytest.raises(ValueError, match=r"takes pictures only, not a video; give its frames as images"):
        vlm.prepare([Request(text="What?", video="clip.mp4")])


def test_a_missing_shipped_model_says_what_to_do(empty_weights_folder: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=r"weights/demo is not there; work in a clone.*--weights DIR") as caught:
        load("demo")
    assert "\n" not in str(caught.value)


def test_a_new_model_is_one_entry(empty_weights_folder: Path, tiny_llava_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link(empty_weights_folder / "mine", tiny_llava_folder)
    monkeypatch.setitem(MODELS, "mine", ModelSpec("mine", "a model of one's own", "me/mine", template="hub"))
    assert load("mine").template == "hub"
