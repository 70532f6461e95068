"""What was said in a conversation, as its model reads it: the token ids of all turns, and their pictures and videos."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..models.vlm import VisionInput
from ..processing.images import PlannedMedium
from ..processing.prompts import Content, Exchange, Medium, Request, content_of

if TYPE_CHECKING:
    from ..loading.zoo import VisionLanguageModel


@dataclass(frozen=True)
class Written:
    """A conversation up to its open question: token ids, and the media in the order of their tokens and by their marks."""

    token_ids: list[int]
    media: list[VisionInput]
    by_mark: Mapping[str, Sequence[VisionInput]]


@dataclass
class Transcript:
    """The turns of one conversation. `images` and `videos` are those of all turns, `held` what was decoded of them.

    `shown` are the pictures and videos of turns that were forgotten. They come before the next question.
    """

    vlm: "VisionLanguageModel"
    turns: list[Exchange] = field(default_factory=list)
    shown: list[str | Medium] = field(default_factory=list)
    images: list = field(default_factory=list)
    videos: list = field(default_factory=list)
    held: Mapping[str, Sequence[VisionInput]] = field(default_factory=dict)

    def write(self, request: Request) -> Written:
        """The conversation with a new question; raises ValueError as `VisionLanguageModel.prepare` and for a ready prompt."""
        if request.prompt is not None:
            raise ValueError("a turn of a conversation is asked by its text; the chat template is applied here")
        leading, question = self.content(request)
        marks = self.vlm.config.marks
        prompt = self.vlm.conversation.write(leading, question, marks, self.turns)
        videos = [*self.videos, *request.videos]
        whole = Request(
            prompt=prompt, images=[*self.images, *request.images], video=videos[0] if len(videos) == 1 else videos or None
        )
        return self.read(prompt, self.vlm.planned_media(whole))

    def content(self, request: Request) -> tuple[Content, Content]:
        """What comes before the question, and the question."""
        leading, question = content_of(request, self.vlm.config.marks)
        return [*self.shown, *leading], question

    def read(self, prompt: str, planned: Mapping[str, Sequence[PlannedMedium]]) -> Written:
        """The prompt as token ids. Pictures and videos of earlier turns are decoded once."""
        token_ids, ordered = self.vlm.encode(prompt, planned)
        self.vlm.check_prompt(token_ids, sum(medium.num_tokens for medium in ordered))
        media = {mark: [self.decoded(mark, *plan) for plan in enumerate(plans)] for mark, plans in planned.items()}
        return Written(*self.vlm.encode(prompt, media), media)

    def decoded(self, mark: str, number: int, plan: PlannedMedium) -> VisionInput:
        held = self.held.get(mark, ())
        if number < len(held) and (held[number].grids, held[number].text) == (plan.grids, plan.text):
            return held[number]
        return plan.read()

    def answered(self, request: Request, written: Written, answer: str) -> None:
        """Remember a question, as it was written, and its answer."""
        leading, question = self.content(request)
        self.turns.append(Exchange(leading, question, answer))
        self.images += request.images
        self.videos += request.videos
        self.held, self.shown = written.by_mark, []

    def forget(self) -> None:
        """Forget what was said; pictures and videos stay."""
        pieces = [piece for turn in self.turns for piece in (*turn.leading, *turn.question)]
        self.shown += [piece for piece in pieces if isinstance(piece, Medium)]
        self.turns = []
