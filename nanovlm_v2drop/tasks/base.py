"""What every benchmark offers: samples, their number, and scoring."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from ..processing.images import open_image
from ..processing.prompts import Request
from ..processing.video import VideoSource

SHORT_ANSWER_PROMPT = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Sample:
    """One question about pictures or a video (a file, or its frames).

    `kind` is the category of a breakdown, `group` the picture by which paired metrics join, `answer` the ground truth.
    No two samples of a task have the same `sample_id`.
    """

    sample_id: str
    text: str
    images: tuple[Image.Image, ...]
    answer: str
    kind: str
    group: str = ""
    video: VideoSource | None = None

    @property
    def request(self) -> Request:
        return Request(text=self.text, images=self.images, video=self.video)


class Task(ABC):
    """A benchmark: its questions and its scoring. Made from the folder that holds its data, or None for the Hub."""

    name: str
    max_new_tokens: int
    default_samples: int | None = None  # what a run without a limit takes; None is everything
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
        return next(self.samples(2))  # MME's smallest limit: its questions come in pairs

    @abstractmethod
    def num_samples(self, limit: int | None = None) -> int:
        """How many samples a run with this limit takes, without reading one; None is a run without a limit."""

    @abstractmethod
    def samples(self, limit: int | None = None) -> Iterator[Sample]:
        """Give the samples one by one, in the order of the data; a limit takes a balanced spread over all of it."""

    @abstractmethod
    def correct(self, answer: str, sample: Sample) -> float:
        """Score one answer of a model, 0 to 1. Confidence intervals and paired comparisons are made of these."""

    @abstractmethod
    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Compute the benchmark's numbers: "score" is the headline, the others are the official sub-metrics.

        Args:
            records: one per sample, with keys sample_id, kind, group, answer (ground truth), text (the model's answer)
                and correct. No record at all is a ValueError.
        """


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


def decode_picture(cell: object, place: str) -> Image.Image:
    """A picture as data sets store it: {"bytes", "path"}, as the datasets library does, or the bytes alone; see open_image.

    Raises ValueError with the `place` of the cell for anything else and for damaged bytes.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes) or not data:
        kind = f"a {type(cell).__name__} without bytes" if isinstance(cell, dict | bytes) else shown(cell)
        raise ValueError(f"{place}: {kind} is not a picture; use parquet files with embedded pictures")
    try:
        return open_image(data)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def shown(value: object) -> str:
    """A value for a message, on one line and not too long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
