"""The vision features of pictures that several questions share, computed once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from hashlib import blake2b

from ..models.vision import VisionTrace
from ..models.vlm import Encoded, VisionInput

TOWER_STATES = 4  # a trace holds at most as many times the memory of its hidden states: input, output, keys, attention


class SharedFeatures:
    """Runs each picture or video through the tower by itself, and keeps the features of the last ones, up to `limit` bytes.

    A picture's features therefore do not depend on the pictures beside it, nor on what is still kept: an interrupted run
    continues with the very numbers.
    """

    def __init__(self, encode: Callable[[Sequence[VisionInput]], list[Encoded]], limit: int) -> None:
        self.encode, self.limit = encode, limit
        self.kept: OrderedDict[bytes, Encoded] = OrderedDict()
        self.nbytes = 0

    def __call__(self, media: Sequence[VisionInput]) -> list[Encoded]:
        return [self.encoded(medium) for medium in media]

    def encoded(self, medium: VisionInput) -> Encoded:
        key = content_key(medium)
        if key not in self.kept:
            (found,) = self.encode([medium])
            self.keep(key, replace(found, traces=tuple(map(computed_once, found.traces))))
        self.kept.move_to_end(key)
        return self.kept[key]

    def keep(self, key: bytes, encoded: Encoded) -> None:
        """Add a picture. Those that were not used for the longest time make room for it. It always stays itself."""
        self.kept[key] = encoded
        self.nbytes += size_of(encoded)
        while self.nbytes > self.limit and len(self.kept) > 1:
            self.nbytes -= size_of(self.kept.popitem(last=False)[1])


def content_key(medium: VisionInput) -> bytes:
    """Equal for two media only where the model sees the same."""
    about = repr((medium.grids, medium.size, medium.is_video, medium.seconds_per_grid, medium.text, medium.overview))
    digest = blake2b(about.encode(), digest_size=16)
    digest.update(medium.pixel_values.contiguous().numpy().data)
    return digest.digest()


def computed_once(trace: VisionTrace) -> VisionTrace:
    """The trace, whose attention and keys are computed for the first method that asks, and kept for the others."""
    return replace(trace, received_attention=cache(trace.received_attention), keys=cache(trace.keys))


def size_of(encoded: Encoded) -> int:
    """The most bytes that a picture takes."""
    deepstack = 0 if encoded.deepstack is None else encoded.deepstack.nbytes
    return encoded.features.nbytes + deepstack + TOWER_STATES * sum(trace.hidden_states.nbytes for trace in encoded.traces)
