"""LongVideoBench: 1,337 multiple-choice questions (validation split) about videos of up to an hour, without subtitles.

Paper: https://arxiv.org/abs/2407.15754. Data, prompt and scoring follow lmms-eval's longvideobench_val_v task, with one
exception: for an answer without a letter that task draws an option from Python's global generator, in threads, so that no two
runs agree. Here the option is drawn with the question's id as the seed: every run and every method draws the same one.
"""

import re
from collections.abc import Sequence
from random import Random

from .base import Sample
from .multiple_choice import LETTER_PROMPT, LETTERS, option_lines
from .parquet import DatasetUnavailable, read_rows, unique_ids
from .rows import Row
from .video_files import VideoTask

OPTIONS = tuple(f"option{number}" for number in range(5))
ABSENT = "N/A"
PHRASES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is"),
    *("The correct option is", "Best answer:", "Best option:"),
)


class LongVideoBench(VideoTask):
    """LongVideoBench: the first of the letters A to E in an answer counts, even within a word ("Because" is B)."""

    name = "longvideobench"
    max_new_tokens = 32
    repo_id = "longvideobench/LongVideoBench"
    split = "validation"
    columns = ("id", "video_path", "question", *OPTIONS, "correct_choice", "duration_group")
    kind_columns = ("duration_group",)

    def sample_ids(self) -> list[str]:
        rows = list(read_rows(self.row_files, ("id",)))
        return unique_ids([row.key("id") for row in rows], rows)

    def sample(self, row: Row) -> Sample:
        options = [text for option in OPTIONS if (text := row.key(option)) != ABSENT]
        video = row.text("video_path")
        return Sample(
            sample_id=row.sample_id,
            text=f"{row.text('question')}\n{option_lines(options)}{LETTER_PROMPT}\n",
            images=(),
            answer=row.letter("correct_choice", len(options)),
            kind=row.key("duration_group"),
            group=video,
            video=self.video([f"videos/{video}"], row),
            references=tuple(LETTERS[: len(options)]),
        )

    def fetch_videos(self, names: Sequence[str]) -> None:
        raise DatasetUnavailable(
            f"{self.repo_id} holds its videos in parts of one tar file: hf download {self.repo_id} --repo-type dataset "
            "--local-dir DIR, then in DIR cat videos.tar.part.* | tar -x, then pass --data DIR"
        )

    def correct(self, answer: str, sample: Sample) -> float:
        for phrase in PHRASES:
            answer = answer.replace(phrase, "")
        found = re.search("[ABCDE]", answer)
        letter = Random(sample.sample_id).choice(sample.references) if found is None else found[0]
        return float(letter == sample.answer)
