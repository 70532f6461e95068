"""Dropping on text: does what V2Drop's paper says of vision tokens hold for the tokens of a text?

    python train_free_eval.py --text

A question stands behind a text, and the tokens of the text may be dropped: all else is kept. Every method has the same mean
number of tokens over the layers. Prefill ends where the answer begins; then the answer's opening and the answer are fed, so no
method sees them while it ranks. An answer is exact where each of its tokens is the most likely one. "nats" is the mean loss of
the answer's tokens, or of the first `CONTINUED` tokens of prose. "of the text" is how much of what the text is worth is left:
0 % is the loss without any text, 100 % that of dense. "evidence kept": of the sentence with the answer, behind the first drop.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ..dropping import DROPPERS, PrefillState, TokenDropper, V2Drop
from ..dropping.budget import Budget, for_batch, shapes_of
from ..dropping.random import Random
from ..dropping.schedule import DropSchedule
from ..evaluation.records import whole_lines
from ..inference import Prefilled, padded_answers, prefill, teacher_forced
from ..loading.text_model import Droppable, TextModel
from ..models.language_model import TextPrompt
from ..models.vlm import PackedInputs
from .question_words import QuestionWords
from .text_questions import TEXTS, TextQuestion
from .theory import mean_interval

FIRST = 20_000  # questions below it were used to choose the method and how answers are read
CONTINUED = 48  # tokens of prose
TIMED, REPEATS = 1200, 3  # tokens of the prompt whose prefill is timed, and how often
HEAD = "Read the text and answer the question.\n\n"
# Without dropping, without any text, the answer's sentence first, and every method that needs no picture.
TEXT_METHODS = (
    "dense", "none", "oracle", "question-words", "clse", "dart", "fastv", "pdrop", "random", "random-grid", "sparsevlm",
    "sparsevlm-plus", "transprune", "v2drop", "v2drop-once", "v2drop-plus",
)  # fmt: skip
UNDROPPED = ("dense", "none")
Row = Mapping[str, Any]


class Oracle(Random):
    """Keep the rows that hold the answer, and of the others a random part; once, where QuestionWords drops."""

    name = "oracle"
    depths, leanest = QuestionWords.depths, QuestionWords.leanest

    def __init__(self, schedule: DropSchedule, evidence: Sequence[range]) -> None:
        super().__init__(schedule)
        self.evidence = evidence

    def score(self, state: PrefillState) -> Tensor:
        scores = super().score(state)
        for (start, end), rows in zip(state.spans, self.evidence, strict=True):
            numbers = state.vision_indices[start:end]
            scores[start:end] += ((numbers >= rows.start) & (numbers < rows.stop)).float()
        return scores


class V2DropOnce(V2Drop):
    """V2Drop with one drop, at its first layer."""

    name = "v2drop-once"
    depths, leanest = V2Drop.depths[:1], (0.0,)


@dataclass(frozen=True)
class TextRun:
    """What is compared: methods of TEXT_METHODS at one budget, on the first `limit` questions of each kind of text."""

    methods: Sequence[str]
    retain: float
    limit: int
    batch_size: int


@dataclass(frozen=True)
class TextAnswer:
    """What one method made of one question.

    `retain`: the budget, as a share of the text's tokens; `share`: the mean share that entered a layer; `evidence`: the share
    of the tokens of the sentence with the answer that were left behind the first drop, None where there is none.
    """

    texts: str
    retain: float
    kind: str
    number: int
    method: str
    tokens: int
    share: float
    exact: bool
    nats: float
    evidence: float | None


def answers(model: TextModel, run: TextRun, texts: str, done: Collection[tuple[str, int]] = ()) -> Iterator[list[TextAnswer]]:
    """The answers of each method to a batch of questions of one name in TEXTS, batch by batch.

    `done`: (method, number of the question) of answers that are there already. Raises OutOfReach where a method cannot drop
    so much.
    """
    questions = TEXTS[texts](FIRST, run.limit)
    for start in range(0, run.limit, run.batch_size):
        for method in run.methods:
            batch = [item for item in questions[start : start + run.batch_size] if (method, item.number) not in done]
            if batch and (method != "oracle" or batch[0].evidence):
                yield answer_batch(model, texts, batch, method, run.retain)


@torch.no_grad()
def answer_batch(
    model: TextModel, texts: str, questions: Sequence[TextQuestion], method: str, retain: float
) -> list[TextAnswer]:
    """One method's answers to questions that go through one packed prefill."""
    prompts = [prompt_of(model, question, with_text=method != "none") for question in questions]
    packed = model.prepare(prompts)
    dropper = dropper_of(model, questions, packed, method, retain)
    opened = [model.encode(question.opening, is_first=False) if question.opening else [] for question in questions]
    wanted = [model.encode(question.answer, is_first=False)[:CONTINUED] for question in questions]
    prefilled = prefill(model.decoder, packed, dropper, max_new_tokens=max(map(len, map(add, opened, wanted))))
    found = evidence_left(model, questions, prefilled)
    losses, exact = read_out(model, prefilled, opened, wanted)
    by_question = zip(questions, prompts, shares(model, packed, dropper), exact, losses, found, strict=True)
    return [
        TextAnswer(texts, retain, question.kind, question.number, method, len(prompt.token_ids), *measured)
        for question, prompt, *measured in by_question
    ]


