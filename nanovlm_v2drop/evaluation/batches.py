"""Which questions are answered together: batches of prompts of similar length, whose size goes by the free memory.

Batches are formed from all questions of a task, answered or not, so that an interrupted run continues with the same batches
and therefore with the very same numbers.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch

from ..loading.zoo import VisionLanguageModel
from ..models.config import TextConfig
from ..models.vlm import VisionInput
from ..tasks import Sample
from .machine import free_memory

Prompt = tuple[list[int], list[VisionInput]]  # token ids, and pictures and videos in the order of their tokens

AUTO_PROMPTS = 64
# Larger products are hardly faster, and the first answers should not take too long.
AUTO_TOKENS = {"cpu": 4096, "cuda": 32768}
WINDOW = 128  # questions that are sorted by length at a time; their pictures are in memory
AHEAD = 2  # batches whose pictures are decoded while the model answers another one
THREADS = {"cpu": 1, "cuda": 8}  # that decode pictures; on a CPU, the model needs the cores


@dataclass(frozen=True)
class BatchSize:
    """How many prompts go through one packed prefill: at most `prompts`, and with `tokens` at most so many tokens together."""

    prompts: int
    tokens: int | None = None

    def __str__(self) -> str:
        return str(self.prompts) if self.tokens is None else f"{self.prompts} prompts, {self.tokens} tokens"

    @classmethod
    def parse(cls, text: str) -> "BatchSize":
        """The size that `str` wrote; raises ValueError for other text."""
        found = re.fullmatch(r"(\d{1,9})(?: prompts, (\d{1,9}) tokens)?", text)
        if found is None:
            raise ValueError(f"{text!r} is no batch size")
        return cls(int(found[1]), None if found[2] is None else int(found[2]))

    @classmethod
    def auto(cls, vlm: VisionLanguageModel, samples: int, replicas: int = 1, workers: int = 1) -> "BatchSize":
        """What fits into half of the free memory, up to a size beyond which batches are no faster.

        Several replicas get batches that leave none of them idle. Several workers share the memory of a replica.
        """
        fitting = free_memory(vlm.device) // 2 // workers // bytes_of_token(vlm.config.text_config, vlm.dtype)
        fast = AUTO_TOKENS.get(vlm.device.type, AUTO_TOKENS["cpu"])
        prompts = AUTO_PROMPTS if replicas == 1 else min(AUTO_PROMPTS, -(-samples // replicas))
        return cls(max(1, prompts), max(1, min(fitting, fast)))

    def has_room(self, lengths: Sequence[int]) -> bool:
        """Whether prompts of these lengths may go together. A single prompt always may."""
        fits = self.tokens is None or sum(lengths) <= self.tokens
        return len(lengths) == 1 or (fits and len(lengths) <= self.prompts)


def bytes_of_token(config: TextConfig, dtype: torch.dtype) -> int:
    """About the most memory that a prompt's token takes: caches with and without dropping, and the values in one layer."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    in_layer = 12 * config.hidden_size + 3 * config.intermediate_size + 3 * heads * config.head_dim
    in_caches = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return (in_layer + in_caches) * dtype.itemsize


@dataclass(frozen=True)
class Batch:
    """Questions that are answered together, and the place of each among all questions of the task."""

    samples: Sequence[Sample]
    places: Sequence[int]


def form_batches(vlm: VisionLanguageModel, samples: Iterator[Sample], size: BatchSize) -> Iterator[Batch]:
    """All samples in batches. WINDOW samples at a time are sorted by the lengths of their prompts."""
    placed = enumerate(samples)
    for window in iter(lambda: list(islice(placed, max(WINDOW, size.prompts))), []):
        lengths = {place: vlm.prompt_length(sample.request) for place, sample in window}
        for places in cut(sorted(lengths, key=lengths.__getitem__), lengths, size):
            found = dict(window)
            yield Batch([found[place] for place in places], places)


def cut(places: Sequence[int], lengths: dict[int, int], size: BatchSize) -> list[list[int]]:
    """The places in their order, in batches of this size."""
    batches: list[list[int]] = []
    for place in places:
        if batches and size.has_room([lengths[other] for other in (*batches[-1], place)]):
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def read_ahead(
    vlm: VisionLanguageModel, batches: Iterator[Batch], wanted: Callable[[int, Batch], bool]
) -> Iterator[tuple[Batch, list[Prompt]]]:
    """Every batch with its prompts, whose pictures threads decode while the model works on the batches before.

    Batches that are not `wanted`, by their number and themselves, come without prompts.
    """
    reading, drawing = (ThreadPoolExecutor(threads) for threads in (THREADS.get(vlm.device.type, 1), 1))
    waiting = deque[tuple[Batch, list[Future[Prompt]]]]()
    try:
        drawn, number = drawing.submit(next, batches, None), 0
        while (batch := drawn.result()) is not None:
            drawn = drawing.submit(next, batches, None)
            samples = batch.samples if wanted(number, batch) else []
            waiting.append((batch, [reading.submit(vlm.tokens_and_media, sample.request) for sample in samples]))
            number += 1
            if len(waiting) > AHEAD:
                yield read(*waiting.popleft())
        yield from (read(*waiting.popleft()) for _ in range(len(waiting)))
    finally:
        for pool in (reading, drawing):
            pool.shutdown(cancel_futures=True)


def read(batch: Batch, prompts: Sequence[Future[Prompt]]) -> tuple[Batch, list[Prompt]]:
    """Wait until the prompts of a batch are read; raises what reading one has raised."""
    return batch, [prompt.result() for prompt in prompts]
