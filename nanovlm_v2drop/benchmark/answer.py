"""The first answer of a whole model: seconds of loading, tower, prefill and decoding, and the memory of the process.

    python -m nanovlm_v2drop.benchmark.checkpoint llava-1.5-7b NOISE
    python -m nanovlm_v2drop.benchmark.answer NOISE --dtype int8
    python -m nanovlm_v2drop.benchmark.answer NOISE --dtype int8 --methods dense --repeats 3

load: from the call of `load` until it returns.
vision: from pixel values to the decoder's input: tower, projector and embeddings.
prefill: from the decoder's input to the logits of the first token.
decode: all further tokens of the answer.
answer: the three together. The first answer also packs weights in bfloat16, so it is reported by itself (first), beside the
    fastest one.
peak: the highest anonymous memory (RssAnon) of the process, loading included, sampled every few milliseconds. Linux only.
mapped: the highest memory of mapped files. The kernel can take these pages back at any time.

The process answers one question about one picture of noise. It must not have loaded anything before, so compare dtypes by
several commands.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

import torch

from ..dropping import TokenDropper
from ..dropping.budget import Budget, shapes_of
from ..evaluation.plans import DENSE, find_methods
from ..inference import decode_tokens, prefill
from ..loading.specs import WeightsUnavailable
from ..loading.zoo import VisionLanguageModel, load
from ..models.vlm import PackedInputs
from ..processing.prompts import Request
from .memory import MARKS, resident
from .picture import Prompt, noise_picture
from .run import check_counts, print_rows

QUESTION, SIDE = "What is in the picture?", 1024
EVERY = 0.005  # seconds between two looks at the memory


class PeakMemory(AbstractContextManager["PeakMemory"]):
    """The highest of each mark of memory.MARKS, in MB, while the context lives."""

    def __init__(self) -> None:
        self.peaks = dict.fromkeys(MARKS.values(), 0.0)
        self.ended = Event()
        self.thread = Thread(target=self.watch, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ended.set()
        self.thread.join()

    def watch(self) -> None:
        while True:
            for name, size in resident("self").items():
                self.peaks[name] = max(self.peaks[name], size)
            if self.ended.wait(EVERY):
                return


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """One row. Raises what `load` raises, and ValueError for a method or a budget that cannot be used."""
    with PeakMemory() as memory:
        started = time.perf_counter()
        vlm = load(args.folder, dtype=args.dtype, kv_cache_dtype=args.kv_cache_dtype)
        loaded = time.perf_counter() - started
        prompt = Prompt(*vlm.tokens_and_media(picture_request()))
        answers = [answer_seconds(vlm, prompt, args) for _ in range(args.repeats)]
    first, fastest = answers[0], min(answers, key=lambda seconds: seconds["answer_s"])
    row = {"program": f"{args.methods} {vlm.precision.name}", "load_s": loaded, "first_answer_s": first["answer_s"], **fastest}
    return {**row, **{f"peak_{name}": size for name, size in memory.peaks.items()}}


def picture_request() -> Request:
    return Request(QUESTION, images=[noise_picture(SIDE, SIDE)])


@torch.no_grad()
def answer_seconds(vlm: VisionLanguageModel, prompt: Prompt, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the parts of one answer of exactly so many tokens."""
    decoder, times = vlm.model.language_model, [time.perf_counter()]
    packed = prompt.packed(vlm)
    times.append(time.perf_counter())
    dropper = dropper_of(args, packed, decoder.config.num_hidden_layers)
    prefilled = prefill(decoder, packed, dropper, max_new_tokens=args.new_tokens)
    tokens = decode_tokens(decoder, prefilled)
    next(tokens)
    times.append(time.perf_counter())
    for _ in range(args.new_tokens - 1):
        next(tokens)
    times.append(time.perf_counter())
    names = ("vision_s", "prefill_s", "decode_s")
    parts = {name: end - start for name, start, end in zip(names, times, times[1:], strict=False)}
    return {**parts, "answer_s": times[-1] - times[0]}


def dropper_of(args: argparse.Namespace, packed: PackedInputs, num_layers: int) -> TokenDropper | None:
    (method,) = find_methods([args.methods])
    return None if method is None else Budget(tokens=args.tokens).dropper(method, shapes_of(packed, num_layers))


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m nanovlm_v2drop.benchmark.answer", description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="a checkpoint, such as one of benchmark.checkpoint")
    parser.add_argument("--dtype", default="auto", help="default: %(default)s")
    parser.add_argument("--kv-cache-dtype", default="auto", help="default: %(default)s")
    parser.add_argument("--methods", default="v2drop", help=f"one method, or {DENSE}; default: %(default)s")
    parser.add_argument("--tokens", type=float, default=192, help="mean vision tokens a layer; default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of the answer; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=1, help="answers; default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_counts(args, "new_tokens", "repeats", "threads")
        torch.set_num_threads(args.threads)
        row = measured(args)
    except (ValueError, OSError, WeightsUnavailable) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print_rows([row])


if __name__ == "__main__":
    main()
