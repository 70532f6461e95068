"""One picture through a whole checkpoint, beside transformers on the same weights and the same pixels.

    python -m nanovlm_v2drop.benchmark.checkpoint smolvlm-256m NOISE
    python -m nanovlm_v2drop.benchmark.picture NOISE

vision: from pixel values to the decoder's input: tower, connector and embeddings.
prefill: from the decoder's input to the logits of the first token.
first token: both together.
decode: one token, from the cache of the own prefill.
peak: the highest resident memory of a process that loads the checkpoint and answers the picture with a few tokens.

Everything is timed in one process, once per round, in an order that rotates. Times are minima over the rounds. Our dense logits
must equal those of transformers. Memory is measured in a process of its own for each row.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..dropping import TokenDropper, V2Drop
from ..dropping.budget import Budget, shapes_of
from ..evaluation.machine import peak_memory_mb
from ..evaluation.plans import DENSE
from ..inference import Prefilled, prefill
from ..loading.specs import WeightsUnavailable
from ..loading.zoo import VisionLanguageModel, load
from ..models.config import SmolVLMConfig
from ..models.vlm import PackedInputs, VisionInput
from ..processing.prompts import Request
from .contenders import Run, compare_logits, decode_and_rewind, transformers_decode_and_rewind
from .loading import output_of
from .measure import time_rounds
from .run import check_counts, numbers, print_rows

CPU = torch.device("cpu")
QUESTION, DECODED = "What is in the picture?", 8
TRANSFORMERS = "transformers sdpa"


@dataclass(frozen=True)
class Program:
    """One row: `first` gives what `decode` needs, from pixels; `vision` and `prefill` are its two parts."""

    name: str
    vision: Run
    prefill: Run
    first: Run
    decode: Callable[[Any], Run]


@dataclass(frozen=True)
class Prompt:
    """A picture and a question as the model reads them."""

    token_ids: list[int]
    media: list[VisionInput]

    def packed(self, vlm: VisionLanguageModel) -> PackedInputs:
        return vlm.model.pack([self.token_ids], [self.media], (0,))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Token ids (1, T) and pixels (1, tiles, 3, S, S)."""
        return torch.tensor([self.token_ids]), torch.cat([medium.pixel_values for medium in self.media])[None]


def noise_picture(width: int, height: int) -> Image.Image:
    """Smooth noise, as large as a photo."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def our_program(vlm: VisionLanguageModel, prompt: Prompt, name: str, retain: float | None) -> Program:
    """Our model, dense or with V2Drop at a mean share of the picture's tokens."""
    decoder, packed = vlm.model.language_model, prompt.packed(vlm)
    dropper = dropper_at(retain, packed, decoder.config.num_hidden_layers)

    def filled(given: PackedInputs) -> Prefilled:
        return prefill(decoder, given, dropper, max_new_tokens=DECODED)

    decode = partial(decode_and_rewind, decoder, DECODED)
    return Program(name, lambda: prompt.packed(vlm), lambda: filled(packed), lambda: filled(prompt.packed(vlm)), decode)


def dropper_at(retain: float | None, packed: PackedInputs, num_layers: int) -> TokenDropper | None:
    return None if retain is None else Budget(retain=retain).dropper(V2Drop, shapes_of(packed, num_layers))


