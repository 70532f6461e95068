"""The prefill loop with its drop points, decoding, and answers to requests."""

from .chat import Chat, Turn
from .conversation import HISTORIES, ConversationBatch
from .decoding import GraphedSteps, decode_one_token, decode_step, decode_steps
from .generation import (
    Answer,
    Sampling,
    check_options,
    decode_tokens,
    decode_until,
    generate,
    padded_answers,
    stream,
    teacher_forced,
)
from .prefill_loop import (
    MAX_NEW_TOKENS,
    NotFinite,
    NothingDropped,
    Prefilled,
    SharedPrefix,
    initial_state,
    prefill,
    share_prefix,
)
from .turn import prefill_turn

__all__ = [
    "HISTORIES",
    "MAX_NEW_TOKENS",
    "Answer",
    "Chat",
    "ConversationBatch",
    "GraphedSteps",
    "NotFinite",
    "NothingDropped",
    "Prefilled",
    "Sampling",
    "SharedPrefix",
    "Turn",
    "check_options",
    "decode_one_token",
    "decode_step",
    "decode_steps",
    "decode_tokens",
    "decode_until",
    "generate",
    "initial_state",
    "padded_answers",
    "prefill",
    "prefill_turn",
    "share_prefix",
    "stream",
    "teacher_forced",
]
