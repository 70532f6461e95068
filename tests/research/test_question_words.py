"""The ranking by the words of the question against a slow twin in loops, and what it does to texts that it is made for."""

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_models import text_reference, write_text_folder
from torch import Tensor

from nanovlm_v2drop import DropSchedule, TextModel, TextPrompt, load_decoder, prefill
from nanovlm_v2drop.research.question_words import FARTHEST, REACH, QuestionWords, relevance


def slow_relevance(text: list[list[float]], question: list[list[float]]) -> list[float]:
    """The definition, number by number."""
    size, count = len(text[0]), len(text)
    means = [sum(row[d] for row in text) / count for d in range(size)]
    deviations = [max(sqrt(sum((row[d] - means[d]) ** 2 for row in text) / count), 1e-6) for d in range(size)]

    def direction(row: list[float]) -> list[float]:
        standard = [(row[d] - means[d]) / deviations[d] for d in range(size)]
        length = max(sqrt(sum(value**2 for value in standard)), 1e-12)
        return [value / length for value in standard]

    rows, total = [direction(row) for row in text], [0.0] * count
    for asked in map(direction, question):
        cosines = [sum(a * b for a, b in zip(asked, row, strict=True)) for row in rows]
        mean = sum(cosines) / count
        spread = max(sqrt(sum((value - mean) ** 2 for value in cosines) / count), 1e-6)
        likeness = [max((value - mean) / spread, 0.0) for value in cosines]
        for place in range(count):
            near = range(max(0, place - REACH), min(count, place + REACH + 1))
            total[place] += max(likeness[other] * (1 - (1 - FARTHEST) * abs(other - place) / REACH) for other in near) ** 2
    return total


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 2**20))
def test_relevance_equals_its_slow_twin(count: int, asked: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    text, question = (torch.randn(rows, 6, generator=generator) for rows in (count, asked))
    text, question = text.double(), question.double()
    expected = torch.tensor(slow_relevance(text.tolist(), question.tolist())).double()
    torch.testing.assert_close(relevance(text, question), expected, atol=1e-6, rtol=1e-5)


def test_a_number_that_is_huge_in_every_row_does_not_decide() -> None:
    generator = torch.Generator().manual_seed(0)
    text, question = (torch.randn(rows, 6, generator=generator).double() for rows in (30, 3))
    wide = torch.tensor([1.0, 1.0, 1.0, 1000.0, 1.0, 1.0]).double()
    shift = torch.tensor([0.0, 0.0, 5000.0, 0.0, 0.0, 0.0]).double()
    torch.testing.assert_close(relevance(text * wide + shift, question * wide + shift), relevance(text, question))


@pytest.mark.parametrize("rows", [torch.zeros(5, 4), torch.ones(1, 4)])
def test_rows_that_are_all_alike_get_finite_scores(rows: Tensor) -> None:
    assert relevance(rows, torch.randn(2, 4)).isfinite().all()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return load_decoder(write_text_folder(tmp_path_factory.mktemp("text"), text_reference("llama")))


def test_the_tokens_around_a_word_of_the_question_are_kept_in_each_prompt_of_a_batch(model: TextModel) -> None:
    ids = torch.randint(10, 250, (2, 120), generator=torch.Generator().manual_seed(1)).tolist()
    for prompt, place in zip(ids, (40, 70), strict=True):
        prompt[place : place + 2] = prompt[115:117] = [300, 301]  # rare: the question repeats two tokens of the text
    packed = model.prepare([TextPrompt(tuple(prompt), ((5, 110),)) for prompt in ids])
    prefilled = prefill(model.decoder, packed, QuestionWords(DropSchedule({1: 0.3})))
    ((_, kept),) = prefilled.kept
    for numbers, place in zip(kept, (40, 70), strict=True):
        assert {place - 5 + step for step in range(-4, 6)} <= set(numbers.tolist())
        assert len(numbers) == 31
