"""Answers to packed batches of requests: generated ones, and the losses of given ones.

Shapes: B prompts of a batch, V vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...dropping.budget import Shape, shapes_of
from ...inference import (
    MAX_NEW_TOKENS,
    NotFinite,
    Prefilled,
    decode_tokens,
    decode_until,
    padded_answers,
    prefill,
    teacher_forced,
)
from ...inference.conversation import common_length
from ...inference.prefill_loop import advice
from ...loading.zoo import VisionLanguageModel
from ...models.vlm import PackedInputs
from ...processing.images import ImageProcessor
from ...processing.prompts import Request, build_prompt
from ..plans import Plan, out_of_reach
from .requests import Decoding


@dataclass(frozen=True)
class PromptSize:
    """Tokens of a prompt before anything is dropped, and how many of its vision tokens enter a layer on average."""

    tokens: int
    vision_tokens: int
    mean_vision_tokens: float


@dataclass(frozen=True)
class Answered:
    """A generated answer: its text, and its number of tokens."""

    text: str
    num_tokens: int
    prompt: PromptSize


@dataclass(frozen=True)
class Option:
    """A given answer: the mean loss of its tokens (nats), and whether greedy decoding gives just these tokens."""

    loss: float
    is_greedy: bool
    prompt: PromptSize


@dataclass
class Answering:
    """A model and a method that answer batches.

    `shapes` are those of all prompts with pictures so far, `seconds` the time from reading their pictures to their answers.
    """

    vlm: VisionLanguageModel
    plan: Plan
    shapes: list[Shape] = field(default_factory=list)
    seconds: float = 0.0

    def generate(self, requests: Sequence[Request], decoding: Decoding, seed: int = 0) -> list[Answered]:
        """One answer a request; `seed` is that of a batch whose answers are sampled."""
        decode = self.vlm.tokenizer.decode

        def is_settled(token_ids: list[int]) -> bool:
            return bool(decoding.until) and decoding.has_stopped(decode(token_ids))

        with self.timed():
            packed = self.vlm.prepare(requests)
            self.note_shapes(packed)
            prefilled = self.prefill(packed, min(decoding.max_new_tokens, MAX_NEW_TOKENS))  # the cache grows where it must
            tokens = decode_tokens(self.vlm.model.language_model, prefilled, decoding.sampling(seed))
            sequences = decode_until(tokens, self.vlm.config.eos_token_ids, decoding.max_new_tokens, is_settled)
        texts = [decoding.cut(decode(ids)) for ids in sequences]
        return [Answered(*own) for own in zip(texts, map(len, sequences), self.prompt_sizes(packed), strict=True)]

    def options(self, asked: Sequence[tuple[Request, Sequence[str]]]) -> list[list[Option]]:
        """For each request the losses of its given answers; a prompt goes through the model once for all of them."""
        prompts, media, options = [], [], []
        with self.timed():
            for request, continuations in asked:
                token_ids, own = self.vlm.tokens_and_media(request)
                surplus, option_ids = continuation_tokens(self.vlm, request, continuations)
                prompts.append(token_ids[: len(token_ids) - surplus])
                media.append(own)
                options.append(option_ids)
            packed = self.vlm.pack(prompts, media)
            self.note_shapes(packed)
            scored = self.score(packed, options)
        sizes = self.prompt_sizes(packed)
        return [[Option(*each, size) for each in own] for own, size in zip(scored, sizes, strict=True)]

    def score(self, packed: PackedInputs, options: Sequence[Sequence[list[int]]]) -> list[list[tuple[float, bool]]]:
        """Mean loss, and whether it is the greedy answer, of the token ids of every prompt's options."""
        prefilled, found = self.prefill(packed, MAX_NEW_TOKENS), [list[tuple[float, bool]]() for _ in options]
        for number in range(max(map(len, options))):
            if number and prefilled.cache.pruning is not None:  # a method that prunes while decoding remembers what it saw
                prefilled = self.prefill(packed, MAX_NEW_TOKENS)
            chosen = [own[min(number, len(own) - 1)] for own in options]
            scored = score_tokens(self.vlm, prefilled, chosen)
            for own, scores, result in zip(options, scored, found, strict=True):
                result += [scores] if number < len(own) else []
        return found

    def prefill(self, packed: PackedInputs, max_new_tokens: int) -> Prefilled:
        decoder = self.vlm.model.language_model
        with self.plan.answering():
            dropper = self.plan.dropper_for(packed, decoder.config.num_hidden_layers)
            return prefill(decoder, packed, dropper, max_new_tokens=max_new_tokens)

    def note_shapes(self, packed: PackedInputs) -> None:
        """Note these prompts for the report at the end. The first with pictures is checked, as on the command line.

        Raises OutOfReach where the first prompt with pictures cannot meet the budget.
        """
        num_layers = self.vlm.config.text_config.num_hidden_layers
        shapes = [shape for shape in shapes_of(packed, num_layers) if shape.num_vision_tokens]
        if shapes and not self.shapes and self.plan.budget is not None and self.plan.kind is not None:
            alike = isinstance(self.vlm.image_processor, ImageProcessor)
            first = Shape(shapes[0].num_vision_tokens, shapes[0].num_layers, shapes[0].frames, alike)
            if unreached := out_of_reach([self.plan.kind], self.plan.budget, first):
                raise next(iter(unreached.values()))
        self.shapes += shapes

    def prompt_sizes(self, packed: PackedInputs) -> list[PromptSize]:
        shapes = shapes_of(packed, self.vlm.config.text_config.num_hidden_layers)
        return [
            PromptSize(length, shape.num_vision_tokens, mean_tokens(self.plan, shape))
            for length, shape in zip(packed.seqlens, shapes, strict=True)
        ]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Note the seconds in here; the host waits for the device where it reads tokens and losses."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


