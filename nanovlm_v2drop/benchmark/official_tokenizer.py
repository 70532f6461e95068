"""A tokenizer of bytes for checkpoints of noise."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE


def byte_tokenizer(first: Sequence[str], size: int, special: Sequence[str]) -> Tokenizer:
    """The `first` tokens, the bytes, and invented words up to `size` tokens; behind them the `special` ones that are new."""
    pieces = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"<unused{number}>" for number in range(size - len(pieces))]
    tokenizer = Tokenizer(BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer
