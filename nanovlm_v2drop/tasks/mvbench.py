"""MVBench: 20 kinds of multiple-choice questions about short videos, 200 of each.

Paper: https://arxiv.org/abs/2311.17005. Data, prompt and scoring follow lmms-eval's mvbench tasks. They read the branch `video`
of the data, whose clips are cut from `start` to `end` already, so these columns are not used. MVBench's number is the
unweighted mean of the kinds; lmms-eval prints each kind alone.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from .base import Sample, accuracy_of, spread
from .multiple_choice import LETTERS
from .parquet import fetch_file, files_from_hub
from .rows import Row, json_rows
from .video_files import VideoTask
from .vqa import without_punctuation

BRANCH = "video"
FOLDERS = {  # of the videos, by kind
    "action_antonym": "ssv2_video_mp4", "action_count": "perception/videos", "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment", "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos", "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos", "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation", "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation", "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment", "object_shuffle": "perception/videos", "scene_transition": "scene_qa/video",
    "state_change": "perception/videos", "unexpected_action": "FunQA_test/test",
}  # fmt: skip


class MvBench(VideoTask):
    """MVBench as lmms-eval asks and scores it; empty answers do not count, neither as right nor as wrong."""

    name = "mvbench"
    max_new_tokens = 16
    score_name = "mean accuracy of 20 kinds, %"
    repo_id = "OpenGVLab/MVBench"
    columns = ("video", "question", "candidates", "answer")

    @cached_property
    def row_files(self) -> Sequence[Path]:
        """One JSON file a kind. Raises FileNotFoundError for one that is missing in the folder given."""
        if self.data_dir is None:
            return files_from_hub(self.repo_id, ["json/*.json"], json_files, BRANCH)
        return json_files(self.folder)

    @cached_property
    def rows(self) -> list[Row]:
        rows = [row for file in self.row_files for row in json_rows(file, self.columns)]
        return [row.named(f"{row.file.stem}-{row.number}") for row in rows]

    def num_rows(self) -> int:
        return len(self.rows)

    def positions(self, limit: int | None) -> Collection[int]:
        everything = range(len(self.rows))
        return everything if limit is None else spread([(row.file.stem,) for row in self.rows], limit)

    def samples(self, limit: int | None = None) -> Iterator[Sample]:
        return (self.sample(self.rows[position]) for position in self.positions(limit))

    def sample(self, row: Row) -> Sample:
        kind, candidates, truth = row.file.stem, row.options("candidates"), row.text("answer")
        if truth not in candidates:
            raise ValueError(f"{row.place}: the answer {truth!r} is none of the candidates")
        options = "".join(f"({letter}) {text}\n" for letter, text in zip(LETTERS, candidates, strict=False))
        name = f"{FOLDERS[kind]}/{row.text('video')}"
        return Sample(
            sample_id=row.sample_id,
            text=f"Question:{row.text('question')}\nOption:\n{options}Only give the best option.\n",
            images=(),
            answer=LETTERS[candidates.index(truth)],
            kind=kind,
            group=name,
            video=self.video([name, f"data0613/{name}"], row),
        )

    def fetch_videos(self, names: Sequence[str]) -> None:
        """Fetch the first of these files that the branch has: it holds single files."""
        for name in names:
            fetch_file(self.repo_id, name, self.folder.name)
            if self.find([name]):
                return

    def correct(self, answer: str, sample: Sample) -> float:
        return float(letter_alone(answer) == sample.answer)

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """`score`: the unweighted mean of the kinds, in percent. Empty answers are left out; a kind with none else is 0."""
        asked = accuracy_of([{**record, "correct": 0.0} for record in records], self.name)
        given = [record for record in records if record["text"] != ""]
        kinds = {**asked, **(accuracy_of(given, self.name) if given else {})}
        pooled = kinds.pop("score")
        return {"score": fmean(kinds.values()), "pooled": pooled, **kinds}


def json_files(folder: Path) -> list[Path]:
    files = [folder / "json" / f"{kind}.json" for kind in FOLDERS]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file.parent} holds no {file.name}; fetch the branch {BRANCH} of {MvBench.repo_id} again")
    return files


def letter_alone(answer: str) -> str:
    """The letter, in any case, of an answer such as "a. text", else the first of A to E that stands alone, else ""."""
    if begins := re.match(r"([A-E])\.\s*.+$", answer.strip(), re.IGNORECASE):
        return begins[1].upper()
    text = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    for mark in "'\")(":
        text = text.strip(mark)
    alone = re.search(r"\b[a-e]\b", text.lower())
    return alone[0].upper() if alone else ""
