"""How questions are put together: by length, in bounded sizes, the same whatever was answered before; read ahead in threads."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanovlm_v2drop.evaluation import batches as module
from nanovlm_v2drop.evaluation.batches import AHEAD, WINDOW, Batch, BatchSize, bytes_of_token, cut, form_batches, read_ahead
from nanovlm_v2drop.models.config import TextConfig


def model(**more: Any) -> Any:
    """A model whose prompts are as long as their requests say."""
    config = SimpleNamespace(text_config=TextConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=9))
    known = {name: lambda request: request for name in ("prompt_length", "tokens_and_media")}
    known |= {"device": torch.device("cpu")}
    return SimpleNamespace(**{**known, "config": config, "dtype": torch.float32, **more})


def samples(lengths: list[int]) -> Any:
    return (SimpleNamespace(sample_id=str(place), request=length) for place, length in enumerate(lengths))


@given(st.lists(st.integers(1, 60), max_size=300), st.integers(1, 20), st.none() | st.integers(1, 200))
def test_every_sample_is_in_one_batch_of_bounded_size_sorted_by_length(lengths, prompts, tokens):
    batches = list(form_batches(model(), samples(lengths), BatchSize(prompts, tokens)))
    places = [place for batch in batches for place in batch.places]
    assert sorted(places) == list(range(len(lengths)))
    assert [sample.sample_id for batch in batches for sample in batch.samples] == list(map(str, places))
    for batch in batches:
        own = [lengths[place] for place in batch.places]
        assert own == sorted(own)
        assert len({place // max(WINDOW, prompts) for place in batch.places}) == 1
        assert len(own) == 1 or (len(own) <= prompts and (tokens is None or sum(own) <= tokens))


def test_a_batch_is_filled_as_far_as_it_goes():
    lengths = dict(enumerate([4, 5, 6, 9, 30, 31]))
    assert cut(list(lengths), lengths, BatchSize(3, 20)) == [[0, 1, 2], [3], [4], [5]]
    assert cut(list(lengths), lengths, BatchSize(4)) == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("size", [BatchSize(1), BatchSize(64, 4096)])
def test_a_size_is_read_as_it_was_written(size):
    assert BatchSize.parse(str(size)) == size


@pytest.mark.parametrize("text", ["", "-1", "1 prompts", "1 prompts, x tokens", "1" * 30])
def test_other_text_is_no_size(text):
    with pytest.raises(ValueError, match="is no batch size"):
        BatchSize.parse(text)


def test_the_size_goes_by_the_free_memory_up_to_a_limit(monkeypatch):
    per_token = bytes_of_token(model().config.text_config, torch.float32)
    for free, tokens in ((0, 1), (2 * 100 * per_token, 100), (10**15, module.AUTO_TOKENS["cpu"])):
        monkeypatch.setattr(module, "free_memory", lambda device, free=free: free)
        assert BatchSize.auto(model(), 9000) == BatchSize(module.AUTO_PROMPTS, tokens)
        assert BatchSize.auto(model(), 5) == BatchSize(module.AUTO_PROMPTS, tokens)
        assert BatchSize.auto(model(), 5, replicas=2) == BatchSize(3, tokens)


def numbered(count: int) -> Any:
    return (Batch(list(samples([number])), [number]) for number in range(count))


def test_pictures_are_read_by_threads_before_their_batch_is_asked_for():
    read, here = {}, threading.current_thread()

    def reading(request: int) -> int:
        read[request] = threading.current_thread()
        return request

    batches = read_ahead(model(tokens_and_media=reading), numbered(9), lambda number, batch: number != 1)
    for number, (batch, prompts) in enumerate(batches):
        assert (list(batch.places), prompts) == ([number], [] if number == 1 else [number])
        assert max(read) <= number + AHEAD + 1
    assert set(read) == set(range(9)) - {1}
    assert here not in read.values()


def test_what_reading_raises_is_raised_where_the_batch_is_used_and_threads_end():
    def reading(request: int) -> int:
        if request == 2:
            raise ValueError("a damaged picture")
        return request

    before, seen = threading.active_count(), []
    with pytest.raises(ValueError, match="a damaged picture"):
        seen.extend(batch.places[0] for batch, _ in read_ahead(model(tokens_and_media=reading), numbered(5), lambda *_: True))
    assert threading.active_count() == before
    unfinished = read_ahead(model(), numbered(5), lambda *_: True)
    next(unfinished)
    unfinished.close()
    assert threading.active_count() == before
