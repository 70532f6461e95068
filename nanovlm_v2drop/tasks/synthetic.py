"""What the tasks of the two demos have in common: each question is drawn from its number, in equal parts of every kind."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, ClassVar

from .base import Sample, Task, accuracy_of


class SyntheticTask(Task):
    """`score` is the accuracy in percent, by exact answer. The summary also holds the accuracy of each kind of question."""

    max_new_tokens = 8
    default_samples: int
    kinds: ClassVar[tuple[str, ...]]

    @abstractmethod
    def sample(self, number: int) -> Sample:
        """The sample of that number, from 0 on without end."""

    def num_samples(self, limit: int | None = None) -> int:
        return self.default_samples if limit is None else limit

    def samples(self, limit: int | None = None) -> Iterator[Sample]:
        return islice(map(self.sample, count()), limit)

    def correct(self, answer: str, sample: Sample) -> float:
        return float(answer.strip().lower() == sample.answer)

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        found = accuracy_of(records, self.name)
        return {"score": found["score"], **{kind: found[kind] for kind in self.kinds if kind in found}}
