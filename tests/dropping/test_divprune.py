"""DivPrune beside the authors' code, and beside max-min diversity in loops."""

import pytest
import torch
from golden_inputs import in_a_prompt, open_parts, tokens, vision_after

from nanovlm_v2drop.dropping import DROPPERS, CountSchedule
from nanovlm_v2drop.dropping.divprune import farthest_points, nearest_similarity

DivPrune = DROPPERS["divprune"]
PARTS, INPUTS, OUTPUTS = open_parts("divprune_b")


@pytest.mark.parametrize(("part", "side"), [("n576", 24), ("n144", 12)])
def test_kept_tokens_equal_the_authors_code(part, side):
    features, order = INPUTS[part]["features"], OUTPUTS[part]["order"].tolist()
    for count in PARTS[part]["counts"]:
        kept, rows = vision_after(DivPrune(CountSchedule({0: count})), in_a_prompt(features, [(1, side, side)]))
        assert kept == sorted(order[:count])
        assert torch.equal(rows, features[kept])


def test_where_the_authors_code_chooses_a_token_twice_every_token_is_chosen_once():
    features, order = INPUTS["repeats"]["features"], OUTPUTS["repeats"]["order"].tolist()
    packed = in_a_prompt(features, [(1, 12, 12)])
    kept, rows = vision_after(DivPrune(CountSchedule({0: 24})), packed)
    assert {tuple(row) for row in rows.tolist()} == {tuple(row) for row in features[order].tolist()}
    kept, rows = vision_after(DivPrune(CountSchedule({0: 60})), packed)
    assert len(set(kept)) == 60
    assert len(rows.unique(dim=0)) == 45  # all rows that differ


@pytest.mark.parametrize("count", [1, 2, 7, 29])
def test_every_choice_is_the_token_farthest_from_the_chosen_ones(count):
    features = tokens(5, 30, 12)
    distance = 1 - torch.cosine_similarity(features[:, None], features, dim=-1)
    chosen = [max(range(30), key=lambda one: min(float(distance[one, other]) for other in range(30) if other != one))]
    while len(chosen) < count:
        rest = [token for token in range(30) if token not in chosen]
        chosen.append(max(rest, key=lambda one: min(float(distance[one, other]) for other in chosen)))
    assert farthest_points(torch.nn.functional.normalize(features, dim=-1), count).tolist() == chosen


def test_the_nearest_token_is_found_block_by_block(monkeypatch):
    directions = torch.nn.functional.normalize(tokens(6, 50, 8), dim=-1)
    whole = nearest_similarity(directions)
    monkeypatch.setattr("nanovlm_v2drop.dropping.divprune.BLOCK", 7)
    torch.testing.assert_close(nearest_similarity(directions), whole)
    assert (whole < 1 - 1e-4).all()  # no token is its own nearest


def test_bfloat16_features_are_compared_in_float32():
    features = tokens(7, 144, 64).bfloat16()
    half, _ = vision_after(DivPrune(CountSchedule({0: 40})), in_a_prompt(features, [(1, 12, 12)]))
    full, _ = vision_after(DivPrune(CountSchedule({0: 40})), in_a_prompt(features.float(), [(1, 12, 12)]))
    assert half == full
