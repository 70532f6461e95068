"""The answers of several plans to one batch, and the times of single prompts.

All plans see the same pictures through one run of the vision tower, and share the decoder's layers before their first drop
points. What that saves depends on which methods run side by side, so times are not taken here: some prompts are answered a
second time, each alone, with no layer shared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..dropping import DropSchedule, TokenDropper
from ..inference import Prefilled, decode_tokens, decode_until, prefill, share_prefix
from ..inference.generation import kept_by
from ..loading.zoo import VisionLanguageModel
from ..models.vlm import PackedInputs
from ..tasks import Sample, Task
from .machine import peak_memory_mb, reset_peak_memory, timestamp
from .methods import naming_errors
from .plans import Plan


@dataclass(frozen=True)
class Answer:
    """What came of one prompt."""

    token_ids: list[int]
    kept: list[list[int]]  # after each drop point of its own schedule
    cache_bytes: int  # after prefill


@dataclass(frozen=True)
class Times:
    """What one prompt takes alone. `vision_ms`: reading it, and its pictures through the tower."""

    vision_ms: float
    prefill_ms: float
    decode_ms: float
    peak_memory_mb: float


def answer_batch(
    vlm: VisionLanguageModel, task: Task, plans: Sequence[Plan], packed: PackedInputs
) -> Iterator[tuple[Plan, list[Answer]]]:
    """The answers of one plan after the other to all prompts."""
    decoder = vlm.model.language_model
    droppers = [dropper_of(vlm, plan, packed) for plan in plans]
    prefix = share_prefix(decoder, packed, droppers, max_new_tokens=task.max_new_tokens)
    for plan, dropper in zip(plans, droppers, strict=True):
        with naming_errors(plan.kind):
            prefilled = prefill(decoder, packed, dropper, prefix=prefix, warns=plan.warns)
            sizes = cache_sizes(vlm, prefilled)
            sequences = decoded(vlm, task, prefilled)
        schedule = DropSchedule({}) if dropper is None else dropper.schedule
        stages = ([rows.tolist() for _, rows in kept_by(prefilled, schedule, index)] for index in range(len(sizes)))
        yield plan, [Answer(*answer) for answer in zip(sequences, stages, sizes, strict=True)]


def dropper_of(vlm: VisionLanguageModel, plan: Plan, packed: PackedInputs) -> TokenDropper | None:
    with naming_errors(plan.kind):
        return plan.dropper_for(packed, vlm.config.text_config.num_hidden_layers)


def cache_sizes(vlm: VisionLanguageModel, prefilled: Prefilled) -> list[int]:
    """Bytes that each prompt fills in the cache, over all processes that share the decoder."""
    together = vlm.model.language_model.tensor_parallel
    shares = 1 if together is None else together.size
    return [shares * prefilled.cache.nbytes_of(index) for index in range(len(prefilled.logits))]


def decoded(vlm: VisionLanguageModel, task: Task, prefilled: Prefilled) -> list[list[int]]:
    """The answers' tokens, as far as the task reads them."""

    def is_settled(token_ids: list[int]) -> bool:
        text = vlm.tokenizer.decode(token_ids).strip()
        is_whole = not text.endswith("\N{REPLACEMENT CHARACTER}")  # else bytes of a character are missing
        return is_whole and (any(stop in text for stop in task.until) or task.is_settled(text))

    steps = decode_tokens(vlm.model.language_model, prefilled)
    return decode_until(steps, vlm.config.eos_token_ids, task.max_new_tokens, is_settled)


def time_prompt(
    vlm: VisionLanguageModel, task: Task, plans: Sequence[Plan], sample: Sample
) -> Iterator[tuple[Plan, Times]]:
    """The times of one plan after the other for a prompt alone; each plan has answered prompts before."""
    started = timestamp(vlm.device)
    packed = vlm.prepare([sample.request])
    vision_ms = (timestamp(vlm.device) - started) * 1000
    for plan in plans:
        with naming_errors(plan.kind):
            yield plan, time_plan(vlm, task, plan, packed, vision_ms)


def time_plan(
    vlm: VisionLanguageModel, task: Task, plan: Plan, packed: PackedInputs, vision_ms: float
) -> Times:
    decoder, device = vlm.model.language_model, vlm.device
    dropper = plan.dropper_for(packed, decoder.config.num_hidden_layers)
    reset_peak_memory(device)
    started = timestamp(device)
    prefilled = prefill(decoder, packed, dropper, max_new_tokens=task.max_new_tokens, warns=plan.warns)
    filled = timestamp(device)
    decoded(vlm, task, prefilled)
    finished = timestamp(device)
    return Times(vision_ms, (filled - started) * 1000, (finished - filled) * 1000, peak_memory_mb(device))
