"""Conversations on tiny models of several families: what is kept equals what would be read again, and other ends of a turn."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import official_names, tiny_reference, tiny_tokenizer, write_processing_files
from nanovlm import config as nanovlm_config
from nanovlm import random_tensors, write_nanovlm_folder
from onevision import onevision_names, onevision_reference, onevision_tokenizer, write_onevision_folder
from qwen2vl import clip, picture, qwen2vl_reference, qwen2vl_tokenizer, write_qwen2vl_folder
from safetensors.torch import save_file
from smolvlm import smollm2_tokenizer, smolvlm_reference, write_smolvlm_folder
from tiny import masked_forward

from nanovlm_v2drop import Chat, Request, decode_one_token, generate, load
from nanovlm_v2drop.dropping import DROPPERS, DropSchedule, V2Drop
from nanovlm_v2drop.dropping.dycoke import DyCoke
from nanovlm_v2drop.dropping.fastv import FastV
from nanovlm_v2drop.dropping.schedule import OutOfReach
from nanovlm_v2drop.dropping.tome import ToMe
from nanovlm_v2drop.inference import HISTORIES, ConversationBatch, NotFinite
from nanovlm_v2drop.inference import chat as chat_module
from nanovlm_v2drop.inference.conversation import INTERRUPTED
from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.processing.chat_template import ChatTemplate
from nanovlm_v2drop.processing.prompts import TEMPLATES

SCHEDULE = DropSchedule({1: 0.5, 3: 0.3, 4: 0.0})
QUESTIONS = ("What colour is the digit?", "yes or no?", "What is it?")
PICTURES = (picture(56, 84), picture(70, 40, seed=1))
NEW_TOKENS = 5
KEEP, CUT, RE_PREFILL = HISTORIES


def write_llava(folder: Path) -> Path:
    reference = tiny_reference(tiny_tokenizer())
    reference.config.save_pretrained(folder)
    write_processing_files(folder, tiny_tokenizer())
    save_file(official_names(reference.state_dict()), folder / "model.safetensors")
    return folder


def write_onevision(folder: Path) -> Path:
    reference = onevision_reference(onevision_tokenizer())
    return write_onevision_folder(folder, reference, onevision_names(reference.state_dict()), onevision_tokenizer())


def write_nanovlm(folder: Path) -> Path:
    settings = nanovlm_config(smollm2_tokenizer(()))
    return write_nanovlm_folder(folder, settings, random_tensors(settings), smollm2_tokenizer(()))


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava": write_llava,
    "qwen2-vl": lambda folder: write_qwen2vl_folder(folder, qwen2vl_reference(qwen2vl_tokenizer()), qwen2vl_tokenizer()),
    "onevision": write_onevision,
    "smolvlm": lambda folder: write_smolvlm_folder(folder, smolvlm_reference(smollm2_tokenizer()), smollm2_tokenizer()),
    "nanovlm": write_nanovlm,
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VisionLanguageModel]:
    """A tiny random model of a family, made once."""
    made: dict[str, VisionLanguageModel] = {}

    def model(family: str) -> VisionLanguageModel:
        if family not in made:
            made[family] = load(FAMILIES[family](tmp_path_factory.mktemp(family)))
        return made[family]

    return model


@pytest.fixture
def llava(models: Callable[[str], VisionLanguageModel]) -> VisionLanguageModel:
    """A copy whose parts can be replaced."""
    return dataclasses.replace(models("llava"))


def batch_of(vlm: VisionLanguageModel, dropper: Any = None, history: str = KEEP, size: int = 1) -> ConversationBatch:
    return ConversationBatch(vlm, size, dropper, None, history, NEW_TOKENS)


def turn_of(batch: ConversationBatch, request: Request, answer: list[int]) -> torch.Tensor:
    """The logits of the last token of a question, which then gets this answer."""
    prefilled, schedule = batch.prefill([request])
    decoder = batch.vlm.model.language_model
    for token in answer[:-1]:
        decode_one_token(decoder, torch.tensor([token]), prefilled.cache)
    batch.answered([answer], schedule, prefilled)
    return prefilled.logits[0]


def close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(ours, wanted, atol=3e-5 * float(wanted.abs().max()), rtol=0)


# What is kept and what would be read again


@every_family
def test_a_kept_cache_gives_the_logits_and_answers_of_the_whole_conversation_read_again(
    family: str, models: Callable[[str], VisionLanguageModel]
) -> None:
    vlm = models(family)
    kept, again = batch_of(vlm), batch_of(vlm, history=RE_PREFILL)
    requests = [Request(QUESTIONS[0], images=[PICTURES[0]]), Request(QUESTIONS[1]), Request(QUESTIONS[2])]
    for number, request in enumerate(requests):
        answer = [5 + number, 9, 11]
        close(turn_of(kept, request, answer), turn_of(again, request, answer))
        assert kept.open[0][1].token_ids == again.open[0][1].token_ids
        assert kept.note == again.note == ""
        assert (kept.reused[0] > 0) == (number > 0)
        assert again.reused == [0]
    chats = [Chat(vlm, history=history, max_new_tokens=NEW_TOKENS) for history in (KEEP, RE_PREFILL)]
    for request in requests:
        answers = [chat.ask(request.text or "", request.images) for chat in chats]
        assert answers[0].token_ids == answers[1].token_ids
    for turn in chats[0].turns[1:]:
        assert turn.prefilled_tokens < turn.cached_tokens


@every_family
def test_an_int8_cache_that_is_kept_gives_logits_near_those_of_a_float_cache(
    family: str, models: Callable[[str], VisionLanguageModel]
) -> None:
    vlm, found = models(family), []
    decoder = vlm.model.language_model
    for decoder.kv_cache_dtype in ("int8", "auto"):
        batch = batch_of(vlm)
        requests = [Request(QUESTIONS[0], images=[PICTURES[0]]), Request(QUESTIONS[1]), Request(QUESTIONS[2])]
        found.append(torch.stack([turn_of(batch, request, [5, 9, 11]) for request in requests]))
        assert batch.reused[0] > 0
        assert batch.cache is not None
        assert batch.cache.is_int8 == (decoder.kv_cache_dtype == "int8")
    assert torch.equal(found[0][0], found[1][0])  # a first prompt reads no cache
    assert 0 < (found[0] - found[1]).norm() < 0.05 * found[1].norm()


@every_family
def test_a_conversation_that_is_read_again_answers_as_one_prompt_with_all_turns(
    family: str, models: Callable[[str], VisionLanguageModel]
) -> None:
    vlm = models(family)
    chat = Chat(vlm, V2Drop, retain=0.5, history=RE_PREFILL, max_new_tokens=NEW_TOKENS)
    chat.ask(QUESTIONS[0], PICTURES[:1])
    answer = chat.ask(QUESTIONS[1])
    earlier = chat.conversation.transcripts[0].turns[:1]
    prompt = vlm.conversation.write([], [QUESTIONS[1]], vlm.config.marks, earlier)
    (wanted,) = generate(vlm, [Request(prompt=prompt, images=PICTURES[:1])], V2Drop, retain=0.5, max_new_tokens=NEW_TOKENS)
    assert (answer.text, answer.token_ids) == (wanted.text, wanted.token_ids)
    assert [(layer, rows.tolist()) for layer, rows in answer.kept] == [(layer, rows.tolist()) for layer, rows in wanted.kept]


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "smolvlm"])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_picture_in_a_later_turn_is_read_and_dropped_over_the_kept_cache(
    family: str, dropped: bool, models: Callable[[str], VisionLanguageModel]
) -> None:
    vlm = models(family)
    batch, answer = batch_of(vlm, V2Drop(SCHEDULE) if dropped else None), [5, 9, 11]
    first, schedule = batch.prefill([Request(QUESTIONS[0], images=[PICTURES[0]])])
    batch.answered([answer[:1]], schedule, first)
    second, _ = batch.prefill([Request(QUESTIONS[1], images=[PICTURES[1]])])
    written = batch.open[0][1]
    assert batch.note == ""
    assert batch.reused[0] > 0
    packed = vlm.model.pack([written.token_ids], [written.media], (0,))
    count = written.media[0].num_tokens
    pairs = zip(first.kept, second.kept, strict=True)
    kept = [(layer, [torch.cat([one, other + count])]) for (layer, (one,)), (_, (other,)) in pairs]
    assert len(kept) == 3 * dropped
    close(second.logits[0], masked_forward(vlm.model.language_model, packed, kept)[-1])


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
@pytest.mark.parametrize("name", ["v2drop", "fastv", "clse"])
def test_a_later_question_sees_what_is_left_of_the_picture_in_each_layer(
    family: str, name: str, models: Callable[[str], VisionLanguageModel]
) -> None:
    vlm, answer = models(family), [5]
    for cut in (False, True):
        batch = batch_of(vlm, DROPPERS[name](SCHEDULE), CUT if cut else KEEP)
        first, schedule = batch.prefill([Request(QUESTIONS[0], images=[PICTURES[0]])])
        prompt_length, (own,) = len(batch.open[0][1].token_ids), first.kept[-1][1]
        batch.answered([answer], schedule, first)
        second, _ = batch.prefill([Request(QUESTIONS[1])])
        written = batch.open[0][1]
        text = len(written.token_ids) - written.media[0].num_tokens
        lengths = [lengths[0] for lengths in second.cache.seqlens]
        assert lengths[-1] == text + len(own)
        assert (lengths[0] == len(written.token_ids)) != cut
        packed = vlm.model.pack([written.token_ids[:prompt_length]], [written.media], (0,))
        wanted = masked_forward(vlm.model.language_model, packed, first.kept, written.token_ids[prompt_length:], cut=cut)
        close(second.logits[0], wanted[-1])


def test_transformers_reads_the_second_turn_over_its_own_cache_with_the_same_logits(llava: VisionLanguageModel) -> None:
    official = tiny_reference(tiny_tokenizer())
    batch = batch_of(llava)
    ours = [turn_of(batch, Request(QUESTIONS[0], images=[PICTURES[0]]), [5])]
    first = batch.open[0][1]
    ours.append(turn_of(batch, Request(QUESTIONS[1]), [5]))
    second = batch.open[0][1]
    out = official(input_ids=torch.tensor([first.token_ids]), pixel_values=first.media[0].pixel_values, use_cache=True)
    close(ours[0], out.logits[0, -1])
    rest = second.token_ids[len(first.token_ids) :]
    assert second.token_ids[: len(first.token_ids)] == first.token_ids
    out = official(input_ids=torch.tensor([rest]), past_key_values=out.past_key_values, use_cache=True)
    close(ours[1], out.logits[0, -1])


def test_transformers_qwen2_vl_reads_a_video_of_the_second_turn_over_its_own_cache(
    models: Callable[[str], VisionLanguageModel],
) -> None:
    vlm, official = models("qwen2-vl"), qwen2vl_reference(qwen2vl_tokenizer())
    batch = batch_of(vlm)
    ours = [turn_of(batch, Request(QUESTIONS[0], images=[PICTURES[0]]), [5])]
    length = len(batch.open[0][1].token_ids)
    ours.append(turn_of(batch, Request(QUESTIONS[1], video=clip(4, 84, 56)), [5]))
    written, past = batch.open[0][1], None
    packed = vlm.model.pack([written.token_ids], [written.media], (0,))
    for logits, rows in zip(ours, (slice(0, length), slice(length, None)), strict=True):
        embeds, positions = packed.inputs_embeds[None, rows], packed.position_ids[:, None, rows]
        out = official.model.language_model(inputs_embeds=embeds, position_ids=positions, past_key_values=past, use_cache=True)
        past = out.past_key_values
        close(logits, official.lm_head(out.last_hidden_state[0, -1]))


def test_the_kept_cache_of_a_method_that_reads_no_question_is_what_it_would_choose_again(llava: VisionLanguageModel) -> None:
    for dropper, same in ((V2Drop(SCHEDULE), True), (FastV(DropSchedule({2: 0.3})), False)):
        first, again = ([], [])
        for history, kept in ((KEEP, first), (RE_PREFILL, again)):
            chat = Chat(llava, dropper, history=history, max_new_tokens=NEW_TOKENS)
            answers = [chat.ask(question, PICTURES[:1] if number == 0 else ()) for number, question in enumerate(QUESTIONS)]
            kept += [rows.tolist() for _, rows in answers[0 if history == KEEP else -1].kept]
        assert (first == again) == same


# Several conversations


def test_conversations_of_a_batch_answer_as_each_of_them_alone(llava: VisionLanguageModel) -> None:
    requests = [Request(QUESTIONS[number], images=[PICTURES[number]]) for number in range(2)]
    batch, alone = batch_of(llava, V2Drop(SCHEDULE), size=2), [batch_of(llava, V2Drop(SCHEDULE)) for _ in range(2)]
    answers = [[5], [6, 7, 8]]
    for turn in range(3):
        asked = requests if turn == 0 else [Request(QUESTIONS[(turn + number) % 3]) for number in range(2)]
        prefilled, schedule = batch.prefill(asked)
        for token in ([5, 6], [4, 7]):  # what follows the end of the first answer is of no conversation
            decode_one_token(llava.model.language_model, torch.tensor(token), prefilled.cache)
        batch.answered(answers, schedule, prefilled)
        for own, request, answer, logits in zip(alone, asked, answers, prefilled.logits, strict=True):
            close(logits, turn_of(own, request, answer))


# Cost, forgetting, reading again


def test_cached_and_prefilled_tokens_are_those_of_the_whole_conversation(llava: VisionLanguageModel) -> None:
    chat = Chat(llava, V2Drop, retain=0.5, max_new_tokens=NEW_TOKENS)
    chat.ask(QUESTIONS[0], PICTURES[:1])
    chat.ask(QUESTIONS[1])
    first, second = chat.turns
    assert first.cached_tokens == 0
    assert 36 < first.prefilled_tokens <= second.cached_tokens < first.prefilled_tokens + NEW_TOKENS
    whole = len(chat.conversation.open[0][1].token_ids)
    assert second.cached_tokens + second.prefilled_tokens == whole


def test_to_forget_is_to_ask_anew_about_the_pictures_that_are_in_the_cache(llava: VisionLanguageModel) -> None:
    chat = Chat(llava, V2Drop, retain=0.5, max_new_tokens=NEW_TOKENS)
    chat.ask(QUESTIONS[0], PICTURES[:1])
    chat.ask(QUESTIONS[1])
    chat.forget()
    answer = chat.ask(QUESTIONS[2])
    (wanted,) = generate(llava, [Request(QUESTIONS[2], images=PICTURES[:1])], V2Drop, retain=0.5, max_new_tokens=NEW_TOKENS)
    assert answer.token_ids == wanted.token_ids
    assert [turn.question.text for turn in chat.turns] == [QUESTIONS[2]]
    assert chat.turns[0].cached_tokens > 36 > chat.turns[0].prefilled_tokens
    assert chat.has_media


def test_a_question_without_pictures_begins_a_conversation_that_gets_them_later(llava: VisionLanguageModel) -> None:
    chat = Chat(llava, V2Drop, retain=0.5, max_new_tokens=NEW_TOKENS)
    assert chat.ask(QUESTIONS[1]).kept == []
    assert not chat.has_media
    answer = chat.ask(QUESTIONS[0], PICTURES[:1])
    assert answer.kept
    assert chat.turns[1].cached_tokens > 0


def test_a_template_that_writes_earlier_turns_otherwise_is_prefilled_again_and_says_so(llava: VisionLanguageModel) -> None:
    form = "{{ message['role'] }}: {% for part in message['content'] %}{{ part.text or '<image>' }}{% endfor %} "
    counting = "{{ messages | length }} {% for message in messages %}" + form + "{% endfor %}assistant:"
    llava.conversation = ChatTemplate(Path("chat_template.jinja"), counting, {}, TEMPLATES["hub"])
    chat = Chat(llava, max_new_tokens=NEW_TOKENS)
    chat.ask(QUESTIONS[0], PICTURES[:1])
    answer = chat.ask(QUESTIONS[1])
    assert chat.turns[1].note == "the earlier turns or their pictures are written in another way now"
    assert chat.turns[1].cached_tokens == 0
    again = Chat(llava, history=RE_PREFILL, max_new_tokens=NEW_TOKENS)
    again.ask(QUESTIONS[0], PICTURES[:1])
    assert again.ask(QUESTIONS[1]).token_ids == answer.token_ids


def test_a_template_that_writes_an_answer_otherwise_costs_the_tokens_from_there_on(llava: VisionLanguageModel) -> None:
    form = "{{ message['role'] }}: {% for part in message['content'] %}{{ part.text or '<image>' }}{% endfor %} "
    shouting = "{% for message in messages %}" + form + "{{ '!' * (messages | length) }}{% endfor %}assistant:"
    llava.conversation = ChatTemplate(Path("chat_template.jinja"), shouting, {}, TEMPLATES["hub"])
    kept, again = batch_of(llava), batch_of(llava, history=RE_PREFILL)
    for number, question in enumerate(QUESTIONS):
        request = Request(question, images=PICTURES[:1] if number == 0 else ())
        close(turn_of(kept, request, [5, 6]), turn_of(again, request, [5, 6]))
        assert (kept.reused[0] > 36) == (number > 0)


def test_pictures_that_are_no_longer_cut_into_tiles_are_read_again(models: Callable[[str], VisionLanguageModel]) -> None:
    chat = Chat(models("onevision"), max_new_tokens=NEW_TOKENS)
    chat.ask(QUESTIONS[0], PICTURES[:1])
    chat.ask(QUESTIONS[1], PICTURES[1:])  # several pictures have one tile each
    assert chat.turns[1].cached_tokens == 0
    assert "written in another way" in chat.turns[1].note


def test_a_method_that_prunes_while_decoding_keeps_its_cache_until_its_prompt_is_cropped(
    models: Callable[[str], VisionLanguageModel],
) -> None:
    chat = Chat(models("qwen2-vl"), DyCoke, retain=0.6, max_new_tokens=NEW_TOKENS)
    chat.ask(QUESTIONS[0], video=clip(16, 84, 56))
    chat.ask(QUESTIONS[1])
    assert chat.turns[1].cached_tokens > 0
    chat.forget()
    chat.ask(QUESTIONS[2])
    assert (chat.turns[0].cached_tokens, "prunes while decoding" in chat.turns[0].note) == (0, True)


def test_a_method_that_prunes_while_decoding_also_prunes_a_video_of_a_later_turn(
    models: Callable[[str], VisionLanguageModel],
) -> None:
    batch = batch_of(models("qwen2-vl"), DyCoke(DropSchedule({0: 0.6})))
    turn_of(batch, Request(QUESTIONS[0]), [5, 6])
    prefilled, _ = batch.prefill([Request(QUESTIONS[1], video=clip(16, 84, 56))])
    assert prefilled.cache.pruning is not None
    assert (batch.reused, "prunes while decoding" in batch.note) == ([0], True)


# Ends of a turn


def test_streamed_pieces_are_the_answer_and_one_that_is_left_counts_as_far_as_it_was_decoded(
    llava: VisionLanguageModel,
) -> None:
    asked, streamed = (Chat(llava, max_new_tokens=12) for _ in range(2))
    whole = asked.ask(QUESTIONS[0], PICTURES[:1])
    assert "".join(streamed.stream(QUESTIONS[0], PICTURES[:1])) == whole.text
    left = Chat(llava, max_new_tokens=12)
    next(left.stream(QUESTIONS[0], PICTURES[:1]))
    answer = left.ask(QUESTIONS[1])
    begun = left.turns[0].answer.token_ids
    assert 0 < len(begun) < 12
    assert whole.token_ids[: len(begun)] == begun
    assert left.turns[1].cached_tokens > 36
    again = Chat(llava, history=RE_PREFILL, max_new_tokens=12)
    next(again.stream(QUESTIONS[0], PICTURES[:1]))
    assert again.ask(QUESTIONS[1]).token_ids == answer.token_ids


def test_an_interrupt_in_the_middle_of_a_token_frees_the_cache_and_loses_nothing_that_was_said(
    llava: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, decode_tokens = Chat(llava, max_new_tokens=12), chat_module.decode_tokens

    def interrupted(*arguments: Any) -> Any:
        tokens = decode_tokens(*arguments)
        yield next(tokens)
        yield next(tokens)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "decode_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.ask(QUESTIONS[0], PICTURES[:1])
    monkeypatch.undo()
    assert len(chat.turns[0].answer.token_ids) == 2
    chat.ask(QUESTIONS[1])
    assert (chat.turns[1].cached_tokens, chat.turns[1].note) == (0, INTERRUPTED)
    chat.ask(QUESTIONS[2])
    assert (chat.turns[2].cached_tokens > 0, chat.turns[2].note) == (True, "")


@pytest.mark.parametrize(
    ("question", "images", "message"),
    [
        (" ", (), "the request is blank"),
        ("word " * 3000, (), "the prompt has .* but the context of .* holds 512"),
        ("Is <image> that?", (), "the text has 1 <image> but 0 pictures are given"),
        ("What is it?", ("missing.png",), "missing.png"),
    ],
)
def test_a_question_that_cannot_be_asked_leaves_the_conversation_as_it_was(
    question: str, images: tuple[str, ...], message: str, llava: VisionLanguageModel
) -> None:
    chat, twin = (Chat(llava, max_new_tokens=NEW_TOKENS) for _ in range(2))
    for own in (chat, twin):
        own.ask(QUESTIONS[0], PICTURES[:1])
    with pytest.raises((ValueError, OSError), match=message):
        chat.ask(question, images)
    assert len(chat.turns) == 1
    assert chat.ask(QUESTIONS[1]).token_ids == twin.ask(QUESTIONS[1]).token_ids
    assert chat.turns[1].cached_tokens == twin.turns[1].cached_tokens > 0


def test_a_budget_below_the_floor_is_an_error_before_anything_is_said(llava: VisionLanguageModel) -> None:
    chat = Chat(llava, V2Drop, tokens=3)
    with pytest.raises(OutOfReach, match="out of reach"):
        chat.ask(QUESTIONS[0], PICTURES[:1])
    assert chat.turns == []


def test_numbers_that_are_not_finite_end_the_turn_with_an_error(models: Callable[[str], VisionLanguageModel]) -> None:
    vlm = models("llava")
    chat = Chat(vlm, max_new_tokens=NEW_TOKENS)
    chat.ask(QUESTIONS[0], PICTURES[:1])
    weight = vlm.model.language_model.norm.weight
    held = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(NotFinite):
        chat.ask(QUESTIONS[1])
    weight.data.copy_(held)
    chat.ask(QUESTIONS[1])
    assert [turn.question.text for turn in chat.turns] == list(QUESTIONS[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": "forget-it"}, "unknown history 'forget-it'; choose one of: keep-cache, cut-cache, re-prefill"),
        ({"dropper": ToMe(DropSchedule({0: 0.5})), "max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ({"dropper": DROPPERS["sparsevlm"](SCHEDULE), "history": "cut-cache"}, "use it without cut_cache"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options: dict[str, Any], message: str, llava: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match=message):
        Chat(llava, **options)


def test_a_cut_is_made_for_a_copy_of_the_dropper(llava: VisionLanguageModel) -> None:
    for dropper, budget in ((V2Drop(SCHEDULE), {}), (V2Drop, {"retain": 0.5})):
        chat = Chat(llava, dropper, **budget, history=CUT, max_new_tokens=NEW_TOKENS)
        chat.ask(QUESTIONS[0], PICTURES[:1])
        assert len(set(chat.conversation.cache.seqlens)) == 1
        assert not dropper.cut_cache


def test_a_conversation_is_refused_where_tokens_are_decoded_by_a_cuda_graph(
    llava: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava.model.language_model, "cuda_graph", True)
    with pytest.raises(ValueError, match="without a CUDA graph"):
        Chat(llava)


def test_a_ready_prompt_is_no_turn(llava: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match="asked by its text"):
        batch_of(llava).prefill([Request(prompt="USER: Hi ASSISTANT:")])
