"""Generation: choosing tokens, and answers to requests, whole or as a stream.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from numbers import Integral, Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dropping.base import TokenDropper
from ..dropping.budget import Budget, asked_budget, shapes_of
from ..dropping.schedule import DropSchedule
from ..models.decoder import Decoder
from ..models.language_model import TextPrompt
from ..processing.prompts import Request
from .decoding import decode_one_token, decode_steps
from .prefill_loop import MAX_NEW_TOKENS, NotFinite, Prefilled, advice, prefill

if TYPE_CHECKING:
    from ..loading.zoo import VisionLanguageModel
    from ..processing.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one (temperature 0), or drawn from the smallest set with `top_p` mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises TypeError for what is no number, and ValueError for a number out of range."""
        for name, wanted in (("temperature", Real), ("top_p", Real), ("seed", Integral)):
            value = getattr(self, name)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}: give a number, such as Sampling(temperature=0.7, top_p=0.9, seed=1)")
        if not 0 <= self.temperature < inf or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature} must be >= 0 and finite, and top_p {self.top_p} in (0, 1]")

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """(B, V) -> (B,)"""
        if self.temperature == 0:
            return logits.argmax(-1)
        # Drawing from numbers that are not finite is an error that ends a GPU's context; `read_tokens` reports them instead.
        finite = logits.float().nan_to_num()
        probabilities, order = (finite / self.temperature).softmax(-1).sort(descending=True)
        outside = probabilities.cumsum(-1) - probabilities >= self.top_p  # the most likely token is never outside
        drawn = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
        return order.gather(-1, drawn).squeeze(-1)


GREEDY = Sampling()


def decode_tokens(decoder: Decoder, prefilled: Prefilled, sampling: Sampling = GREEDY) -> Iterator[list[int]]:
    """Endless stream of the next token of every sequence; take as many as you need. Raises NotFinite as `read_tokens`."""
    generator = torch.Generator(prefilled.logits.device).manual_seed(sampling.seed)
    logits, step = prefilled.logits, decode_steps(decoder, prefilled.cache)
    while True:
        token_ids = sampling.choose(logits, generator)
        yield read_tokens(token_ids, logits)
        logits = step(token_ids)


def teacher_forced(decoder: Decoder, prefilled: Prefilled, token_ids: Tensor) -> Iterator[Tensor]:
    """The logits (B, V) before each token of given answers (B, N), which are fed one after the other. The last is not fed."""
    logits = prefilled.logits
    for step in range(token_ids.shape[1]):
        if step:
            logits = decode_one_token(decoder, token_ids[:, step - 1], prefilled.cache)
        yield logits


