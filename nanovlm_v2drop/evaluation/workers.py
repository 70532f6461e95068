"""Batches that are answered at the same time, where a model is too small to keep all cores of a CPU busy with one.

The operations of a small decoder take less than a millisecond. Sharing each of them between cores saves little; a core for each
batch saves almost all. Threads suffice, because torch's operations run without Python's global lock.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import torch

from ..loading.zoo import VisionLanguageModel
from ..models.parallel import Processes
from .batches import Batch, Prompt

SMALL = 512  # hidden_size up to which a core for each batch is faster than all cores for one batch

Answering = Callable[[Batch, list[Prompt]], Iterator[None]]  # yields where it may be stopped


def num_workers(vlm: VisionLanguageModel, processes: Processes) -> int:
    """How many batches are answered at the same time: one for each thread of torch with a small decoder on a CPU, else one.

    Several processes have the cores already, and those that share a decoder must run the same batch.
    """
    is_small = vlm.device.type == "cpu" and vlm.config.text_config.hidden_size <= SMALL
    return torch.get_num_threads() if is_small and processes.world_size == 1 else 1


def answered(batches: Iterable[tuple[Batch, list[Prompt]]], answer: Answering, workers: int) -> Iterator[Batch]:
    """Every batch in its order, once `answer` has answered it; raises what answering has raised. No prompts: no answers.

    Several workers also answer batches behind the one that is waited for.
    """
    if workers == 1:
        for batch, prompts in batches:
            run_until(Event(), answer, batch, prompts)
            yield batch
        return
    waiting = deque[tuple[Batch, Future[None]]]()
    with one_core_each(workers) as submit:
        for batch, prompts in batches:
            waiting.append((batch, submit(answer, batch, prompts)))
            if len(waiting) > workers:  # one more than they answer, so that none of them waits for the next
                yield finished(*waiting.popleft())
        yield from (finished(*waiting.popleft()) for _ in range(len(waiting)))


def run_until(stopped: Event, answer: Answering, batch: Batch, prompts: list[Prompt]) -> None:
    """Answer a batch, at most until an event."""
    for _ in answer(batch, prompts) if prompts else ():
        if stopped.is_set():
            return


def finished(batch: Batch, answers: Future[None]) -> Batch:
    answers.result()
    return batch


@contextmanager
def one_core_each(workers: int) -> Iterator[Callable[[Answering, Batch, list[Prompt]], Future[None]]]:
    """What gives a batch to threads that use one core each. They stop where they may when this is left, however it is left."""
    threads, stopped = torch.get_num_threads(), Event()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def submit(answer: Answering, batch: Batch, prompts: list[Prompt]) -> Future[None]:
        return pool.submit(run_until, stopped, answer, batch, prompts)

    try:
        yield submit
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a worker's number is also that of threads to come
