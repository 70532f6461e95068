"""Features of shared pictures: computed once, the same whatever stands beside a picture, in bounded memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm_v2drop.evaluation.features import SharedFeatures, content_key, size_of
from nanovlm_v2drop.loading.zoo import VisionLanguageModel, load
from nanovlm_v2drop.models.vlm import VisionInput
from nanovlm_v2drop.processing.prompts import Request


@pytest.fixture(scope="module")
def vlm(tiny_llava_folder) -> VisionLanguageModel:
    return load(tiny_llava_folder)


@pytest.fixture(scope="module")
def pictures(vlm: VisionLanguageModel) -> list[VisionInput]:
    rng = np.random.default_rng(0)
    drawn = [Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)) for _ in range(4)]
    return [vlm.tokens_and_media(Request(text="What?", images=[picture]))[1][0] for picture in drawn]


class Counting:
    """A model's `encode` that counts the pictures."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        self.vlm, self.count = vlm, 0

    def __call__(self, media):
        self.count += len(media)
        with torch.no_grad():
            return self.vlm.model.encode(media)


def test_a_picture_is_encoded_once_and_equals_itself_alone(vlm, pictures):
    encode = Counting(vlm)
    shared = SharedFeatures(encode, 10**9)
    found = shared([*pictures, pictures[0], replace(pictures[1], pixel_values=pictures[1].pixel_values.clone())])
    assert encode.count == 4
    for encoded, picture in zip(found, [*pictures, *pictures[:2]], strict=True):
        (alone,) = Counting(vlm)([picture])
        assert torch.equal(encoded.features, alone.features)
        for trace, other in zip(encoded.traces, alone.traces, strict=True):
            assert torch.equal(trace.received_attention(), other.received_attention())
            assert torch.equal(trace.keys(), other.keys())
            assert trace.keys() is trace.keys()


def test_the_pictures_that_were_not_used_for_the_longest_time_make_room(vlm, pictures):
    encode = Counting(vlm)
    size = size_of(SharedFeatures(encode, 1)(pictures[:1])[0])
    encode.count, shared = 0, SharedFeatures(encode, 2 * size)
    for number, count in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        shared([pictures[number]])
        assert encode.count == count
        assert shared.nbytes <= shared.limit
    assert len(shared.kept) == 2


def test_a_picture_above_the_limit_is_kept_for_its_own_batch(vlm, pictures):
    encode = Counting(vlm)
    shared = SharedFeatures(encode, 1)
    assert [len(one.features) for one in shared([pictures[0], pictures[0]])] == [36, 36]
    assert encode.count == 1


@pytest.mark.parametrize(
    "change", [{"size": (1, 1)}, {"grids": ((2, 3, 6),)}, {"is_video": True}, {"seconds_per_grid": 2.0}, {"overview": 1}]
)
def test_the_same_pixels_in_another_arrangement_are_another_picture(change, pictures):
    assert content_key(replace(pictures[0], **change)) != content_key(pictures[0])
    assert content_key(pictures[1]) != content_key(pictures[0])
