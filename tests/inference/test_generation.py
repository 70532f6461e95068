"""Requests to answers with a tiny LLaVA: the tokens of transformers' own processor and generate, in any batch."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, PATCH_SIZE, official_names, tiny_reference, tiny_tokenizer, write_processing_files
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tiny import changed_prompt, one_prompt, tiny_decoder
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule, TokenDropper, V2Drop
from nanovlm_v2drop.dropping.schedule import OutOfReach
from nanovlm_v2drop.inference import (
    Answer,
    Chat,
    NotFinite,
    NothingDropped,
    Prefilled,
    Sampling,
    decode_tokens,
    decode_until,
    generate,
    generation,
    prefill,
    stream,
)
from nanovlm_v2drop.loading.zoo import VisionLanguageModel, load
from nanovlm_v2drop.processing.prompts import Request

NEW_TOKENS = 12
SCHEDULE = DropSchedule({1: 0.5, 3: 0.3, 4: 0.0})  # of 36 vision tokens: 18, 5, 1


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


REQUESTS = {
    "one picture": Request(text="What colour is the digit?", images=[picture(0)]),
    "two pictures": Request(text="Is <image> the same as <image> ?", images=[picture(1), picture(2, 40, 70)]),
    "text only": Request(text="yes or no?"),
}
PROMPTS = {  # as the hub's template writes them
    "one picture": "USER: <image>\nWhat colour is the digit? ASSISTANT:",
    "two pictures": "USER: Is <image> the same as <image> ? ASSISTANT:",
    "text only": "USER: yes or no? ASSISTANT:",
}
ONLY_DROP = [name for name in DROPPERS if not DROPPERS[name].merges]
every_request = pytest.mark.parametrize("name", REQUESTS)


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' tiny LLaVA with attention so sharp that every picture gets an answer of its own."""
    model = tiny_reference(tiny_tokenizer())
    for name, parameter in model.named_parameters():
        parameter.mul_(3 if "q_proj" in name else 1)
    return model


@pytest.fixture(scope="module")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `reference`."""
    folder = tmp_path_factory.mktemp("sharp-llava")
    reference.config.save_pretrained(folder)
    write_processing_files(folder, tiny_tokenizer())
    save_file(official_names(reference.state_dict()), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VisionLanguageModel:
    return load(folder, template="hub")


def official_inputs(folder: Path, name: str, image_aspect_ratio: str) -> Any:
    """input_ids and pixel_values by transformers' processor; with do_pad off its pictures are CLIP's."""
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    pictures = module.LlavaImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_pad=image_aspect_ratio == "pad",
    )
    processor = transformers.LlavaProcessor(
        pictures,
        transformers.AutoTokenizer.from_pretrained(folder),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return processor(text=PROMPTS[name], images=list(REQUESTS[name].images) or None, return_tensors="pt")


def official_answer(reference: Any, inputs: Any, eos_token_id: int) -> list[int]:
    """Greedy tokens of transformers' generate, without the prompt."""
    sequences = reference.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos_token_id, pad_token_id=0
    )
    return sequences[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "crop"])
@every_request
def test_greedy_answers_equal_those_of_transformers(name: str, image_aspect_ratio: str, folder: Path, reference: Any) -> None:
    vlm = load(folder, template="hub", image_aspect_ratio=image_aspect_ratio)
    inputs = official_inputs(folder, name, image_aspect_ratio)
    (answer,) = generate(vlm, [REQUESTS[name]], max_new_tokens=NEW_TOKENS)
    assert answer.token_ids == official_answer(reference, inputs, eos_token_id=2)
    assert len(answer.token_ids) == NEW_TOKENS
    assert answer.text == vlm.tokenizer.decode(answer.token_ids).strip()


def test_answers_depend_on_the_picture_on_how_it_became_square_and_on_what_is_dropped(folder: Path) -> None:
    answers = []
    for image_aspect_ratio in ("pad", "crop"):
        vlm = load(folder, template="hub", image_aspect_ratio=image_aspect_ratio)
        for request in (REQUESTS["one picture"], Request(text=REQUESTS["one picture"].text, images=[picture(7)])):
            answers += [generate(vlm, [request], dropper, max_new_tokens=NEW_TOKENS)[0] for dropper in (None, V2Drop(SCHEDULE))]
    assert len({tuple(answer.token_ids) for answer in answers}) == len(answers) == 8


