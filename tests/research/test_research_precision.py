"""The comparison of dtypes: exact where nothing differs, and equal to torch's own divergence where something does."""

from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nanovlm_v2drop.loading.zoo import VisionLanguageModel, load
from nanovlm_v2drop.processing.prompts import Request
from nanovlm_v2drop.research.precision import (
    ROUNDED,
    First,
    comparisons,
    feature_errors,
    first_tokens,
    load_models,
    markdown_row,
    overlap,
    overlaps,
    plans_of,
    vision_rows,
)
from nanovlm_v2drop.tasks import load_task

INDICES = st.sets(st.integers(0, 30), min_size=1).map(sorted)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return [sample.request for sample in islice(load_task("demo", None).samples(3), 3)]


@given(INDICES, INDICES)
def test_overlap_is_the_share_of_the_expected_that_is_given(expected: list[int], given_indices: list[int]) -> None:
    shared = len(set(expected) & set(given_indices)) / len(expected)
    assert overlap(torch.tensor(expected), torch.tensor(given_indices)) == pytest.approx(shared)


def test_prompts_of_which_nothing_is_kept_are_left_out() -> None:
    none, one, two = torch.empty(0, dtype=torch.long), torch.tensor([3]), torch.tensor([3, 5])
    logits = torch.zeros(2, 4)
    reference = First(logits, [(1, [two, two]), (4, [one, none]), (6, [none, none])])
    other = First(logits, [(1, [two, one]), (4, [one, one]), (6, [one, one])])
    assert overlaps([reference], [other]) == {1: 0.75, 4: 1.0}


@pytest.fixture(scope="module")
def models() -> dict[str, VisionLanguageModel]:
    return {name: load("demo", dtype=name) for name in ("float32", "bfloat16")}


def test_a_dtype_is_the_same_as_itself(requests: list[Request], models: dict[str, VisionLanguageModel]) -> None:
    same = {"float32": models["float32"], "again": models["float32"]}
    assert feature_errors(same, requests)["again"] == (0, pytest.approx(1))
    rows = list(comparisons(same, plans_of(["dense", "v2drop"]), requests))
    assert [(row.method, row.budget) for row in rows] == [
        ("dense", ""),
        ("v2drop", "33.33%"),
        ("v2drop", "22.22%"),
        ("v2drop", "11.11%"),
    ]
    for row in rows:
        assert (row.divergence, row.changed, row.prompts) == (0, 0, 3)
        assert set(row.kept.values()) <= {1.0}
        assert len(row.kept) == (0 if row.method == "dense" else 3)


def test_the_divergence_is_torchs_and_the_table_shows_it(
    requests: list[Request], models: dict[str, VisionLanguageModel]
) -> None:
    plan = plans_of(["v2drop"])[0]
    (row,) = comparisons(models, [plan], requests)
    pair = [first_tokens(models[name], [requests], plan)[0] for name in ("float32", "bfloat16")]
    expected, found = (first.log_probabilities for first in pair)
    divergence = F.kl_div(found, expected, log_target=True, reduction="batchmean").item()
    assert row.divergence == pytest.approx(divergence, rel=1e-4, abs=1e-7)
    assert row.divergence > 0
    assert row.changed == int((expected.argmax(-1) != found.argmax(-1)).sum())
    assert markdown_row(row).startswith("| v2drop | 33.33% | bfloat16 | ")
    assert markdown_row(row).endswith(" of 3 |")


def test_the_error_of_features_is_that_of_their_rows(
    requests: list[Request], models: dict[str, VisionLanguageModel]
) -> None:
    wanted, own = (vision_rows(models[name], requests).double() for name in ("float32", "bfloat16"))
    assert wanted.shape == (3 * 144, models["float32"].config.text_config.hidden_size)
    error, cosine = feature_errors(models, requests)["bfloat16"]
    assert error == pytest.approx(float((own - wanted).square().sum().sqrt() / wanted.square().sum().sqrt()), rel=1e-4)
    assert 0 < error < 0.05
    cosines = (own * wanted).sum(-1) / (own.norm(dim=-1) * wanted.norm(dim=-1))
    assert cosine == pytest.approx(float(cosines.min()), rel=1e-5)


def test_only_the_model_with_rounded_sums_keeps_them_in_bfloat16(requests: list[Request]) -> None:
    models = load_models("demo", ["bfloat16"], rounded_sums=True)
    embeddings = torch.zeros(1, 2, dtype=torch.bfloat16)
    sums = {name: vlm.model.language_model.widened(embeddings).dtype for name, vlm in models.items()}
    assert sums == {name: torch.bfloat16 if name == ROUNDED else torch.float32 for name in models}
    (plan,) = plans_of(["dense"])
    first = {name: first_tokens(models[name], [requests], plan)[0].log_probabilities for name in ("bfloat16", ROUNDED)}
    assert not torch.equal(first["bfloat16"], first[ROUNDED])
    assert ROUNDED not in load_models("demo", ["bfloat16"], rounded_sums=False)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="v3drop"):
        plans_of(["v3drop"])
