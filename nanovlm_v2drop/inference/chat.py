"""`Chat`: one question after the other about the same pictures, with the KV cache kept between the turns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image

from ..dropping.base import TokenDropper
from ..dropping.schedule import DropSchedule
from ..processing.prompts import Request
from ..processing.video import VideoSource
from .conversation import HISTORIES, INTERRUPTED, ConversationBatch
from .generation import GREEDY, Answer, Sampling, check_options, decode_tokens, pieces
from .prefill_loop import MAX_NEW_TOKENS, Prefilled

if TYPE_CHECKING:
    from ..loading.zoo import VisionLanguageModel


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    `cached_tokens` of the conversation came from the cache, `prefilled_tokens` went through the decoder before the answer; both
    count vision tokens before any drop. `note` says why the whole conversation was prefilled although its cache was kept.
    """

    question: Request
    answer: Answer
    cached_tokens: int
    prefilled_tokens: int
    note: str


class Chat:
    """A conversation with one model.

        chat = Chat(load("demo"), V2Drop, retain=1 / 3)
        print(chat.ask("What color is the circle?", images=["scene.png"]).text)
        print(chat.ask("What digit is on it?").text)

    Args:
        dropper, tokens, retain: as in `generate`, for the vision tokens of every turn.
        history: what later questions see of earlier turns, one of HISTORIES: "keep-cache", "cut-cache" or "re-prefill".

    Raises:
        TypeError, ValueError: as `generate`; an unknown history; a cut that the method cannot make; a CUDA graph.
    """

    def __init__(
        self,
        vlm: "VisionLanguageModel",
        dropper: TokenDropper | type[TokenDropper] | None = None,
        *,
        tokens: float | None = None,
        retain: float | None = None,
        history: str = HISTORIES[0],
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> None:
        budget = check_options(vlm, dropper, tokens, retain, max_new_tokens, sampling)
        self.vlm, self.max_new_tokens, self.sampling = vlm, max_new_tokens, sampling
        self.conversation = ConversationBatch(vlm, 1, dropper, budget, history, max_new_tokens)
        self.turns: list[Turn] = []  # since the beginning, or since `forget`
        self.streaming: Iterator[str] = iter(())

    def ask(
        self,
        text: str,
        images: Sequence[str | Path | Image] = (),
        video: VideoSource | Sequence[VideoSource] | None = None,
    ) -> Answer:
        """The answer to the next question, about its own pictures and videos and those of earlier turns.

        `kept` of the answer numbers the vision tokens that were prefilled for this question: those of the turn, or those of the
        whole conversation where it was prefilled again.

        Raises ValueError as `generate`, also where the whole conversation does not fit into the model's context. The
        conversation is then as it was; `forget` makes room.
        """
        for _ in self.stream(text, images, video):
            pass
        return self.turns[-1].answer

    def stream(
        self,
        text: str,
        images: Sequence[str | Path | Image] = (),
        video: VideoSource | Sequence[VideoSource] | None = None,
    ) -> Iterator[str]:
        """The same piece by piece. Of an answer that is not read to its end or is interrupted, the decoded part counts."""
        request = Request(text=text, images=images, video=video)
        self.end_stream()
        self.streaming = self.answering(request)
        return self.streaming

    def answering(self, request: Request) -> Iterator[str]:
        prefilled, schedule = self.conversation.prefill([request])
        decoded: list[int] = []
        try:
            yield from pieces(self.vlm.tokenizer, self.decode(prefilled, decoded))
        except GeneratorExit:
            raise
        except BaseException:  # in the middle of a token, layers may hold different numbers of rows
            self.conversation.drop_cache(INTERRUPTED)
            raise
        finally:
            self.remember(request, decoded, schedule, prefilled)

    def decode(self, prefilled: Prefilled, decoded: list[int]) -> Iterator[int]:
        """The tokens of the answer, which are added to `decoded` too."""
        steps = decode_tokens(self.vlm.model.language_model, prefilled, self.sampling)
        for (token,) in islice(steps, self.max_new_tokens):
            decoded.append(token)
            yield token
            if token in self.vlm.config.eos_token_ids:
                return

    def remember(self, request: Request, decoded: list[int], schedule: DropSchedule, prefilled: Prefilled) -> None:
        """Add the turn to the conversation, unless no token of its answer was decoded."""
        if not decoded:
            return
        (_, written), *_ = self.conversation.open
        (cached,) = self.conversation.reused
        (answer,) = self.conversation.answered([decoded], schedule, prefilled)
        self.turns.append(Turn(request, answer, cached, len(written.token_ids) - cached, self.conversation.note))

    @property
    def has_media(self) -> bool:
        """Whether a picture or video was shown in an earlier turn, forgotten ones included."""
        (transcript,) = self.conversation.transcripts
        return bool(transcript.images or transcript.videos)

    def end_stream(self) -> None:
        """End an answer that is still being streamed."""
        close = getattr(self.streaming, "close", None)
        if close is not None:
            close()

    def forget(self) -> None:
        """Forget what was said. Pictures and videos stay, in the cache too, and come before the next question."""
        self.end_stream()
        self.conversation.forget()
        self.turns = []
