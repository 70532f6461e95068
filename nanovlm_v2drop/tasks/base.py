"""What every benchmark offers: samples, their number, and scoring."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from PIL import Image

from ..processing.prompts import Request
from ..processing.video import VideoSource

SHORT_ANSWER_PROMPT = "\nAnswer the question using a single word or phrase."
NO_LIMIT = 1024  # tokens of an answer where lmms-eval's task names no limit: what its wrapper of LLaVA then allows


@dataclass(frozen=True)
class Sample:
    """One question about pictures or a video (a file, or its frames).

    `kind` is the category of a breakdown, `group` the picture by which paired metrics join, `answer` the ground truth,
    `references` what else the scoring needs: all ten answers of people, or the texts of the options.
    No two samples of a task have the same `sample_id`.
    """

    sample_id: str
    text: str
    images: tuple[Image.Image, ...]
    answer: str
    kind: str
    group: str = ""
    video: VideoSource | None = None
    references: tuple[str, ...] = ()

    @property
    def request(self) -> Request:
        return Request(text=self.text, images=self.images, video=self.video)


class Task(ABC):
    """A benchmark: its questions and its scoring. Made from the folder that holds its data, or None for the Hub."""

    name: str
    max_new_tokens: int
    until: ClassVar[tuple[str, ...]] = ()  # an answer ends before the first of these
    about_videos: ClassVar[bool] = False
    smallest_limit: ClassVar[int] = 1  # more where several samples are scored as one
    default_samples: int | None = None  # what a run without a limit takes; None is everything
    score_name: ClassVar[str] = ""  # what the headline counts, where readings of one benchmark differ
    key_metrics: ClassVar[Sequence[str]] = ()  # keys of `summary` that papers report, shown beside the score
    # By model: what its paper reports for the dense model, under the names of `summary`.
    reported: ClassVar[Mapping[str, Mapping[str, float]]] = {}

    def __init__(self, data_dir: Path | None = None) -> None:
        self.data_dir = data_dir

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold the data, in order; none where the samples are drawn."""
        return ()

    def first_sample(self) -> Sample:
        """One sample, to see how large a prompt is."""
        return next(self.samples(self.smallest_limit))

    @abstractmethod
    def num_samples(self, limit: int | None = None) -> int:
        """How many samples a run with this limit takes, without reading one; None is a run without a limit."""

    @abstractmethod
    def samples(self, limit: int | None = None) -> Iterator[Sample]:
        """Give the samples one by one, in the order of the data; a limit takes a balanced spread over all of it."""

    @abstractmethod
    def correct(self, answer: str, sample: Sample) -> float:
        """Score one answer of a model, 0 to 1. Confidence intervals and paired comparisons are made of these."""

    def cut(self, text: str) -> str:
        """The part of a model's text that is scored, without white space at its ends."""
        return before_stops(text, self.until)

    def is_settled(self, text: str) -> bool:
        """Whether every answer that goes on from this text scores alike, so that decoding may stop. False if in doubt."""
        return False

    @abstractmethod
    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Compute the benchmark's numbers: "score" is the headline, the others are the official sub-metrics.

        Args:
            records: one per sample, with keys sample_id, kind, group, answer (ground truth), text (the model's answer)
                and correct. No record at all is a ValueError.
        """

    def summary_of_draw(self, records: Sequence[dict[str, Any]], kinds: Collection[str]) -> dict[str, float]:
        """The summary of a resampling of samples of these `kinds`.

        Tasks whose numbers a missing kind lowers override it: a resampling of a few samples often lacks one.
        """
        return self.summary(records)


def before_stops(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string, without white space at its ends."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()


def accuracy_of(records: Sequence[dict[str, Any]], task: str) -> dict[str, float]:
    """The mean of `correct` in percent: "score" over all records, and under its name that of each kind.

    No record at all is a ValueError.
    """
    if not records:
        raise ValueError(f"{task} has no record to score; evaluate at least one sample")
    by_kind: dict[str, list[float]] = defaultdict(list)
    for record in records:
        by_kind[record["kind"]].append(record["correct"])
    kinds = {kind: 100 * fmean(by_kind[kind]) for kind in sorted(by_kind) if kind}
    return {"score": 100 * fmean(record["correct"] for record in records), **kinds}


def spread(strata: Sequence[tuple[str, ...]], limit: int) -> list[int]:
    """Choose `limit` positions, the same number from every stratum and evenly spaced within it, in ascending order.

    A stratum that is too small gives all it has, and the others share the rest. When the limit does not divide, the
    strata that sort first give one more.
    """
    if limit < 1:
        raise ValueError(f"a limit of {limit} leaves nothing to evaluate; it must be 1 or more (None takes everything)")
    members: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for position, stratum in enumerate(strata):
        members[stratum].append(position)
    ordered = [members[stratum] for stratum in sorted(members)]
    quotas = equal_shares([len(stratum) for stratum in ordered], limit)
    return sorted(
        stratum[index * len(stratum) // quota]
        for stratum, quota in zip(ordered, quotas, strict=True)
        for index in range(quota)
    )


def equal_shares(sizes: Sequence[int], total: int) -> list[int]:
    shares = [0] * len(sizes)
    remaining = min(total, sum(sizes))
    while remaining:
        open_strata = [index for index, size in enumerate(sizes) if shares[index] < size]
        for index in open_strata[:remaining]:
            shares[index] += 1
        remaining -= min(remaining, len(open_strata))
    return shares
