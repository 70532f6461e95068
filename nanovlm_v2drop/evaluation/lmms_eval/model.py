"""The classes that lmms-eval runs; importing this imports lmms-eval.

What lmms-eval 0.7.3 asks of them is in its api/model.py. Where its words and its evaluator differ, the evaluator counts: an
option's number is a loss, of which task.py takes the smallest, and it comes in a GenerationResult.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch.distributed as dist
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from ...processing.prompts import Request
from .answers import Answered, Answering, Option, PromptSize
from .arguments import parse_model_arguments
from .requests import Decoding, Piece, chat_pieces, decoding_of, request_of, simple_pieces


@dataclass
class PromptCounts(TokenCounts):
    """What the log of a sample tells of its prompt beside the number of tokens: its vision tokens, and their mean a layer."""

    vision_tokens: int = 0
    mean_vision_tokens: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class SimpleModel(lmms):
    """A model and a method for tasks of the simple interface (`--force_simple`), among them multiple choice."""

    is_simple = True

    def __init__(self, **model_args: Any) -> None:
        """Raises ValueError, in one line, for an unknown argument or a wrong value, before weights are read."""
        super().__init__()
        arguments = parse_model_arguments(model_args)
        plan = arguments.plan()
        self.batch_size, self.seed = arguments.batch_size, arguments.seed
        self.counts: list[PromptCounts] = []  # of all prompts that are scored
        self.answering = Answering(arguments.load(), plan)
        self.device = self.answering.vlm.device  # the evaluator gathers on it

    def pieces(self, request: Instance) -> list[Piece]:
        """The document of a request, read now: decoded pictures of one batch are in memory, not those of all requests."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        text = context[0] if isinstance(context, list) else context
        return simple_pieces(doc_to_visual(self.document(task, split, doc_id)) if callable(doc_to_visual) else None, text)

    def document(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def question(self, request: Instance) -> Request:
        with naming([request]):
            return request_of(self.pieces(request))

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer a request, in the order of the requests. Those of a batch are decoded in the same way."""
        alike = defaultdict[Decoding, list[int]](list)
        for index, request in enumerate(requests):
            with naming([request]):
                alike[decoding_of(gen_kwargs_of(request))].append(index)
        work = [(decoding, *each) for decoding, own in alike.items() for each in enumerate(self.batches(own))]
        answers: dict[int, Answered] = {}
        for decoding, number, batch in self.shown(work):
            own = [requests[index] for index in batch]
            questions = list(map(self.question, own))
            with naming(own):
                answered = self.answering.generate(questions, decoding, self.seed + number)
            answers.update(zip(batch, answered, strict=True))
        ordered = [answers[index] for index in range(len(requests))]
        counts = [counts_of(answer.prompt, answer.num_tokens) for answer in ordered]
        self.counts += [own for request, own in zip(requests, counts, strict=True) if not is_repeated(request)]
        return [GenerationResult(answer.text, own) for answer, own in zip(ordered, counts, strict=True)]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(mean loss a token, whether it is the greedy answer) for each request. A batch is of prompts, with all their options.

        Raises ValueError beside `--use_cache`, which cannot give back such a result.
        """
        refuse_cache(requests)
        prompts = defaultdict[Any, list[int]](list)
        for index, request in enumerate(requests):
            context, *_, doc_id, task, split = request.args
            prompts[str(context), task, split, doc_id].append(index)
        found: dict[int, Option] = {}
        for batch in self.shown(list(self.batches(list(prompts.values())))):
            asked = [(self.question(requests[own[0]]), [self.continuation(requests[index]) for index in own]) for own in batch]
            with naming([requests[own[0]] for own in batch]):
                scored = self.answering.options(asked)
            for own, options in zip(batch, scored, strict=True):
                found.update(zip(own, options, strict=True))
        firsts = [own[0] for own in prompts.values()]
        self.counts += [counts_of(found[index].prompt, 0) for index in firsts if not is_repeated(requests[index])]
        ordered = [found[index] for index in range(len(requests))]
        return [GenerationResult((option.loss, option.is_greedy), counts_of(option.prompt)) for option in ordered]

    def continuation(self, request: Instance) -> str:
        """The answer whose loss is asked for; tasks of type loglikelihood give a function of the document."""
        _, given, _, doc_id, task, split = request.args
        return str(given(self.document(task, split, doc_id)) if callable(given) else given)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("the models here answer one question at a time, so tasks of several rounds cannot be run")

    @property
    def chat_template(self) -> str:
        """What lmms-eval asks for beside --apply_chat_template; raises ValueError."""
        raise ValueError("every prompt is put into the model's own conversation here; leave out --apply_chat_template")

    def batches(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """The items in order, a batch at a time."""
        return (items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size))

    def shown(self, work: Sequence[Any]) -> Any:
        """The batches, with a bar that the first process draws."""
        return tqdm(work, disable=self.rank != 0, desc=f"{self.answering.vlm.name}, {self.answering.plan.row}")

    def clean(self) -> None:
        """What lmms-eval calls when all requests are answered: report, then free the memory, which a local judge may need."""
        self.report()
        del self.answering
        super().clean()

    def report(self) -> None:
        """Put the prompts' mean vision tokens into "throughput" of the results, and say where the method is at its floor."""
        counts, seconds = all_processes(self.counts), sum(all_processes([self.answering.seconds]))
        if counts:
            about = {
                "vision_tokens": mean(each.vision_tokens for each in counts),
                "mean_vision_tokens": mean(each.mean_vision_tokens for each in counts),
            }
            num_tokens = sum(each.output_tokens for each in counts)
            log_metrics(seconds, num_tokens, num_tokens / seconds, about)
        if self.answering.shapes and (note := self.answering.plan.note_on(self.answering.shapes)):
            logger.warning(f"{self.answering.plan.row}: {note}")


class ChatModel(SimpleModel):
    """The same for tasks of the chat interface, lmms-eval's default. It does not offer them multiple choice."""

    is_simple = False

    def pieces(self, request: Instance) -> list[Piece]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return chat_pieces(doc_to_messages(self.document(task, split, doc_id)))


def gen_kwargs_of(request: Instance) -> dict[str, Any]:
    """The only dictionary among the arguments of a request; its place differs between the interfaces."""
    return next((value for value in request.args if isinstance(value, dict)), {})


def counts_of(size: PromptSize, output_tokens: int | None = None) -> PromptCounts:
    return PromptCounts(size.tokens, output_tokens, None, size.vision_tokens, size.mean_vision_tokens)


def is_repeated(request: Instance) -> bool:
    """Whether a process that has fewer documents than another repeats one, which nobody scores."""
    return bool(request.metadata.get("__padding_only__"))


def all_processes(own: list[Any]) -> list[Any]:
    """The items of all processes, which must all call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return own
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return [item for items in gathered for item in items]


@contextmanager
def naming(requests: Sequence[Instance]) -> Iterator[None]:
    """In here, the message of a ValueError or OSError also names the documents."""
    try:
        yield
    except (ValueError, OSError) as error:
        documents = ", ".join(f"{request.args[-2]} {request.args[-3]}" for request in requests)
        raise ValueError(f"document {documents}: {error}") from error


def refuse_cache(requests: Sequence[Instance]) -> None:
    """Raise ValueError where lmms-eval keeps answers: it fails on a pair of numbers after all of them are computed."""
    for request in requests[:1]:
        options = getattr(getattr(request.args[2], "__self__", None), "args", None)  # the command line, held by the task
        if getattr(options, "use_cache", None):
            raise ValueError("lmms-eval cannot keep the answers to multiple choice; leave out --use_cache for such tasks")
