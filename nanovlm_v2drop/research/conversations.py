"""What later questions of a conversation can still see: three questions each about one scene or clip of the demos.

Every method answers the same conversations, with each history of `HISTORIES` that makes a difference for it. The questions of a
conversation are of three kinds in random order, so that the three turns are equally hard.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from ..demo.data import CLIPS, SCENES, World
from ..demo.scenes import Question
from ..dropping import TokenDropper
from ..dropping.budget import Budget
from ..dropping.schedule import OutOfReach
from ..evaluation.bootstrap import BOOTSTRAP_DRAWS, interval
from ..evaluation.machine import timestamp
from ..evaluation.methods import DENSE, naming_errors
from ..inference import HISTORIES, ConversationBatch, decode_tokens, decode_until
from ..loading.zoo import VisionLanguageModel
from ..processing.prompts import Request

WORLDS = {"demo": SCENES, "demo-video": CLIPS}
TURNS = 3
MAX_NEW_TOKENS = 8
KEEP, CUT, RE_PREFILL = HISTORIES


@dataclass(frozen=True)
class Dialogue:
    """Questions about one picture or clip, with their answers; `request` is the first question with the picture."""

    request: Request
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Measured:
    """One method with one budget and one history.

    `correct` (conversations, turns) booleans. `prefilled_tokens` (vision tokens before any drop included) and `prefill_ms` are
    those of all turns but the first, a conversation. `cache_bytes` is the size of the cache at the end of a conversation.
    """

    method: str
    budget: Budget | None
    history: str
    correct: np.ndarray
    prefilled_tokens: float
    prefill_ms: float
    cache_bytes: float

    @property
    def later(self) -> np.ndarray:
        """(conversations,) share of the questions behind the first that were answered right."""
        return self.correct[:, 1:].mean(1)


def dialogue(world: World, number: int) -> Dialogue:
    """The conversation of that number. The same number gives the same one on every machine."""
    rng = Random(f"conversation {number}")
    while True:
        subject = world.sample(rng)
        questions = [world.ask(subject, kind, rng) for kind in rng.sample(sorted(world.turn_weights), TURNS)]
        asked = tuple(question for question in questions if question is not None)
        if len(asked) == TURNS:
            return Dialogue(shown(world.draw(subject), asked[0].text), asked)


def dialogues_for(model: str, conversations: int) -> list[Dialogue]:
    """The first conversations for a demo; raises ValueError for another model."""
    if model not in WORLDS:
        raise ValueError(f"conversations are drawn for {' and '.join(WORLDS)}, not for {model}: leave --model out")
    return [dialogue(WORLDS[model], number) for number in range(conversations)]


def shown(drawn: np.ndarray, text: str) -> Request:
    """A question about a picture (height, width, 3) or the frames of a clip (frames, height, width, 3)."""
    if drawn.ndim == 3:
        return Request(text=text, images=[Image.fromarray(drawn)])
    return Request(text=text, video=[Image.fromarray(frame) for frame in drawn])


def measure_all(
    vlm: VisionLanguageModel,
    methods: Sequence[type[TokenDropper] | None],
    budgets: Sequence[Budget],
    dialogues: Sequence[Dialogue],
    *,
    forget: bool = False,
    batch_size: int = 1,
) -> Iterator[Measured]:
    """Every method at every budget with every history; None is dense. A budget below a method's floor is left out.

    With `forget`, a later question sees the picture and no earlier question, as the demos were trained.
    """
    for method in methods:
        for budget in budgets if method is not None else [None]:
            for history in histories_of(method):
                with naming_errors(method):
                    try:
                        yield measure(vlm, method, budget, history, dialogues, forget, batch_size)
                    except OutOfReach:
                        break


def histories_of(method: type[TokenDropper] | None) -> tuple[str, ...]:
    """The histories that differ: nothing is to be cut where nothing leaves inside the decoder, or where rows are averages."""
    cuts = method is not None and method.latest_layer != 0 and not method.merges and not method.cut_cache
    return HISTORIES if cuts else (KEEP, RE_PREFILL)


def measure(
    vlm: VisionLanguageModel,
    method: type[TokenDropper] | None,
    budget: Budget | None,
    history: str,
    dialogues: Sequence[Dialogue],
    forget: bool,
    batch_size: int,
) -> Measured:
    """One row of the table."""
    parts = [
        converse(vlm, ConversationBatch(vlm, len(part), method, budget, history, MAX_NEW_TOKENS), part, forget)
        for part in parts_of(dialogues, batch_size)
    ]
    correct, tokens, seconds, sizes = (np.concatenate(values) for values in zip(*parts, strict=True))
    name = DENSE if method is None else method.name
    return Measured(name, budget, history, correct, tokens.mean(), 1000 * seconds.mean(), sizes.mean())


def parts_of(dialogues: Sequence[Dialogue], size: int) -> list[Sequence[Dialogue]]:
    return [dialogues[start : start + size] for start in range(0, len(dialogues), size)]


def converse(
    vlm: VisionLanguageModel, batch: ConversationBatch, dialogues: Sequence[Dialogue], forget: bool
) -> tuple[np.ndarray, ...]:
    """Correct answers (B, turns), and for each conversation prefilled tokens and seconds of later turns, and cache bytes."""
    correct, tokens, seconds = [], np.zeros(len(dialogues)), np.zeros(len(dialogues))
    for turn in range(TURNS):
        if forget:
            batch.forget()
        asked = [each.request if turn == 0 else Request(text=each.questions[turn].text) for each in dialogues]
        started = timestamp(vlm.device)
        prefilled, schedule = batch.prefill(asked)
        taken = (timestamp(vlm.device) - started) / len(dialogues)
        steps = decode_tokens(vlm.model.language_model, prefilled)
        answers = batch.answered(decode_until(steps, vlm.config.eos_token_ids, MAX_NEW_TOKENS), schedule, prefilled)
        right = [
            answer.text.strip().lower() == each.questions[turn].answer for answer, each in zip(answers, dialogues, strict=True)
        ]
        correct.append(right)
        if turn > 0:
            seconds += taken
            tokens += [len(written.token_ids) for _, written in batch.open]
            tokens -= batch.reused
    assert batch.cache is not None  # every turn was prefilled
    sizes = [batch.cache.nbytes_of(index) for index in range(len(dialogues))]
    return np.array(correct).T, tokens, seconds, np.array(sizes)


def paired(one: np.ndarray, other: np.ndarray) -> tuple[float, list[float]]:
    """The mean of paired differences (conversations,) in points, and its 95 % bootstrap interval over conversations."""
    differences = 100 * (one.astype(float) - other.astype(float))
    draws = np.random.default_rng(0).integers(len(differences), size=(BOOTSTRAP_DRAWS, len(differences)))
    return float(differences.mean()), interval(differences[draws].mean(1))


def rows_of(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One row each, with the differences of later questions to re-prefilling and to dense, where these were measured."""
    named = {(each.method, each.budget, each.history): each for each in measured}
    rows, dense = [], named.get((DENSE, None, RE_PREFILL))
    for own in measured:
        again = named.get((own.method, own.budget, RE_PREFILL))
        rows.append({
            "method": own.method,
            "budget": None if own.budget is None else str(own.budget),
            "history": own.history,
            "accuracy": [round(100 * float(share), 2) for share in own.correct.mean(0)],
            "to_re_prefill": None if again is None or again is own else paired(own.later, again.later),
            "to_dense": None if dense is None or own.budget is None else paired(own.later, dense.later),
            "prefilled_tokens": round(own.prefilled_tokens, 1),
            "prefill_ms": round(own.prefill_ms, 2),
            "cache_mb": round(own.cache_bytes / 1e6, 3),
        })  # fmt: skip
    return rows
