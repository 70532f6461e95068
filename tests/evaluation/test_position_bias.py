"""Position bias on kept sets whose bias is known."""

import random

import pytest

from nanovlm_v2drop.evaluation.position_bias import position_bias


def test_kept_tokens_spread_evenly_have_no_bias():
    bias = position_bias([(100, range(0, 100, 2))] * 3, grid_size=10)
    assert bias["bins"] == [0.5] * 10
    assert bias["rows"] == [0.5] * 10
    assert bias["columns"] == [1.0, 0.0] * 5
    assert (bias["kl_bits"], bias["chi_square"], bias["kept_share"]) == (0, 0, 0.5)


def test_keeping_only_the_last_tenth_is_log2_of_ten_bits():
    bias = position_bias([(100, range(90, 100))], grid_size=10)
    assert bias["bins"] == [0.0] * 9 + [1.0]
    assert bias["map"][9] == [1.0] * 10
    assert bias["kl_bits"] == pytest.approx(3.321928, abs=1e-6)
    assert bias["chi_square"] == pytest.approx(9 * 1 + 81)  # nine bins miss 1 each, one has 9 too many


def test_a_sample_of_another_size_is_binned_by_its_own_length():
    bias = position_bias([(36, [0]), (72, [71])], grid_size=6)
    assert (bias["bins"][0], bias["bins"][9]) == (pytest.approx(1 / 12, abs=1e-5), pytest.approx(1 / 10, abs=1e-5))
    assert bias["map"][5][5] == pytest.approx(1 / 3, abs=1e-5)  # the last patch of either picture of the second sample


def test_bins_and_pictures_without_tokens_are_told_apart_from_never_kept():
    assert position_bias([(4, [0])], grid_size=2)["bins"][:3] == [1.0, None, 0.0]
    assert position_bias([], grid_size=2) is None
    assert position_bias([(0, [])], grid_size=2) is None


def test_chi_square_of_independent_draws_is_near_its_degrees_of_freedom():
    rng = random.Random(0)
    values = [position_bias([(100, [rng.randrange(100)]) for _ in range(300)], 10)["chi_square"] for _ in range(60)]
    assert sum(values) / len(values) == pytest.approx(9, abs=1.5)