def test_an_answer_ends_with_the_same_end_of_sequence_token_as_in_transformers(
    vlm: VisionLanguageModel, folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (free,) = generate(vlm, list(REQUESTS.values())[:1], max_new_tokens=NEW_TOKENS)
    ending = free.token_ids[4]
    monkeypatch.setattr(vlm.model, "config", dataclasses.replace(vlm.config, eos_token_ids=(1, ending)))
    (answer,) = generate(vlm, list(REQUESTS.values())[:1], max_new_tokens=NEW_TOKENS)
    inputs = official_inputs(folder, "one picture", "pad")
    assert answer.token_ids == official_answer(reference, inputs, eos_token_id=ending)
    assert answer.token_ids[-1] == ending
    assert len(answer.token_ids) <= 5


def as_plain(answer: Answer) -> tuple[str, list[int], list[tuple[int, list[int]]]]:
    return answer.text, answer.token_ids, [(layer, kept.tolist()) for layer, kept in answer.kept]


def make(method: str) -> TokenDropper:
    """At a third of one picture's tokens, or at the floor of a method that cannot drop so many from pictures."""
    try:
        schedule = DROPPERS[method].schedule_for(12, 36, 6)
    except OutOfReach as error:
        schedule = error.floor
    return DROPPERS[method](schedule)


@pytest.mark.filterwarnings("ignore:dycoke dropped nothing")
@pytest.mark.parametrize("method", ["dense", *DROPPERS])
def test_a_batch_of_different_lengths_gives_each_request_the_answer_that_it_gets_alone(
    method: str, vlm: VisionLanguageModel
) -> None:
    requests = [*REQUESTS.values(), Request(text="colour?", images=[picture(3)])]
    dropper = None if method == "dense" else make(method)
    alone = [as_plain(generate(vlm, [request], dropper, max_new_tokens=NEW_TOKENS)[0]) for request in requests]
    for order in (slice(None), slice(None, None, -1)):
        together = generate(vlm, requests[order], dropper, max_new_tokens=NEW_TOKENS)
        assert [as_plain(answer) for answer in together] == alone[order]


@pytest.mark.filterwarnings("ignore:dycoke dropped nothing")
@pytest.mark.parametrize("method", ONLY_DROP)
def test_every_answer_tells_the_vision_tokens_that_its_schedule_kept(method: str, vlm: VisionLanguageModel) -> None:
    dropper = make(method)
    answers = generate(vlm, list(REQUESTS.values()), dropper, max_new_tokens=1)
    for answer, arriving in zip(answers, (36, 72, 0), strict=True):
        entering = dropper.schedule.vision_tokens_per_layer(arriving, vlm.config.text_config.num_hidden_layers)
        assert [(layer, len(kept)) for layer, kept in answer.kept] == [(layer, entering[layer]) for layer in dropper.schedule]
        for (_, first), (_, second) in zip(answer.kept, answer.kept[1:], strict=False):
            assert set(second.tolist()) <= set(first.tolist()) <= set(range(arriving))


def test_an_answer_without_a_dropper_tells_of_no_drop_point(vlm: VisionLanguageModel) -> None:
    (answer,) = generate(vlm, [REQUESTS["one picture"]], max_new_tokens=1)
    assert answer.kept == []


@pytest.fixture(scope="module")
def wordy(folder: Path) -> VisionLanguageModel:
    """The same model without the byte tokens, which in random order are no text."""
    vlm = load(folder, template="hub")
    head = vlm.model.language_model.lm_head
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    head.weight[[vlm.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]] = 0
    return vlm


@pytest.mark.parametrize("dropper", [None, V2Drop(SCHEDULE)], ids=["dense", "v2drop"])
@every_request
def test_streamed_pieces_join_to_the_answer(name: str, dropper: V2Drop | None, wordy: VisionLanguageModel) -> None:
    (answer,) = generate(wordy, [REQUESTS[name]], dropper, max_new_tokens=NEW_TOKENS)
    pieces = list(stream(wordy, REQUESTS[name], dropper, max_new_tokens=NEW_TOKENS))
    assert "".join(pieces) == answer.text
    assert len(pieces) > 1


characters = st.sampled_from(["é", "日", "🙂", "\n", "  ", "</s>", "digit"])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(characters, min_size=1, max_size=6), cut=st.integers(0, 3), ends=st.booleans())
@example(parts=["no", "🙂"], cut=2, ends=False)  # the last character is not whole
@example(parts=["no", "🙂"], cut=2, ends=True)
@example(parts=["é", "  ", "</s>", "no"], cut=0, ends=False)
def test_a_stream_shows_characters_when_they_are_whole_and_in_the_end_all_that_there_is(
    parts: list[str], cut: int, ends: bool, vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_ids = vlm.tokenizer.encode("no".join(parts))[1:]
    token_ids = token_ids[: max(len(token_ids) - cut, 1)] + [vlm.config.eos_token_ids[0]] * ends
    with monkeypatch.context() as patch:
        patch.setattr(generation, "decode_tokens", lambda *_: iter([[token] for token in token_ids]))
        patch.setattr(generation, "prefill", lambda *_, **__: Prefilled(torch.empty(0), None))
        request = REQUESTS["text only"]
        (answer,) = generate(vlm, [request], max_new_tokens=len(token_ids))
        pieces = list(stream(vlm, request, max_new_tokens=len(token_ids)))
    assert "".join(pieces) == answer.text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces[:-1])


