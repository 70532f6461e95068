"""Video-MME: 2,700 multiple-choice questions about 900 videos of 11 seconds to an hour, without subtitles.

Paper: https://arxiv.org/abs/2405.21075. Data, prompt and scoring follow lmms-eval's videomme task.
"""

from .base import Sample
from .multiple_choice import LETTER_PROMPT, begins_with_letter, letter_in
from .rows import Row
from .video_files import VideoTask

PROMPT = (  # lmms-eval names subtitles here although this task has none
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
SUFFIXES = ("mp4", "MP4", "mkv")


class VideoMme(VideoTask):
    """Video-MME as lmms-eval asks and scores it. The options stand with their letters in the data."""

    name = "videomme"
    max_new_tokens = 16
    repo_id = "lmms-eval/Video-MME"
    columns = ("videoID", "question", "options", "answer", "duration")
    kind_columns = ("duration",)
    key_metrics = ("short", "medium", "long")

    def sample(self, row: Row) -> Sample:
        options, video = "\n".join(row.options("options")), row.text("videoID")
        return Sample(
            sample_id=row.sample_id,
            text=f"{PROMPT}\n{row.text('question')}\n{options}\n{LETTER_PROMPT}",
            images=(),
            answer=row.one_of("answer", "ABCD"),
            kind=row.text("duration"),
            group=video,
            video=self.video([f"data/{video}.{suffix}" for suffix in SUFFIXES], row),
        )

    def correct(self, answer: str, sample: Sample) -> float:
        return float(letter_in(answer) == sample.answer)

    def is_settled(self, text: str) -> bool:
        return begins_with_letter(text)