def transformers_program(
    folder: Path, dtype: str, input_ids: Tensor, pixel_values: Tensor, inputs_embeds: Tensor | None = None
) -> Program:
    """AutoModelForImageTextToText on token ids (1, T), pixels (1, tiles, 3, S, S) and the same as `inputs_embeds` (1, T, D)."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    pixels = pixel_values.to(getattr(torch, dtype))

    def answered(**given: Any) -> Any:
        output = model.model(**given, use_cache=True)
        output.logits = model.lm_head(output.last_hidden_state[:, -1])  # faster than logits_to_keep, see contenders.py
        return output

    return Program(
        TRANSFORMERS,
        lambda: model.model.get_image_features(pixels),
        lambda: answered(inputs_embeds=inputs_embeds),
        lambda: answered(input_ids=input_ids, pixel_values=pixels),
        partial(transformers_decode_and_rewind, model, DECODED),
    )


def programs_of(folder: Path, dtype: str, picture: Path, shares: Sequence[float]) -> list[Program]:
    """Ours and transformers' on one picture.

    Raises ValueError for a checkpoint of another family, RuntimeError where the two compute different logits.
    """
    vlm = load(folder, dtype=dtype)
    if not isinstance(vlm.config, SmolVLMConfig):
        raise ValueError(f"{folder} is no checkpoint of the SmolVLM family; only their pixels are compared here")
    prompt = prompt_of(vlm, picture)
    ours = [our_program(vlm, prompt, name, share) for name, share in budgets_of(shares).items()]
    reference = transformers_program(folder, dtype, *prompt.tensors(), prompt.packed(vlm).inputs_embeds[None])
    compare_logits(ours[0].first().logits[0], reference.first().logits[0])
    return [replace(program, name=f"{program.name} {dtype}") for program in (*ours, reference)]


def budgets_of(shares: Sequence[float]) -> dict[str, float | None]:
    """The shares of the vision tokens by the names of our programs; None for dense."""
    return {DENSE: None, **{f"v2drop@{100 * share:.4g}%": share for share in shares}}


def prompt_of(vlm: VisionLanguageModel, picture: Path) -> Prompt:
    return Prompt(*vlm.tokens_and_media(Request(QUESTION, images=[picture])))


@torch.inference_mode()
def run_picture(
    folder: Path, picture: Path, dtypes: Sequence[str], shares: Sequence[float], repeats: int
) -> list[dict[str, Any]]:
    """A row for each program and dtype, without memory. Raises what `load` and `programs_of` raise."""
    programs = [program for dtype in dtypes for program in programs_of(folder, dtype, picture, shares)]
    rows: dict[str, dict[str, Any]] = {each.name: {"program": each.name} for each in programs}
    for part, runs in timed_parts(programs).items():
        for name, seconds in time_rounds(runs, repeats, CPU).items():
            rows[name][part] = 1e3 * min(seconds) / (DECODED if part.startswith("decode") else 1)
    for name, row in rows.items():
        row.setdefault("vision_ms", rows[f"{DENSE} {name.split()[-1]}"]["vision_ms"])
    return list(rows.values())


def timed_parts(programs: Sequence[Program]) -> dict[str, dict[str, Run]]:
    return {
        # V2Drop changes nothing before the decoder.
        "vision_ms": {each.name: each.vision for each in programs if each.name.split()[0] in (DENSE, "transformers")},
        "prefill_ms": {each.name: each.prefill for each in programs},
        "first_token_ms": {each.name: each.first for each in programs},
        "decode_ms_per_token": {each.name: each.decode(each.prefill()) for each in programs},
    }


def peak_apart(folder: Path, picture: Path, dtype: str, name: str, retain: float | None) -> float:
    """Peak MB of a new process that loads the checkpoint and answers with the program of this name."""
    with TemporaryDirectory(prefix="nanovlm-picture-") as place:
        prompt = Path(place) / "prompt.safetensors"
        if name == TRANSFORMERS:
            input_ids, pixel_values = prompt_of(load(folder, dtype=dtype), picture).tensors()
            save_file({"input_ids": input_ids, "pixel_values": pixel_values}, prompt)
        paths = f"Path({str(folder)!r}), Path({str(picture)!r}), Path({str(prompt)!r})"
        call = f"peak_of_program({paths}, {dtype!r}, {name!r}, {retain}, {torch.get_num_threads()})"
        return float(output_of(f"from nanovlm_v2drop.benchmark.picture import *; print({call})"))


@torch.inference_mode()
def peak_of_program(
    folder: Path, picture: Path, prompt: Path, dtype: str, name: str, retain: float | None, threads: int
) -> float:
    """Peak MB of this process, which must not have loaded anything before. transformers reads pixels and ids from `prompt`."""
    torch.set_num_threads(threads)
    if name == TRANSFORMERS:
        own = transformers_program(folder, dtype, **load_file(prompt))
    else:
        vlm = load(folder, dtype=dtype)
        own = our_program(vlm, prompt_of(vlm, picture), name, retain)
    own.decode(own.first())()
    return peak_memory_mb(CPU)


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m nanovlm_v2drop.benchmark.picture", description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="a checkpoint of the SmolVLM family")
    parser.add_argument("--image", type=Path, help="a picture; default: noise of 2048 x 1536 pixels")
    parser.add_argument("--retain", default="0.3333,0.1111", help="shares of the vision tokens; default: %(default)s")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        run_and_print(args)
    except (ValueError, OSError, WeightsUnavailable) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def run_and_print(args: argparse.Namespace) -> None:
    """Raises ValueError and OSError for a folder, a picture or a number that cannot be used, and what `load` raises."""
    check_counts(args, "repeats", "threads")
    torch.set_num_threads(args.threads)
    dtypes, shares = args.dtypes.split(","), numbers("--retain", args.retain)
    with TemporaryDirectory(prefix="nanovlm-picture-") as place:
        picture = args.image or Path(place) / "noise.png"
        if args.image is None:
            noise_picture(2048, 1536).save(picture)
        rows = run_picture(args.folder, picture, dtypes, shares, args.repeats)
        retained = {**budgets_of(shares), TRANSFORMERS: None}
        for row, (dtype, name) in zip(rows, product(dtypes, retained), strict=True):
            row["peak_mb"] = peak_apart(args.folder, picture, dtype, name, retained[name])
    print_rows(rows)


if __name__ == "__main__":
    main()
