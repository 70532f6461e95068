"""Every method on every family as a whole, tower and all: pictures, several of them, and videos, packed in one batch."""

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import llava_next
import nanovlm
import onevision
import pytest
import qwen2_5_vl
import qwen2vl
import qwen3_vl
import smolvlm
import torch
from tiny import META, NoWaiting
from tiny_methods import every_method
from tiny_methods import make as make_at

from nanovlm_v2drop import save_quantised
from nanovlm_v2drop.dropping import DROPPERS, TokenDropper
from nanovlm_v2drop.inference import Prefilled, decode_one_token, initial_state, prefill
from nanovlm_v2drop.loading.zoo import VisionLanguageModel, load
from nanovlm_v2drop.models.linear_int8 import Int8Linear, int8_obstacle
from nanovlm_v2drop.processing.prompts import Request

LLAVA_VIDEO = {"mm_newline_position": "grid", "mm_spatial_pool_mode": "average"}
REQUESTS = {
    "llava-onevision": [
        Request("What happens?", video=onevision.frames(4)),
        Request("<video>\nIs this\n<image> in it?", images=[onevision.picture(300, 200)], video=onevision.frames(3)),
        Request("Which?", images=[onevision.picture(300, 500), onevision.picture(60, 40)], video=onevision.frames(5)),
    ],
    "qwen2-vl": [
        Request("What digit?", video=qwen2vl.clip(8, 84, 56)),
        Request("In <video> or <image> yes?", images=[qwen2vl.picture(84, 56)], video=qwen2vl.clip(4, 56, 84)),
        Request("digit", images=[qwen2vl.picture(140, 56), qwen2vl.picture(60, 120)], video=qwen2vl.clip(5, 84, 90)),
    ],
}
REQUESTS["qwen2.5-vl"] = REQUESTS["qwen2-vl"]
REQUESTS["qwen3-vl"] = REQUESTS["qwen2-vl"]
REQUESTS["smolvlm"] = [
    Request("What digit?", video=smolvlm.clip(4)),
    Request("In <video> or <image> yes?", images=[smolvlm.picture(9, 40)], video=smolvlm.clip(5)),
    Request("digit", images=[smolvlm.picture(60, 10), smolvlm.picture(90, 20)], video=smolvlm.clip(8)),
]
REQUESTS["nanovlm"] = [
    Request("What digit?", images=[smolvlm.picture(70, 50)]),
    Request("In <image> yes?", images=[smolvlm.picture(20, 31)]),
    Request("digit", images=[smolvlm.picture(60, 40), smolvlm.picture(90, 20)]),
]
# LLaVA-1.6 on Mistral, whose frequencies follow the length of each prompt.
REQUESTS["mistral, dynamic"] = [
    Request("What digit?", images=[llava_next.picture(60, 60)]),
    Request("In <image> yes?", images=[llava_next.picture(7, 9)]),
    Request("digit", images=[llava_next.picture(100, 40), llava_next.picture(90, 61)]),
]
REQUESTS["llava-video"] = REQUESTS["llava-onevision"]
every_family = pytest.mark.parametrize("family", REQUESTS)


