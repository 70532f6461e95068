"""Do lazy tokens stay lazy with other weights? Each dtype against float32, with the same method, budget and prompts.

    python -m nanovlm_v2drop.research.precision --model demo --methods v2drop,fastv --limit 60

kept: the share of the vision tokens that float32 keeps behind a drop point and that this dtype keeps too, as a mean over the
    prompts, for each drop point. Prompts of which nothing is kept are left out. Methods that drop before the decoder have no
    drop point in it.
divergence: of the first answer token, from float32's distribution to this one's (Kullback-Leibler), in nats.
changed: prompts in which another first token is the likeliest.

The sums of the layers are in float32 with every dtype. transformers and the released codes of the methods keep them in the
dtype of the weights. `--rounded-sums` adds bfloat16 with such sums.

The last table compares what enters the decoder for vision tokens, which tower and projector have computed.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropping import TokenDropper
from ..dropping.budget import Budget
from ..evaluation.plans import DENSE, Plan, find_methods
from ..inference import prefill
from ..loading.specs import WeightsUnavailable
from ..loading.zoo import VisionLanguageModel, load
from ..processing.prompts import Request
from ..tasks import load_task
from .ablations import share_of_paper
from .theory import kl_divergence

REFERENCE, BATCH = "float32", 10
ROUNDED = "bfloat16, rounded sums"
PAPER_BUDGETS = (192, 128, 64)  # of 576 tokens; the same shares are asked for here
Kept = list[tuple[int, list[Tensor]]]


@dataclass(frozen=True)
class First:
    """What one dtype gives for a batch: log-probabilities (B, V) of the first token, and the kept tokens by drop point."""

    log_probabilities: Tensor
    kept: Kept


@dataclass(frozen=True)
class Comparison:
    """One dtype against float32; see the text above. `kept` is by layer."""

    method: str
    budget: str
    dtype: str
    kept: dict[int, float]
    divergence: float
    changed: int
    prompts: int


def plans_of(methods: Sequence[str]) -> list[Plan]:
    """Dense, if it is named, and each other method at the three budgets. Raises ValueError for an unknown method."""
    budgets = [share_of_paper(tokens) for tokens in PAPER_BUDGETS]
    kinds = find_methods(methods)
    dense = [Plan(DENSE)] if None in kinds else []
    return dense + [planned(kind, budget) for kind in kinds if kind is not None for budget in budgets]


def planned(method: type[TokenDropper], budget: Budget) -> Plan:
    return Plan(method.name, method, partial(budget.schedule, method), budget=budget)


@torch.no_grad()
def first_tokens(vlm: VisionLanguageModel, batches: Sequence[Sequence[Request]], plan: Plan) -> list[First]:
    """What the model gives for the first answer token of each batch of requests."""
    decoder, found = vlm.model.language_model, list[First]()
    for requests in batches:
        packed = vlm.prepare(requests)
        with plan.answering():
            prefilled = prefill(decoder, packed, plan.dropper_for(packed, decoder.config.num_hidden_layers))
        found.append(First(prefilled.logits.float().log_softmax(-1), prefilled.kept))
    return found


def compare(plan: Plan, dtype: str, reference: Sequence[First], other: Sequence[First]) -> Comparison:
    """One row from what float32 and another dtype gave for the same batches."""
    pairs = [(one.log_probabilities, two.log_probabilities) for one, two in zip(reference, other, strict=True)]
    expected, given = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    divergence = kl_divergence(expected, given).mean().item()
    changed = int((expected.argmax(-1) != given.argmax(-1)).sum())
    budget = "" if plan.budget is None else str(plan.budget)
    return Comparison(plan.label, budget, dtype, overlaps(reference, other), divergence, changed, len(expected))


def overlaps(reference: Sequence[First], other: Sequence[First]) -> dict[int, float]:
    """By layer the mean share of the reference's kept tokens that the other keeps too."""
    shares: dict[int, list[float]] = {}
    for one, two in zip(reference, other, strict=True):
        for (layer, expected), (_, given) in zip(one.kept, two.kept, strict=True):
            both = zip(expected, given, strict=True)
            shares.setdefault(layer, []).extend(overlap(ours, theirs) for ours, theirs in both if len(ours))
    return {layer: fmean(values) for layer, values in shares.items() if values}


