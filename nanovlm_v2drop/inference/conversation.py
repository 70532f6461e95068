"""Conversations whose KV cache is kept from turn to turn.

Every turn writes the whole conversation with its chat template. The cache is cropped to the tokens that are the same as before,
and only the others are prefilled behind it.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from ..dropping.base import TokenDropper
from ..dropping.budget import Budget, shapes_of
from ..dropping.schedule import DropSchedule
from ..models.kv_cache import KVCache
from ..models.vlm import PackedInputs, VisionInput
from ..processing.prompts import Request
from .generation import Answer, kept_by
from .prefill_loop import MAX_NEW_TOKENS, Prefilled, prefill
from .transcript import Transcript, Written
from .turn import check_decoder, prefill_turn

if TYPE_CHECKING:
    from ..loading.zoo import VisionLanguageModel

# What later questions see: the cache as the method leaves it; the same without the dropped tokens' entries in the layers before
# their drop; or the whole conversation again, so that the method chooses anew with the new question. The first is the default.
HISTORIES = ("keep-cache", "cut-cache", "re-prefill")
INTERRUPTED = "the last turn ended with an error or an interrupt, so its cache was not kept"


@dataclass
class Cached:
    """The tokens of one conversation whose keys and values are in the cache, dropped ones included, and their pictures.

    `prompt_length` is the number of tokens of the last prompt that was prefilled from its beginning.
    """

    token_ids: list[int]
    media: list[VisionInput]
    prompt_length: int


class ConversationBatch:
    """Conversations with one model that go on together, turn by turn, over one cache. `Chat` holds a single conversation.

    Args:
        dropper: as in `generate`, for the vision tokens of every turn. A turn without pictures drops nothing.
        budget: of a dropper that is a class.
        history: what later questions see, one of HISTORIES.
    """

    def __init__(
        self,
        vlm: "VisionLanguageModel",
        size: int,
        dropper: TokenDropper | type[TokenDropper] | None,
        budget: Budget | None,
        history: str = HISTORIES[0],
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        """Raises ValueError for an unknown history, for a cut that the method cannot make, and for a CUDA graph."""
        if history not in HISTORIES:
            raise ValueError(f"unknown history {history!r}; choose one of: {', '.join(HISTORIES)}")
        check_decoder(vlm.model.language_model)
        self.vlm, self.budget, self.history, self.max_new_tokens = vlm, budget, history, max_new_tokens
        self.dropper = with_cut(dropper) if history == "cut-cache" else dropper
        self.transcripts = [Transcript(vlm) for _ in range(size)]
        self.cache: KVCache | None = None
        self.cached: list[Cached] = []
        self.loss = ""  # why there is no cache
        self.open: list[tuple[Request, Written]] = []  # questions that are prefilled and not yet answered
        self.reused = [0] * size  # tokens of each conversation that were in the cache at the last prefill
        self.note = ""  # why the last prefill reused nothing, although the cache is kept

    def prefill(self, requests: Sequence[Request]) -> tuple[Prefilled, DropSchedule]:
        """The next question of every conversation through every layer, and the schedule by which vision tokens left.

        Raises ValueError as `VisionLanguageModel.prepare`, OutOfReach and NotFinite as `generate`. An error leaves what was
        said as it was. Unless the question itself cannot be read, it frees the cache.
        """
        written = [transcript.write(request) for transcript, request in zip(self.transcripts, requests, strict=True)]
        self.reused, self.note = self.reusable(written)
        try:
            prefilled, schedule = self.prefill_behind(written) if all(self.reused) else self.prefill_whole(written)
        except BaseException:  # an interrupt may come while rows are put into some layers and not yet into others
            self.drop_cache(INTERRUPTED)
            raise
        self.cache, self.loss = prefilled.cache, ""
        self.open = list(zip(requests, written, strict=True))
        return prefilled, schedule

    def reusable(self, written: Sequence[Written]) -> tuple[list[int], str]:
        """How many of the tokens of each conversation the cache can give; zeros and the reason where it cannot."""
        nothing = [0] * len(written)
        if self.history == "re-prefill":
            return nothing, ""
        if self.cache is None:
            return nothing, self.loss
        vision_tokens = frozenset(self.vlm.config.vision_tokens.values())
        counts = [reusable_length(*pair, vision_tokens) for pair in zip(self.cached, written, strict=True)]
        if not all(counts):
            return nothing, "the earlier turns or their pictures are written in another way now"
        pairs = list(zip(self.cached, written, counts, strict=True))
        crops_prompt = any(count < cached.prompt_length for cached, _, count in pairs)
        shows_more = any(len(written.media) > len(cached.media) for cached, written, _ in pairs)
        prunes = self.dropper is not None and self.dropper.prunes_while_decoding()
        if (self.cache.pruning is not None and crops_prompt) or (prunes and shows_more):
            return nothing, "the method prunes while decoding, and what it reads is not in place"
        return counts, ""

    def prefill_whole(self, written: Sequence[Written]) -> tuple[Prefilled, DropSchedule]:
        """Whole conversations through the decoder, and the schedule by which vision tokens left."""
        packed = self.vlm.pack([each.token_ids for each in written], [each.media for each in written])
        dropper = self.dropper_for(packed)
        self.drop_cache()
        prefilled = prefill(self.vlm.model.language_model, packed, dropper, max_new_tokens=self.max_new_tokens)
        self.cached = [Cached(each.token_ids, each.media, len(each.token_ids)) for each in written]
        return prefilled, DropSchedule({}) if dropper is None else dropper.schedule

    def prefill_behind(self, written: Sequence[Written]) -> tuple[Prefilled, DropSchedule]:
        """The same with the tokens that the cache does not hold; it is cropped to the others."""
        assert self.cache is not None  # `reusable`
        groups = list(zip(self.cached, written, self.reused, strict=True))
        packed = self.vlm.pack(
            [each.token_ids[count:] for _, each, count in groups], [each.media[len(own.media) :] for own, each, _ in groups]
        )
        dropper = self.dropper_for(packed)
        self.crop(self.reused)
        prefilled = prefill_turn(self.vlm.model.language_model, packed, self.cache, dropper)
        self.cached = [Cached(each.token_ids, each.media, own.prompt_length) for own, each, _ in groups]
        return prefilled, DropSchedule({}) if dropper is None else dropper.schedule

    def dropper_for(self, packed: PackedInputs) -> TokenDropper | None:
        """The dropper of a turn; None for a turn without pictures. Raises OutOfReach for a budget below the method's floor."""
        if self.dropper is None or not any(packed.vision_counts):
            return None
        if isinstance(self.dropper, TokenDropper):
            return self.dropper
        assert self.budget is not None  # check_options
        return self.budget.dropper(self.dropper, shapes_of(packed, self.vlm.config.text_config.num_hidden_layers))

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep the first `lengths` tokens of the conversations in the cache. The others must be text."""
        assert self.cache is not None
        self.cache.crop([len(own.token_ids) - length for own, length in zip(self.cached, lengths, strict=True)])
        for own, length in zip(self.cached, lengths, strict=True):
            own.token_ids = own.token_ids[:length]

    def answered(self, sequences: Sequence[list[int]], schedule: DropSchedule, prefilled: Prefilled) -> list[Answer]:
        """Take decoded tokens, end-of-sequence included, as the answers to the open questions."""
        answers = []
        for index, ids in enumerate(sequences):
            text = self.vlm.tokenizer.decode(ids).strip()
            answers.append(Answer(text, ids, kept_by(prefilled, schedule, index)))
            self.transcripts[index].answered(*self.open[index], text)
        if self.cache is not None:
            self.keep_decoded(self.cache, sequences)
        return answers

    def keep_decoded(self, cache: KVCache, sequences: Sequence[list[int]]) -> None:
        """Count in the answers' tokens that went through the decoder, and remove what followed them in shorter answers."""
        longest = max(map(len, sequences))
        cache.crop([longest - len(ids) for ids in sequences])  # the token that was chosen last never went through
        for own, ids in zip(self.cached, sequences, strict=True):
            own.token_ids = [*own.token_ids, *ids[:-1]]

    def drop_cache(self, reason: str = "") -> None:
        """Free the cache: the next question prefills its whole conversation, and its note gives the reason."""
        self.cache, self.cached, self.loss = None, [], reason

    def forget(self) -> None:
        """Forget what was said in all conversations; pictures and videos stay, in the cache too."""
        for transcript in self.transcripts:
            transcript.forget()


def reusable_length(cached: Cached, written: Written, vision_tokens: Collection[int]) -> int:
    """How many of the conversation's tokens are in the cache and can stay; 0 where a picture would have to leave.

    One token at least is left to prefill, because its logits are needed.
    """
    same = all(one is other for one, other in zip(cached.media, written.media, strict=False))
    common = common_length(cached.token_ids, written.token_ids[:-1])
    leaves = any(token in vision_tokens for token in cached.token_ids[common:])
    return common if same and len(cached.media) <= len(written.media) and not leaves else 0


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first items two sequences share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def with_cut(dropper: TokenDropper | type[TokenDropper] | None) -> TokenDropper | type[TokenDropper] | None:
    """The method with `cut_cache`; raises ValueError where earlier caches have no rows for what it leaves."""
    if dropper is None:
        return None
    if isinstance(dropper, type):
        return dropper.configured(cut_cache=True)
    for part in getattr(dropper, "droppers", (dropper,)):
        part.check_cut(True)
    cutting = copy.copy(dropper)
    cutting.cut_cache = True
    return cutting