def make(name: str) -> TokenDropper:
    """DyCoke with room for the pictures and first frames, which stay whole."""
    return make_at(name, share=0.9 if name == "dycoke" else None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VisionLanguageModel]:
    tokenizer = onevision.onevision_tokenizer()
    reference = onevision.onevision_reference(tokenizer)
    tensors = onevision.onevision_names(reference.state_dict())
    folders: dict[str, Path] = {name: tmp_path_factory.mktemp(name) for name in REQUESTS}
    for name in ("llava-onevision", "llava-video"):
        onevision.write_onevision_folder(folders[name], reference, tensors, tokenizer)
    config = folders["llava-video"] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **LLAVA_VIDEO}))
    tokenizer = qwen2vl.qwen2vl_tokenizer()
    qwen2vl.write_qwen2vl_folder(folders["qwen2-vl"], qwen2vl.qwen2vl_reference(tokenizer), tokenizer)
    qwen2_5_vl.write_qwen2_5_vl_folder(folders["qwen2.5-vl"], qwen2_5_vl.qwen2_5_vl_reference(tokenizer), tokenizer)
    qwen3_vl.write_qwen3_vl_folder(folders["qwen3-vl"], qwen3_vl.qwen3_vl_reference(tokenizer), tokenizer)
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 128}
    mistral = llava_next.llava_next_reference("Mistral", num_hidden_layers=6, sliding_window=None, **dynamic)
    llava_next.write_llava_next_folder(folders["mistral, dynamic"], mistral)
    tokenizer = smolvlm.smollm2_tokenizer()
    smolvlm.write_smolvlm_folder(folders["smolvlm"], smolvlm.smolvlm_reference(tokenizer), tokenizer)
    tokenizer = smolvlm.smollm2_tokenizer(())
    settings = nanovlm.config(tokenizer)
    nanovlm.write_nanovlm_folder(folders["nanovlm"], settings, nanovlm.random_tensors(settings), tokenizer)
    return {name: load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def prefilled(models: dict[str, VisionLanguageModel]):
    """Prefill of the requests of a family by a method, together and one by one; the tower runs once."""

    @cache
    def packed(family: str):
        vlm, requests = models[family], REQUESTS[family]
        return vlm.prepare(requests), [vlm.prepare([request]) for request in requests]

    def by_method(family: str, name: str) -> tuple[Prefilled, list[Prefilled]]:
        decoder, (together, alone) = models[family].model.language_model, packed(family)
        return prefill(decoder, together, make(name)), [prefill(decoder, one, make(name)) for one in alone]

    return by_method


@every_family
@every_method
def test_a_packed_batch_drops_and_answers_as_its_requests_one_by_one(name, family, prefilled, models) -> None:
    together, alone = prefilled(family, name)
    decoder, token = models[family].model.language_model, torch.tensor([5])
    logits = torch.cat([one.logits for one in alone])
    scale = 1e-4 * float(logits.abs().max())
    torch.testing.assert_close(together.logits, logits, atol=scale, rtol=0)
    for index, one in enumerate(alone):
        for (_, sequences), (_, (kept,)) in zip(together.kept, one.kept, strict=True):
            assert torch.equal(sequences[index], kept)
    decoded = torch.cat([decode_one_token(decoder, token, one.cache) for one in alone])
    torch.testing.assert_close(decode_one_token(decoder, token.expand(len(alone)), together.cache), decoded, atol=scale, rtol=0)


@every_family
@every_method
def test_each_layer_gets_what_the_schedule_says_and_all_text(name, family, prefilled, models) -> None:
    together, _ = prefilled(family, name)
    vlm, schedule = models[family], make(name).schedule
    num_layers = vlm.config.text_config.num_hidden_layers
    for index, request in enumerate(REQUESTS[family]):
        token_ids, media = vlm.tokens_and_media(request)
        vision = sum(medium.num_tokens for medium in media)
        entering = schedule.vision_tokens_per_layer(vision, num_layers)
        if name == "dycoke" and not vlm.config.takes_video:
            entering = [vision] * num_layers  # DyCoke thins out the frames of videos and leaves pictures whole
        assert [seqlens[index] for seqlens in together.cache.seqlens] == [len(token_ids) - vision + count for count in entering]
        for layer, sequences in together.kept:
            numbers = sequences[index].tolist()
            assert numbers == sorted(set(numbers) & set(range(vision)))
            assert len(numbers) == entering[layer] or DROPPERS[name].merges


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize("name", ["visionzip", "tome"])
def test_patches_that_are_kept_before_the_decoder_keep_their_places_in_the_grid(name, family, models) -> None:
    packed = models[family].prepare(REQUESTS[family])
    before = initial_state(packed)
    with torch.no_grad():
        after = make(name)(before)
    for (start, end), (first, last) in zip(before.spans, after.spans, strict=True):
        numbers, positions = after.vision_indices[first:last], after.position_ids[:, first:last]
        vision = packed.position_ids[:, start:end][:, packed.vision_mask[start:end]]
        assert positions[:, numbers >= 0].tolist() == vision[:, numbers[numbers >= 0]].tolist()
        places = [tuple(place) for place in vision.T.tolist()]
        rows = [places.index(tuple(place)) for place in positions[:, numbers != -1].T.tolist()]
        assert rows == sorted(set(rows))


@every_family
def test_towers_splice_and_prefill_never_wait_for_the_device(family, models) -> None:
    vlm = models[family]
    far = replace(vlm, model=copy.deepcopy(vlm.model).to(META, torch.bfloat16))
    prompts, media = zip(*map(far.tokens_and_media, REQUESTS[family]), strict=True)
    with NoWaiting(), torch.no_grad():
        packed = far.model.pack(prompts, media, (0,) * len(prompts))
        logits = [prefill(far.model.language_model, packed, make(name)).logits for name in DROPPERS]
    assert {each.device for each in [packed.inputs_embeds, packed.position_ids, packed.vision_mask, *logits]} == {META}


@pytest.mark.skipif(int8_obstacle(torch.device("cpu")) is not None, reason="no int8 on this processor")
@every_family
def test_with_int8_weights_the_projector_stays_in_floats_and_a_saved_copy_answers_alike(family, models, tmp_path):
    quantised = load(models[family].folder, dtype="int8")
    layers = {name: module for name, module in quantised.model.named_modules() if hasattr(module, "in_features")}
    floats = {name for name, layer in layers.items() if not isinstance(layer, Int8Linear)}
    assert floats == {name for name in layers if not name.startswith(("vision_tower.", "visual.blocks.", "language_model."))}
    assert floats
    save_quantised(quantised, tmp_path / "copy")
    requests = REQUESTS[family]
    answers = [prefill(vlm.model.language_model, vlm.prepare(requests)) for vlm in (quantised, load(tmp_path / "copy"))]
    assert torch.equal(answers[0].logits, answers[1].logits)