@pytest.mark.parametrize("max_new_tokens", [0, -3])
def test_fewer_than_one_new_token_is_refused(max_new_tokens: int, vlm: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match=f"max_new_tokens {max_new_tokens} must be at least 1"):
        generate(vlm, [REQUESTS["text only"]], max_new_tokens=max_new_tokens)
    with pytest.raises(ValueError, match=f"max_new_tokens {max_new_tokens} must be at least 1"):
        stream(vlm, REQUESTS["text only"], max_new_tokens=max_new_tokens)


def test_more_new_tokens_than_the_context_holds_are_refused_before_memory_is_taken(vlm: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match="max_new_tokens 10,000,000 is above the model's context of 512 tokens"):
        generate(vlm, [REQUESTS["text only"]], max_new_tokens=10_000_000)


# Choosing tokens


def test_a_sequence_ends_at_its_end_of_sequence_token_and_the_others_go_on():
    stream = iter([[5, 2], [6, 7], [2, 8], [9, 9]])
    assert decode_until(stream, (2,), max_new_tokens=10) == [[5, 6, 2], [2]]
    stream = iter([[5, 2], [6, 7]])
    assert decode_until(stream, (2,), max_new_tokens=1) == [[5], [2]]


def test_top_p_never_takes_a_token_outside_the_nucleus():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).log_softmax(-1)
    sampling = Sampling(temperature=1.0, top_p=0.7)
    generator = torch.Generator().manual_seed(0)
    drawn = {int(sampling.choose(logits, generator)) for _ in range(200)}
    assert drawn == {0, 1}


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_a_sampling_setting_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match=r"temperature .* must be >= 0 and finite, and top_p"):
        Sampling(**bad)


# Numbers that are not finite


def half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize("method", ["dense", *DROPPERS])
def test_activations_that_overflow_float16_are_an_error_that_names_it_in_whichever_layer(method: str, layer: int) -> None:
    decoder = tiny_decoder()
    for part in (decoder.layers[layer].mlp.up_proj, decoder.layers[layer].mlp.down_proj):
        part.weight.data *= 3000
    packed, dropper = one_prompt(5, 24, 7), None
    if method != "dense":
        before_decoder = DROPPERS[method].latest_layer == 0
        dropper = DROPPERS[method](DropSchedule({0: 0.5}) if before_decoder else SCHEDULE)
    assert next(decode_tokens(decoder, prefill(decoder, packed, dropper)))  # float32 holds them
    with pytest.raises(NotFinite, match=r"float16.*use another dtype, --dtype bfloat16 or float32"):
        next(decode_tokens(decoder.half(), prefill(decoder, changed_prompt(packed, half), dropper)))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=["greedy", "drawn"])