def prompt_of(model: TextModel, question: TextQuestion, with_text: bool = True) -> TextPrompt:
    """The user's message: what to do, the text, the question."""
    return model.chat([HEAD, *([Droppable(question.text)] if with_text else []), f"\n\n{question.question}"])


def dropper_of(
    model: TextModel, questions: Sequence[TextQuestion], packed: PackedInputs, method: str, retain: float
) -> TokenDropper | None:
    """The method at its budget, for a batch."""
    if method in UNDROPPED:
        return None
    budget, shapes = Budget(retain=retain), shapes_of(packed, model.config.text_config.num_hidden_layers)
    if method == "oracle":
        evidence = [rows_of_evidence(model, question) for question in questions]
        return Oracle(for_batch([budget.schedule(Oracle, shape) for shape in shapes]), evidence)
    own: dict[str, type[TokenDropper]] = {"question-words": QuestionWords, "v2drop-once": V2DropOnce}
    return budget.dropper({**DROPPERS, **own}[method], shapes)


def rows_of_evidence(model: TextModel, question: TextQuestion) -> range:
    """The numbers of the text's tokens that hold the answer."""
    before, _, _ = question.text.partition(question.evidence)
    ends = (before.rstrip(), before + question.evidence)
    return range(*(len(model.encode(text, is_first=False)) if text else 0 for text in ends))


def evidence_left(model: TextModel, questions: Sequence[TextQuestion], prefilled: Prefilled) -> list[float | None]:
    """Of each question, the share of the tokens that hold the answer which the first drop left; None where nothing dropped."""
    if not prefilled.kept or not questions[0].evidence:
        return [None] * len(questions)
    _, kept = prefilled.kept[0]
    evidence = [rows_of_evidence(model, question) for question in questions]
    return [len(set(rows) & set(left.tolist())) / len(rows) for rows, left in zip(evidence, kept, strict=True)]


def read_out(
    model: TextModel, prefilled: Prefilled, opened: Sequence[list[int]], wanted: Sequence[list[int]]
) -> tuple[list[float], list[bool]]:
    """Mean loss of the wanted tokens of each sequence, and whether each of them is the most likely one."""
    fed = [[*opening, *answer] for opening, answer in zip(opened, wanted, strict=True)]
    token_ids, losses, exact = padded_answers(fed, model.device), [0.0] * len(fed), [True] * len(fed)
    for step, logits in enumerate(teacher_forced(model.decoder, prefilled, token_ids)):
        next_tokens = token_ids[:, step]
        chances = logits.float().log_softmax(-1)
        loss, hit = -chances.gather(1, next_tokens[:, None])[:, 0], chances.argmax(-1) == next_tokens
        for index, (opening, tokens) in enumerate(zip(opened, fed, strict=True)):
            if len(opening) <= step < len(tokens):
                losses[index] += float(loss[index]) / len(wanted[index])
                exact[index] = exact[index] and bool(hit[index])
    return losses, exact


def prefill_seconds(model: TextModel, methods: Sequence[str], retain: float) -> dict[str, float]:
    """The shortest of REPEATS prefills of one prompt of TIMED tokens by each method that reads the text, interleaved."""
    (question,) = TEXTS["long"](FIRST, 1)
    whole = prompt_of(model, question)
    ((start, end),) = whole.spans
    end_of_text = end - (len(whole.token_ids) - TIMED)
    packed = model.prepare([TextPrompt((*whole.token_ids[:end_of_text], *whole.token_ids[end:]), ((start, end_of_text),))])
    timed = [method for method in methods if method not in ("none", "oracle")]
    seconds = {method: float("inf") for method in timed}
    for _ in range(REPEATS):
        for method in timed:
            dropper, begun = dropper_of(model, [question], packed, method, retain), time.perf_counter()
            float(prefill(model.decoder, packed, dropper, max_new_tokens=1).logits[0, 0])  # waits for the device
            seconds[method] = min(seconds[method], time.perf_counter() - begun)
    return seconds


