"""SmolVLM's pixels, tiles and words are those of transformers' processors; sampled frames and their times too."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_clips import write_numbered
from PIL import Image
from smolvlm import LONGEST_EDGE, TILE, picture, preprocessor, video_prompt
from tiny import resizing_horizontally_first

from nanovlm_v2drop.models.config import SiglipVisionConfig, SmolVLMConfig
from nanovlm_v2drop.processing.images_smolvlm import (
    SmolVLMImageProcessor,
    first_size,
    number_words,
    read_sampling,
    tiles_text,
    video_text,
    whole_tiles,
)
from nanovlm_v2drop.processing.video import SampledVideo, SmolVLMSampling, sample_video

pil = pytest.importorskip("transformers.models.smolvlm.image_processing_pil_smolvlm")
CONFIG = SmolVLMConfig(vision_config=SiglipVisionConfig(hidden_size=32, num_attention_heads=2, image_size=32, patch_size=4))
sides = st.integers(1, 5000)


def official(**changes: Any) -> Any:
    settings_ = {**preprocessor(), **changes}
    del settings_["video_sampling"]
    return pil.SmolVLMImageProcessorPil(**settings_)


def processor(**changes: Any) -> SmolVLMImageProcessor:
    given_ = {"image_size": TILE, "token_grid": 4, "longest_edge": LONGEST_EDGE, "video_longest_edge": LONGEST_EDGE}
    return SmolVLMImageProcessor(**{**given_, **changes})


def write(folder: Path, **changes: Any) -> Path:
    content = {name: value for name, value in {**preprocessor(), **changes}.items() if value is not ...}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


SIZES = [(50, 40), (9, 300), (300, 9), (32, 32), (1, 1), (1, 500), (129, 128), (127, 128), (77, 31), (600, 400)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("splitting", [True, False])
def test_tiles_are_those_of_transformers(size: tuple[int, int], splitting: bool) -> None:
    image = picture(*size)
    with resizing_horizontally_first():
        expected = official(do_image_splitting=splitting)([[image]], return_row_col_info=True)
    medium = processor(do_image_splitting=splitting).image(image)
    torch.testing.assert_close(medium.pixel_values, torch.from_numpy(np.asarray(expected["pixel_values"]))[0])
    rows, columns = expected["rows"][0][0], expected["cols"][0][0]
    assert medium.text == tiles_text(rows or 1, columns or 1)
    assert medium.grids == ((1, 4, 4),) * (rows * columns + 1)
    assert medium.overview == rows * columns


def test_the_released_sizes_give_thirteen_tiles_of_a_photo() -> None:
    released = processor(image_size=512, token_grid=8, longest_edge=2048, video_longest_edge=2048)
    for width, height in ((2048, 1536), (600, 400)):
        planned = released.plan_image(Image.new("RGB", (width, height)))
        assert (len(planned.grids), planned.num_tokens) == (13, 832)
    assert len(released.plan_image(Image.new("RGB", (10, 10))).grids) == 17


@settings(max_examples=200, deadline=None)
@given(sides, sides, st.sampled_from([64, 384 * 4, 512, 2048, 512 * 9]), st.sampled_from([32, 384, 512]))
def test_sizes_are_those_of_transformers(height: int, width: int, longest_edge: int, side: int) -> None:
    image = np.empty((1, height, width))
    assert first_size(height, width, longest_edge) == pil.get_resize_output_image_size(image, longest_edge)
    sizes: list[Any] = []
    fake = SimpleNamespace(resize=lambda image, size, resample: sizes.append((size.height, size.width)))
    pil.SmolVLMImageProcessorPil.resize_for_vision_encoder(fake, image, side)
    assert [whole_tiles(height, width, side)] == sizes


def test_frames_are_pictures_of_one_tile() -> None:
    frames = [picture(50, 40), picture(50, 40).rotate(180)]
    with resizing_horizontally_first():
        expected = official(do_image_splitting=False)([frames])["pixel_values"]
    medium = processor().video(frames)
    torch.testing.assert_close(medium.pixel_values, torch.from_numpy(np.asarray(expected))[0])
    assert (medium.grids, medium.is_video) == (((2, 4, 4),), True)


# Words


def test_number_words_are_those_of_num2words() -> None:
    golden = {
        1: "one",
        13: "thirteen",
        20: "twenty",
        21: "twenty-one",
        64: "sixty-four",
        100: "one hundred",
        101: "one hundred and one",
        121: "one hundred and twenty-one",
        999: "nine hundred and ninety-nine",
        1001: "one thousand and one",
        1100: "one thousand, one hundred",
        1121: "one thousand, one hundred and twenty-one",
        4096: "four thousand and ninety-six",
    }
    assert {number: number_words(number) for number in golden} == golden


def test_every_number_of_frames_is_written_as_num2words_does() -> None:
    num2words = pytest.importorskip("num2words").num2words
    assert [number_words(number) for number in range(10_000)] == [num2words(number) for number in range(10_000)]


def sampled(indices: list[int], fps: float | None, seconds: float | None) -> SampledVideo:
    return SampledVideo(tuple(indices), 40, 50, lambda transform: [], fps, seconds)


@pytest.mark.parametrize(
    ("indices", "fps", "seconds"),
    [([0, 30, 59], 29.97, 60 / 29.97), ([5, 4000, 250_000], 25.0, 10_001.9), ([0], 1.0, 1.0), ([0, 1, 2], None, None)],
)
def test_videos_are_written_as_transformers_writes_them(indices: list[int], fps: float | None, seconds: float | None) -> None:
    text = video_text(sampled(indices, fps, seconds), len(indices))
    assert text.replace("<image>", "<image>" * 16) == video_prompt(indices, 16, fps, seconds)


def test_a_file_of_ten_seconds_is_seen_once_a_second(tmp_path: Path) -> None:
    video = sample_video(write_numbered(tmp_path / "clip.mp4", 100, fps=10), SmolVLMSampling())
    assert video.num_frames == 10
    assert (video.fps, video.seconds) == (10, 10)
    planned = processor().plan_video(video)
    assert "series of ten frames from a 0:00:10 [H:MM:SS] video.\n\nFrame from 00:00:<fake" in planned.text
    assert planned.read().text == planned.text


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20_000), st.floats(0.5, 120), st.sampled_from([1, 2, 0.5]), st.sampled_from([64, 8]))
def test_sampled_frames_are_those_of_transformers(num_frames: int, fps: float, rate: float, most: int) -> None:
    module = pytest.importorskip("transformers.models.smolvlm.video_processing_smolvlm")
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(total_num_frames=num_frames, fps=fps, duration=num_frames / fps)
    fake = SimpleNamespace(num_frames=most, fps=rate)
    expected = module.SmolVLMVideoProcessor.sample_frames(fake, metadata)
    assert SmolVLMSampling(rate, most).indices(num_frames, fps) == expected.tolist()


def test_frames_of_unknown_rate_are_spread_over_the_list() -> None:
    assert SmolVLMSampling(max_frames=4).indices(9, None) == [0, 2, 5, 8]


# Settings


def test_the_folders_settings_are_read(tmp_path: Path) -> None:
    sampling = {"fps": 2, "max_frames": 10, "video_size": {"longest_edge": 64}}
    write(tmp_path, video_sampling=sampling, do_image_splitting=False)
    made = SmolVLMImageProcessor.from_folder(tmp_path, CONFIG)
    assert made == processor(do_image_splitting=False)  # `size` goes before the video's own, as in transformers
    assert read_sampling(tmp_path) == SmolVLMSampling(2, 10)


def test_a_video_has_its_own_size_where_the_folder_gives_no_other(tmp_path: Path) -> None:
    write(tmp_path)
    sampling = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 64}}
    video = {"max_image_size": {"longest_edge": 32}, "video_sampling": sampling}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    assert SmolVLMImageProcessor.from_folder(tmp_path, CONFIG) == processor(video_longest_edge=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_image_size": {"longest_edge": 64}}, "max_image_size is 64, but the vision tower's image_size is 32"),
        ({"max_image_size": ...}, "max_image_size is 364, but the vision tower's image_size is 32"),
        ({"size": {"height": 64, "width": 64}}, "size {.*} is not supported; expected longest_edge, in pixels"),
        ({"resample": 3}, "resample = 3 is not supported, only 1 is"),
        ({"do_resize": False}, "do_resize = False is not supported, only True is"),
        ({"image_processor_type": "CLIPImageProcessor"}, "only SmolVLMImageProcessor or Idefics3ImageProcessor"),
        ({"video_sampling": {"fps": 0}}, "video_sampling.fps = 0 is not supported; expected a number from"),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SmolVLMImageProcessor.from_folder(write(tmp_path, **changes), CONFIG)


def test_a_folder_without_image_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stores no image settings; copy preprocessor_config\.json"):
        SmolVLMImageProcessor.from_folder(tmp_path, CONFIG)