def overlap(expected: Tensor, given: Tensor) -> float:
    """The share of the expected indices that are given."""
    return torch.isin(expected, given).float().mean().item()


def comparisons(
    models: Mapping[str, VisionLanguageModel], plans: Sequence[Plan], requests: Sequence[Request]
) -> Iterator[Comparison]:
    """A row for each plan and each of the models, which are given by their dtypes, but the reference."""
    for plan in plans:
        found = {dtype: first_tokens(vlm, batches_of(requests), plan) for dtype, vlm in models.items()}
        yield from (compare(plan, dtype, found[REFERENCE], found[dtype]) for dtype in models if dtype != REFERENCE)


def batches_of(requests: Sequence[Request]) -> list[Sequence[Request]]:
    return [requests[start : start + BATCH] for start in range(0, len(requests), BATCH)]


def feature_errors(models: Mapping[str, VisionLanguageModel], requests: Sequence[Request]) -> dict[str, tuple[float, float]]:
    """How far what enters the decoder for vision tokens is from the reference, by dtype.

    The norm of the difference as a share of the reference's norm, and the smallest cosine of a token.
    """
    features = {dtype: torch.cat([vision_rows(vlm, batch) for batch in batches_of(requests)]) for dtype, vlm in models.items()}
    wanted = features.pop(REFERENCE)
    return {
        dtype: (float((own - wanted).norm() / wanted.norm()), float(F.cosine_similarity(own, wanted, dim=-1).min()))
        for dtype, own in features.items()
    }


@torch.no_grad()
def vision_rows(vlm: VisionLanguageModel, requests: Sequence[Request]) -> Tensor:
    """(vision tokens of all requests, D) float32: the results of tower and projector"""
    packed = vlm.prepare(requests)
    return packed.inputs_embeds[packed.vision_mask].float()


def markdown_row(row: Comparison) -> str:
    kept = ", ".join(f"{100 * share:.1f}" for share in row.kept.values()) or "-"
    cells = (row.method, row.budget, row.dtype, kept, f"{row.divergence:.4f}", f"{row.changed} of {row.prompts}")
    return f"| {' | '.join(cells)} |"


def load_models(name: str, dtypes: Sequence[str], rounded_sums: bool) -> dict[str, VisionLanguageModel]:
    """The reference and the others, by what the tables call them; raises as `load`."""
    models = {dtype: load(name, dtype=dtype) for dtype in (REFERENCE, *dtypes)}
    if rounded_sums:
        models[ROUNDED] = load(name, dtype="bfloat16")
        models[ROUNDED].model.language_model.float32_sums = False
    return models


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m nanovlm_v2drop.research.precision", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo", help="default: %(default)s")
    parser.add_argument("--task", help="whose questions are asked; default: the model's name")
    parser.add_argument("--methods", default="v2drop", help="default: %(default)s")
    parser.add_argument("--dtypes", default="bfloat16,int8,int4", help="default: %(default)s")
    parser.add_argument("--rounded-sums", action="store_true", help=f"also compare {ROUNDED}, as in transformers")
    parser.add_argument("--limit", type=int, default=60, help="questions; default: %(default)s")
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    try:
        plans, task = plans_of(args.methods.split(",")), load_task(args.task or args.model, None)
        requests = [sample.request for sample in islice(task.samples(args.limit), args.limit)]
        print("| method | budget | dtype | kept, % | divergence, nats | changed |\n|---|---|---|---|---|---|")
        models = load_models(args.model, args.dtypes.split(","), args.rounded_sums)
        for row in comparisons(models, plans, requests):
            print(markdown_row(row), flush=True)
        print("\n| dtype | relative error of the features | smallest cosine of a token |\n|---|---|---|")
        for dtype, (error, cosine) in feature_errors(models, requests).items():
            print(f"| {dtype} | {100 * error:.2f} % | {cosine:.5f} |")
    except (ValueError, OSError, WeightsUnavailable) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