def padded_answers(answers: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, N) token ids of answers of unequal length. Shorter ones repeat their last token."""
    longest = max(map(len, answers))
    return torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in answers], device=device)


def read_tokens(token_ids: Tensor, logits: Tensor) -> list[int]:
    """The tokens (B,) that were chosen from logits (B, V), on the host.

    Raises NotFinite where a logit is NaN or infinite. The flag travels with the tokens, so this waits for the device once.
    """
    flag = logits.isfinite().all().to(token_ids.dtype)
    *tokens, is_finite = torch.cat([token_ids, flag[None]]).tolist()
    if not is_finite:
        raise NotFinite(f"the logits are NaN or infinite, so there is no answer; {advice(logits.dtype)}")
    return tokens


def decode_until(
    tokens: Iterator[list[int]],
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    is_settled: Callable[[list[int]], bool] = lambda token_ids: False,
) -> list[list[int]]:
    """Collect every sequence up to its end-of-sequence token (included), `max_new_tokens`, or until it `is_settled`."""
    sequences: list[list[int]] = []
    ended: list[bool] = []
    for step in islice(tokens, max_new_tokens):
        sequences, ended = sequences or [[] for _ in step], ended or [False] * len(step)
        for index, token in enumerate(step):
            if not ended[index]:
                sequences[index].append(token)
                ended[index] = token in eos_token_ids or is_settled(sequences[index])
        if all(ended):
            break
    return sequences


@dataclass(frozen=True)
class Answer:
    """One generated answer: its text, its token ids (end-of-sequence included), and who survived each drop point."""

    text: str
    token_ids: list[int]
    kept: list[tuple[int, Tensor]]


def generate(
    vlm: "VisionLanguageModel",
    requests: Sequence[Request],
    dropper: TokenDropper | type[TokenDropper] | None = None,
    *,
    tokens: float | None = None,
    retain: float | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
) -> list[Answer]:
    """Answer all requests in one packed batch; prompts may differ in length and number of pictures.

    Args:
        dropper: a dropper that is made, such as V2Drop(schedule), or a class, such as V2Drop, with one of the next two.
        tokens: the mean number of vision tokens that a layer sees. A prompt that has fewer keeps all of them.
        retain: the same as a share of each prompt's own vision tokens, such as 1 / 3.

    Raises:
        TypeError: something else as the model, a request, the dropper or a number; a class without a budget, a budget without
            a class.
        ValueError: a number out of range; a budget below what the method can reach (OutOfReach); as `vlm.prepare`.
        NotFinite: activations overflow the dtype.
    """
    budget = check_options(vlm, dropper, tokens, retain, max_new_tokens, sampling)
    prefilled, schedule = prefill_requests(vlm, requests, dropper, budget, max_new_tokens)
    steps = decode_tokens(vlm.model.language_model, prefilled, sampling)
    sequences = decode_until(steps, vlm.config.eos_token_ids, max_new_tokens)
    return [
        Answer(vlm.tokenizer.decode(ids).strip(), ids, kept_by(prefilled, schedule, index))
        for index, ids in enumerate(sequences)
    ]


def stream(
    vlm: "VisionLanguageModel",
    request: Request,
    dropper: TokenDropper | type[TokenDropper] | None = None,
    *,
    tokens: float | None = None,
    retain: float | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
) -> Iterator[str]:
    """The answer to one request piece by piece, as it is decoded; the pieces joined are the answer's text.

    A character is held back until all its bytes are there. Options and errors are those of `generate`.
    """
    budget = check_options(vlm, dropper, tokens, retain, max_new_tokens, sampling)

    def token_ids() -> Iterator[int]:
        prefilled, _ = prefill_requests(vlm, [request], dropper, budget, max_new_tokens)
        for (token,) in islice(decode_tokens(vlm.model.language_model, prefilled, sampling), max_new_tokens):
            yield token
            if token in vlm.config.eos_token_ids:
                return

    return pieces(vlm.tokenizer, token_ids())


def pieces(tokenizer: "Tokenizer", token_ids: Iterator[int]) -> Iterator[str]:
    """The text of tokens as it grows."""
    ids: list[int] = []
    text = shown = ""
    for token in token_ids:
        ids.append(token)
        text = tokenizer.decode(ids).strip()
        if text != shown and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else bytes of a character are missing
            yield text[len(shown) :]
            shown = text
    if text != shown:  # it ended inside a character
        yield text[len(shown) :]


def check_options(
    vlm: "VisionLanguageModel",
    dropper: object,
    tokens: float | None,
    retain: float | None,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Budget | None:
    """The budget that is asked for; raises TypeError and ValueError as `generate`."""
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling is {sampling!r}: give one such as Sampling(temperature=0.7)")
    if not isinstance(max_new_tokens, Integral):
        raise TypeError(f"max_new_tokens is {max_new_tokens!r}: give a whole number, such as {MAX_NEW_TOKENS}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1")
    budget = asked_budget(dropper, tokens, retain)
    if not hasattr(vlm, "prepare"):
        raise TypeError(f'the model is {vlm!r}: give what load returns, as by load("demo")')
    context = vlm.model.language_model.config.context_length
    if context is not None and max_new_tokens > context:  # the cache gets room for all of them at once
        raise ValueError(f"max_new_tokens {max_new_tokens:,} is above the model's context of {context:,} tokens; ask for fewer")
    return budget


def prefill_requests(
    vlm: "VisionLanguageModel",
    requests: Sequence[Request],
    dropper: TokenDropper | type[TokenDropper] | None,
    budget: Budget | None,
    max_new_tokens: int,
) -> tuple[Prefilled, DropSchedule]:
    """The prompts through every layer, and the schedule by which their tokens left; raises TypeError as `generate`."""
    if not isinstance(requests, Sequence) or not all(isinstance(request, Request | TextPrompt) for request in requests):
        way = 'give a list, such as [Request(text="What is this?", images=["photo.jpg"])]'
        raise TypeError(f"the requests are {requests!r:.80}: {way}")
    packed, decoder = vlm.prepare(requests), vlm.model.language_model
    if isinstance(dropper, type):
        assert budget is not None  # check_options
        dropper = budget.dropper(dropper, shapes_of(packed, decoder.config.num_hidden_layers))
    prefilled = prefill(decoder, packed, dropper, max_new_tokens=max_new_tokens)
    return prefilled, DropSchedule({}) if dropper is None else dropper.schedule


def kept_by(prefilled: Prefilled, schedule: DropSchedule, index: int) -> list[tuple[int, Tensor]]:
    """The vision tokens of one sequence after each drop point of its own schedule."""
    return [(layer, stages[index]) for layer, stages in prefilled.kept if layer in schedule.of(index)]
