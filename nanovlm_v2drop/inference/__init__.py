"""The prefill loop with its drop points, decoding, and answers to requests."""

from .decoding import GraphedSteps, decode_one_token, decode_step, decode_steps
from .generation import Answer, Sampling, check_options, decode_tokens, decode_until, generate, stream
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

__all__ = [
    "MAX_NEW_TOKENS",
    "Answer",
    "GraphedSteps",
    "NotFinite",
    "NothingDropped",
    "Prefilled",
    "Sampling",
    "SharedPrefix",
    "check_options",
    "decode_one_token",
    "decode_step",
    "decode_steps",
    "decode_tokens",
    "decode_until",
    "generate",
    "initial_state",
    "prefill",
    "share_prefix",
    "stream",
]