def mean_tokens(plan: Plan, shape: Shape) -> float:
    """Mean vision tokens a layer of a prompt of this shape; 0 for one without pictures."""
    count = shape.num_vision_tokens
    return round(plan.schedule_for(shape).mean_tokens(count, shape.num_layers), 4) if count else 0.0


def continuation_tokens(
    vlm: VisionLanguageModel, request: Request, continuations: Sequence[str]
) -> tuple[int, list[list[int]]]:
    """The token ids of each continuation of a prompt, and how many tokens at the prompt's end they replace (mostly none).

    Prompt and continuation are encoded together: a tokenizer may write " yes" at the start of a text with other tokens.
    Raises ValueError for a continuation without tokens.
    """
    planned = vlm.planned_media(request)
    prompt = build_prompt(request, vlm.conversation, vlm.config.marks)
    alone = vlm.encode(prompt, planned)[0]
    whole = [vlm.encode(prompt + continuation, planned)[0] for continuation in continuations]
    shared = min(common_length(alone, each) for each in whole)
    if empty := [text for text, each in zip(continuations, whole, strict=True) if len(each) == shared]:
        raise ValueError(f"the answer {empty[0]!r} has no tokens, so it has no loss")
    return len(alone) - shared, [each[shared:] for each in whole]


@torch.no_grad()
def score_tokens(vlm: VisionLanguageModel, prefilled: Prefilled, answers: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
    """Mean loss of one answer a prompt, and whether each of its tokens is the most likely one. The cache stays as it was.

    The answers are fed as decoding feeds its own tokens, so they see the vision tokens that a generated answer sees. Raises
    NotFinite where a loss is NaN or infinite.
    """
    answer_ids, losses, hits = padded_answers(answers, prefilled.logits.device), list[Tensor](), list[Tensor]()
    for token_ids, logits in zip(answer_ids.T, teacher_forced(vlm.model.language_model, prefilled, answer_ids), strict=True):
        log_probabilities = logits.float().log_softmax(-1)  # (B, V)
        losses.append(-log_probabilities.gather(-1, token_ids[:, None]).squeeze(-1))
        hits.append(logits.argmax(-1) == token_ids)
    prefilled.cache.crop(len(losses) - 1)
    found = [
        (sum(own[: len(answer)]) / len(answer), all(greedy[: len(answer)]))
        for answer, own, greedy in zip(answers, torch.stack(losses, 1).tolist(), torch.stack(hits, 1).tolist(), strict=True)
    ]
    if not all(loss < float("inf") for loss, _ in found):
        raise NotFinite(f"the loss of an answer is NaN or infinite; {advice(vlm.dtype)}")
    return found