def test_an_overflow_while_decoding_is_an_error_at_its_token(sampling: Sampling) -> None:
    decoder = tiny_decoder()
    tokens = decode_tokens(decoder, prefill(decoder, one_prompt(5, 24, 7)), sampling)
    (first,) = next(tokens)
    decoder.embed_tokens.weight.data[first] = torch.inf
    with pytest.raises(NotFinite, match=r"the logits are NaN or infinite.*float32 holds any activation of a sound model"):
        next(tokens)


class Counting(TorchFunctionMode):
    """Counts what takes values from a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.taken += func in (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.cpu)
        return func(*args, **(kwargs or {}))


def test_tokens_are_checked_and_read_in_one_go() -> None:
    with Counting() as counting:
        assert generation.read_tokens(torch.tensor([3, 5]), torch.randn(2, 61)) == [3, 5]
    assert counting.taken == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_one_logit_that_is_not_finite_is_enough(value: float, row: int) -> None:
    logits = torch.randn(2, 61, dtype=torch.bfloat16)
    logits[row, 7] = value
    with pytest.raises(NotFinite, match="beyond bfloat16 are infinite: use another dtype, --dtype float32"):
        generation.read_tokens(torch.tensor([3, 5]), logits)


def test_a_model_that_overflows_answers_nothing_and_streams_nothing(folder: Path) -> None:
    vlm = load(folder, dtype="float16")
    for part in (vlm.model.language_model.layers[2].mlp.up_proj, vlm.model.language_model.layers[2].mlp.down_proj):
        part.weight.data *= 3000
    for dropper in (None, V2Drop(SCHEDULE)):
        with pytest.raises(NotFinite, match="float16"):
            generate(vlm, [REQUESTS["one picture"]], dropper)
        with pytest.raises(NotFinite, match="float16"):
            list(stream(vlm, REQUESTS["one picture"], dropper))


# Budgets


def test_a_class_with_a_budget_answers_as_the_dropper_with_the_schedule_solved_for_the_prompt(vlm: VisionLanguageModel) -> None:
    for name, count in (("one picture", 36), ("two pictures", 72)):
        request = [REQUESTS[name]]
        wanted = as_plain(generate(vlm, request, V2Drop(V2Drop.schedule_for(count / 2, count, 6)), max_new_tokens=4)[0])
        assert as_plain(generate(vlm, request, V2Drop, retain=0.5, max_new_tokens=4)[0]) == wanted
        assert as_plain(generate(vlm, request, V2Drop, tokens=count / 2, max_new_tokens=4)[0]) == wanted
        pieces = stream(vlm, REQUESTS[name], V2Drop, retain=0.5, max_new_tokens=4)
        assert "".join(pieces) == wanted[0]


@pytest.mark.parametrize("budget", [{"retain": 0.5}, {"tokens": 30}, {"tokens": 50}])
@pytest.mark.parametrize("method", [name for name in DROPPERS if name != "dycoke"])
def test_every_prompt_of_a_batch_gets_the_budget_that_it_gets_alone(
    method: str, budget: dict[str, float], vlm: VisionLanguageModel
) -> None:
    requests = list(REQUESTS.values())
    alone = []
    for request in requests:
        with pytest.warns(NothingDropped) if kept_whole(request, budget) else nullcontext():
            alone.append(as_plain(generate(vlm, [request], DROPPERS[method], **budget, max_new_tokens=4)[0]))
    together = generate(vlm, requests, DROPPERS[method], **budget, max_new_tokens=4)
    assert [as_plain(answer) for answer in together] == alone


def kept_whole(request: Request, budget: dict[str, float]) -> bool:
    return len(request.images) > 0 and budget.get("tokens", 0) > 36 * len(request.images)


def test_a_budget_below_a_methods_floor_is_an_error_that_says_the_floor(vlm: VisionLanguageModel) -> None:
    with pytest.raises(OutOfReach, match=r"a mean of 3 vision tokens is out of reach.* lies between 6.8 and 36"):
        generate(vlm, [REQUESTS["one picture"]], V2Drop, tokens=3)


@pytest.mark.parametrize(
    ("dropper", "budget", "message"),
    [
        ("v2drop", {"retain": 0.5}, r"the dropper is 'v2drop': give a class with a budget, such as DROPPERS\[\"v2drop\"\]"),
        ("v2drop", {}, "the dropper is 'v2drop'"),
        (0.3, {}, "the dropper is 0.3: give a class with a budget"),
        (Path, {"retain": 0.5}, "the dropper is <class 'pathlib.*Path'>"),
        (V2Drop, {}, "V2Drop needs a budget: give retain=1/3 or tokens=192"),
        (V2Drop(SCHEDULE), {"retain": 0.5}, "budgets for a class, such as V2Drop, not for a V2Drop that has its schedule"),
        (None, {"tokens": 5}, "budgets for a class, such as V2Drop, not for no dropper"),
    ],
)
def test_what_is_no_dropper_is_refused_at_once(dropper: Any, budget: dict[str, float], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        generate(None, [], dropper, **budget)  # nothing is prepared
    with pytest.raises(TypeError, match=message):
        stream(None, None, dropper, **budget)


@pytest.mark.parametrize("dropper", ["v2drop", 0.3, V2Drop])
def test_prefill_takes_a_dropper_or_none(dropper: Any) -> None:
    with pytest.raises(TypeError, match="V2Drop"):
        prefill(tiny_decoder(), one_prompt(5, 24, 7), dropper)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"tokens": 5, "retain": 0.5}, "either tokens or retain"),
        ({"retain": 0.0}, "retain 0.0 must be above 0 and at most 1"),
        ({"retain": 1.5}, "retain 1.5 must be"),
        ({"retain": float("nan")}, "retain nan must be"),
        ({"tokens": -1}, "a budget of -1 tokens must be 0 or more"),
        ({"tokens": float("inf")}, "a budget of inf tokens"),
    ],
)
def test_a_budget_out_of_range_is_refused(budget: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(None, [], V2Drop, **budget)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vlm": "demo"}, r"the model is 'demo': give what load returns, as by load\(\"demo\"\)"),
        ({"retain": "0.3"}, "retain is '0.3': give a number, such as retain=1/3"),
        ({"tokens": True}, "tokens is True: give a number, such as tokens=192"),
        ({"max_new_tokens": 5.5}, "max_new_tokens is 5.5: give a whole number, such as 64"),
        ({"sampling": 0.7}, r"sampling is 0.7: give one such as Sampling\(temperature=0.7\)"),
        ({"requests": "What?"}, r"the requests are 'What\?': give a list, such as \[Request\("),
        ({"requests": Request(text="What?")}, r"the requests are Request\(.*: give a list, such as \[Request\("),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_value_and_an_example(
    wrong: dict[str, Any], message: str, vlm: VisionLanguageModel
) -> None:
    given = {"vlm": vlm, "requests": [Request(text="What?")], "dropper": V2Drop, **wrong}
    budget = {} if {"retain", "tokens"} & set(wrong) else {"retain": 0.5}
    with pytest.raises(TypeError, match=message):
        generate(**given, **budget)


def test_a_conversation_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="the model is 'demo': give what load returns"):
        Chat("demo")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"temperature": "0.5"}, {"top_p": None}, {"seed": 0.5}])
def test_a_sampling_setting_of_another_type_is_refused(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(TypeError, match=f"{name} is {value!r}: give a number"):
        Sampling(**wrong)


@pytest.mark.parametrize("ratios", [[3, 0.5], {3: "0.5"}, {"3": 0.5}, None, 0.3])
def test_a_schedule_of_other_things_than_numbers_is_refused(ratios: Any) -> None:
    with pytest.raises(TypeError, match=r"is no schedule: give layers and shares, such as DropSchedule\(\{3: 0.5"):
        DropSchedule(ratios)


def test_a_video_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="the video must be a file or a list of frames, got int"):
        Request(text="What?", video=5)  # type: ignore[arg-type]