def shares(model: TextModel, packed: PackedInputs, dropper: TokenDropper | None) -> list[float]:
    """Of each prompt, the mean share of its droppable tokens that enter a layer; 0 for one without any."""
    schedule, layers = DropSchedule({}) if dropper is None else dropper.schedule, model.config.text_config.num_hidden_layers
    return [
        schedule.of(index).mean_tokens(count, layers) / count if count else 0.0
        for index, count in enumerate(packed.vision_counts)
    ]


def summarise_text(records: Sequence[TextAnswer]) -> list[dict[str, Any]]:
    """A row for each kind of text, budget and method, with 95 % intervals; differences are paired by question."""
    rows = []
    for texts, retain in dict.fromkeys((record.texts, record.retain) for record in records):
        own = [record for record in records if (record.texts, record.retain) == (texts, retain)]
        by_method = {name: by_number(own, name) for name in dict.fromkeys(record.method for record in own)}
        rows += [{"texts": texts, "retain": retain, **summary_row(name, by_method)} for name in by_method]
    return rows


def by_number(records: Sequence[TextAnswer], method: str) -> dict[int, TextAnswer]:
    return {record.number: record for record in records if record.method == method}


def summary_row(method: str, by_method: Mapping[str, Mapping[int, TextAnswer]]) -> dict[str, Any]:
    """Scores of one method; beside those of dense, where it has answered the same questions."""
    own = by_method[method]
    row: dict[str, Any] = {"method": method, "questions": len(own)}
    row |= {name: mean(getattr(record, name) for record in own.values()) for name in ("tokens", "share")}
    found = [record.evidence for record in own.values() if record.evidence is not None]
    row["evidence"] = 100 * mean(found) if found else None
    for name, scale in (("exact", 100), ("nats", 1)):
        values = [scale * float(getattr(record, name)) for record in own.values()]
        row |= {name: mean(values), f"{name}_interval": mean_interval(values)}
        dense = by_method.get("dense", {})
        if method != "dense" and own.keys() <= dense.keys():
            gains = [scale * (float(getattr(record, name)) - float(getattr(dense[key], name))) for key, record in own.items()]
            row |= {f"{name}_difference": mean(gains), f"{name}_difference_interval": mean_interval(gains)}
    if {"dense", "none"} <= by_method.keys():
        without, whole = (mean(record.nats for record in by_method[name].values()) for name in ("none", "dense"))
        row["of_the_text"] = 100 * (without - row["nats"]) / (without - whole)
    return row


def by_kind_of_text(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """A title and the rows, the best first, of each kind of text at each budget."""
    for texts, retain in dict.fromkeys((row["texts"], row["retain"]) for row in rows):
        own = sorted((row for row in rows if (row["texts"], row["retain"]) == (texts, retain)), key=lambda row: row["nats"])
        most = max(row["tokens"] for row in own)
        yield f"{texts}: {own[0]['questions']} questions of {most:.0f} tokens on average, retain {retain:.4g}", own


def text_table(rows: Sequence[Row]) -> str:
    """The rows as markdown tables, one for each kind of text."""
    return "\n".join(f"{title}\n\n{markdown(own, COLUMNS)}" for title, own in by_kind_of_text(rows))


def markdown(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> str:
    """A table with one line for each row, behind its method."""
    named = {"method": lambda row: row["method"], **columns}
    cells = [[name.replace("\n", " ") for name in named], ["---"] * len(named)]
    cells += [[cell(row) for cell in named.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def with_interval(name: str, form: str) -> Callable[[Row], str]:
    """A cell with the row's value of that name and its 95 % interval; "-" where there is none."""

    def shown(row: Row) -> str:
        if name not in row:
            return "-"
        low, high = row[f"{name}_interval"]
        return f"{row[name]:{form}} [{low:{form}}, {high:{form}}]"

    return shown


def rounded(name: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(name) is None else f"{row[name]:.0f}"


COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "mean\nshare": lambda row: f"{row['share']:.3f}",
    "evidence\nkept %": rounded("evidence"),
    "exact %": with_interval("exact", ".1f"),
    "minus dense,\npoints": with_interval("exact_difference", "+.1f"),
    "nats\na token": with_interval("nats", ".2f"),
    "of the\ntext %": rounded("of_the_text"),
}


def read_answers(file: Path) -> list[TextAnswer]:
    """The answers that `append_records` has written; raises ValueError for a line that is no answer."""
    try:
        return [TextAnswer(**json.loads(line)) for line in whole_lines(file)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} holds a line that is no answer to a text ({error}); choose another --output") from error
