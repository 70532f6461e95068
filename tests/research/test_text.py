"""Questions about texts, and how answers to them are read and counted."""

from pathlib import Path

import pytest
import torch
from text_models import text_reference, write_text_folder

from nanovlm_v2drop import Droppable, TextModel, load_decoder
from nanovlm_v2drop.cli import choices
from nanovlm_v2drop.evaluation.records import append_records, remove_cut_line
from nanovlm_v2drop.research.text import (
    CONTINUED,
    FIRST,
    UNDROPPED,
    TextAnswer,
    TextRun,
    answers,
    dropper_of,
    prompt_of,
    read_answers,
    rows_of_evidence,
    shares,
    summarise_text,
    text_table,
)
from nanovlm_v2drop.research.text_questions import ITEMS, JOBS, TEXTS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    reference = text_reference("llama", max_position_embeddings=16384)
    return load_decoder(write_text_folder(tmp_path_factory.mktemp("text"), reference))


@pytest.mark.parametrize("texts", TEXTS)
def test_a_question_is_the_same_whenever_it_is_asked_for(texts: str) -> None:
    questions = TEXTS[texts](FIRST, 6)
    assert questions[4:] == TEXTS[texts](FIRST + 4, 2)
    assert len({question.text for question in questions}) == 6


@pytest.mark.parametrize("texts", ["retrieval", "paraphrased", "long"])
def test_the_evidence_stands_once_in_the_text_and_holds_the_answer(texts: str) -> None:
    for question in TEXTS[texts](FIRST, 30):
        assert question.text.count(question.evidence) == 1
        assert question.answer.strip() in question.evidence
        assert question.text.count(question.answer.strip()) == 1


def test_a_paraphrased_question_has_no_noun_of_its_text() -> None:
    for question in TEXTS["paraphrased"](FIRST, 60):
        named = {word.strip(".?") for word in question.question.split()} & {word.strip(".?") for word in question.text.split()}
        assert named <= {"does", "for", "the", "In", "is", "of", "one", "not"}
    assert not set(ITEMS) & set(ITEMS.values())
    assert not set(JOBS) & set(JOBS.values())


def test_the_rows_of_the_evidence_are_its_tokens(model: TextModel) -> None:
    for question in TEXTS["retrieval"](FIRST, 3):
        rows, ((start, end),) = rows_of_evidence(model, question), prompt_of(model, question).spans
        token_ids = prompt_of(model, question).token_ids[start:end]
        assert model.tokenizer.decode(token_ids[rows.start : rows.stop]).strip() == question.evidence


@pytest.mark.parametrize("method", sorted(set(choices.text_methods()) - set(UNDROPPED)))
def test_every_method_meets_the_budget_on_texts_of_any_length(method: str, model: TextModel) -> None:
    questions = TEXTS["retrieval"](FIRST, 2)
    packed = model.prepare([prompt_of(model, question) for question in questions])
    dropper = dropper_of(model, questions, packed, method, 1 / 2)
    assert shares(model, packed, dropper) == pytest.approx([1 / 2, 1 / 2], abs=1e-3)


def test_losses_and_exact_answers_are_those_of_the_whole_text_read_at_once(model: TextModel) -> None:
    reference = text_reference("llama", max_position_embeddings=16384)
    (question,) = TEXTS["retrieval"](FIRST, 1)
    run = TextRun(("dense", "none"), 1 / 3, 1, 1)
    for (answer,), text in zip(answers(model, run, "retrieval"), (True, False), strict=True):
        prompt = list(prompt_of(model, question, with_text=text).token_ids)
        opening, wanted = model.tokenizer.encode(question.opening), model.tokenizer.encode(question.answer)
        logits = reference(torch.tensor([[*prompt, *opening, *wanted]])).logits[0, -len(wanted) - 1 : -1]
        chances = logits.log_softmax(-1)
        assert answer.nats == pytest.approx(-float(chances.gather(1, torch.tensor(wanted)[:, None]).mean()), abs=1e-4)
        assert answer.exact == (chances.argmax(-1).tolist() == wanted)
        assert answer.tokens == len(prompt)


def test_the_oracle_keeps_the_evidence_and_random_a_part_of_it(model: TextModel) -> None:
    run = TextRun(("oracle", "random", "dense"), 1 / 3, 4, 4)
    left = [[answer.evidence for answer in batch] for batch in answers(model, run, "retrieval")]
    assert left[0] == [1.0] * 4
    assert all(share is not None and 0 < share < 1 for share in left[1])
    assert left[2] == [None] * 4


def test_prose_is_judged_by_its_first_tokens(model: TextModel) -> None:
    (question,) = TEXTS["prose"](FIRST, 1)
    assert len(model.tokenizer.encode(question.answer)) >= CONTINUED
    assert question.answer.startswith(" ")


def answer(method: str, number: int, exact: bool, nats: float) -> TextAnswer:
    return TextAnswer("retrieval", 1 / 3, "price", number, method, 100, 1 / 3, exact, nats, 0.5 if method == "v2drop" else None)


def test_a_summary_pairs_methods_with_dense_by_question(tmp_path: Path) -> None:
    records = [answer("dense", 0, True, 1.0), answer("dense", 1, False, 2.0), answer("none", 1, False, 5.0)]
    records += [answer("none", 0, False, 5.0), answer("v2drop", 1, True, 3.0), answer("v2drop", 0, True, 1.5)]
    rows = {row["method"]: row for row in summarise_text(records)}
    assert rows["v2drop"]["exact_difference"] == 50
    assert rows["v2drop"]["nats_difference"] == pytest.approx(0.75)
    assert rows["v2drop"]["of_the_text"] == pytest.approx(100 * (5 - 2.25) / (5 - 1.5))
    assert "exact_difference" not in rows["dense"]
    assert "| v2drop | 0.333 | 50 | 100.0 [100.0, 100.0] | +50.0 [+0.0, +100.0] |" in text_table(list(rows.values()))
    file = tmp_path / "text.jsonl"
    append_records(file, records)
    with file.open("a") as opened:
        opened.write('{"texts": "retr')  # an interrupted run
    assert read_answers(file) == records
    remove_cut_line(file)
    append_records(file, records[:1])
    assert read_answers(file) == [*records, records[0]]
    file.write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match="holds a line that is no answer to a text"):
        read_answers(file)


def test_a_piece_may_be_droppable_text(model: TextModel) -> None:
    assert Droppable("a") == "a"
    assert model.prompt([Droppable("What"), "?"]).spans[0][0] == 0
