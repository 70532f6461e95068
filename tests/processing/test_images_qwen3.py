"""Qwen3-VL's pictures, frames and times equal those of the official processors."""

import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_clips import write_numbered
from qwen2vl import clip, picture
from tiny import resizing_horizontally_first

from nanovlm_v2drop.models.config import Qwen3VLVisionConfig
from nanovlm_v2drop.processing.images_qwen3 import FRAME, Qwen3VLImageProcessor, group_times
from nanovlm_v2drop.processing.video import FpsSampling, Qwen3VLSampling, SampledVideo, UniformSampling, sample_video

TOWER = Qwen3VLVisionConfig()
RELEASED = {"min_pixels": 65536, "max_pixels": 16777216, "video_min_pixels": 4096, "video_max_pixels": 25165824}
sides = st.integers(1, 3000)


def official_module() -> Any:
    return pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")


def official_size(num_frames: int, height: int, width: int, low: int, high: int, cap: int | None = None) -> list[int]:
    """What transformers' video processor resizes the frames to; its `resize` is run on a video without memory."""
    made, seen = official_module().Qwen3VLVideoProcessor, []
    fake = object.__new__(made)
    fake.max_video_tokens = cap
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.__mro__[1], "resize", lambda self, image, size, resample: seen.append([size.height, size.width]))
        videos, size = (
            SimpleNamespace(shape=(1, num_frames, 3, height, width)),
            SimpleNamespace(shortest_edge=low, longest_edge=high),
        )
        fake.resize(videos, size, None, 32, 2, cap_pixels_per_frame=cap is not None)
    return seen[0]


@given(st.integers(2, 800), sides, sides, st.sampled_from([(4096, 25165824), (131072, 786432), (4096, 40000)]))
@settings(max_examples=400, deadline=None)
def test_the_size_of_frames_is_that_of_transformers(num_frames: int, height: int, width: int, bounds: tuple[int, int]) -> None:
    ours = Qwen3VLImageProcessor(video_min_pixels=bounds[0], video_max_pixels=bounds[1])
    try:
        expected = official_size(num_frames, height, width, *bounds)
    except ValueError:
        with pytest.raises(ValueError, match="takes an aspect ratio of 200 at most"):
            ours.frame_size(num_frames, height, width)
    else:
        assert list(ours.frame_size(num_frames, height, width)) == expected


@given(st.integers(2, 800), st.integers(40, 2000), st.integers(40, 2000), st.sampled_from([1, 64, 768]))
@settings(max_examples=200, deadline=None)
def test_capped_frames_have_the_size_that_transformers_gives_them(num_frames: int, height: int, width: int, cap: int) -> None:
    ours = Qwen3VLImageProcessor(video_min_pixels=4096, video_max_pixels=25165824, max_video_tokens=cap)
    expected = official_size(num_frames, height, width, 4096, 25165824, cap)
    assert list(ours.frame_size(num_frames, height, width)) == expected


@pytest.mark.parametrize("num_frames", [5, 7, 9, 11])
def test_with_an_odd_number_of_frames_the_bound_is_compared_with_the_rounded_number(num_frames: int) -> None:
    frame, even = 64 * 64, round(num_frames / 2) * 2
    at_bound = Qwen3VLImageProcessor(video_min_pixels=1, video_max_pixels=even * frame)
    assert at_bound.frame_size(num_frames, 64, 64) == (64, 64)
    below = Qwen3VLImageProcessor(video_min_pixels=1, video_max_pixels=even * frame - 1)
    assert below.frame_size(num_frames, 64, 64) == ((32, 32) if even <= num_frames else (64, 64))


def test_a_single_frame_counts_as_two() -> None:
    """transformers refuses it."""
    ours = Qwen3VLImageProcessor(video_min_pixels=1, video_max_pixels=2 * 64 * 64)
    assert ours.frame_size(1, 64, 64) == ours.frame_size(2, 64, 64) == (64, 64)
    made = ours.video(clip(1, 64, 64))
    assert torch.equal(made.pixel_values, ours.video(clip(1, 64, 64) * 2).pixel_values)
    assert made.text == f"<0.0 seconds>{FRAME}"


@pytest.mark.parametrize("size", [(200, 140), (33, 300), (9, 11), (31, 47)])
def test_pictures_are_patches_of_the_official_processor(size: tuple[int, int]) -> None:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    ours = Qwen3VLImageProcessor(min_pixels=4096, max_pixels=65536)
    edges = {"shortest_edge": 4096, "longest_edge": 65536}
    settings = {"patch_size": 16, "size": edges, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with resizing_horizontally_first():
        theirs = module.Qwen2VLImageProcessorPil(**settings)(picture(*size), return_tensors="pt")
    made = ours.image(picture(*size))
    assert torch.equal(made.pixel_values, theirs["pixel_values"])
    assert [(frames, 2 * rows, 2 * columns) for frames, rows, columns in made.grids] == [
        tuple(theirs["image_grid_thw"][0].tolist())
    ]


def test_frames_are_the_patches_of_equally_large_pictures() -> None:
    ours = Qwen3VLImageProcessor(min_pixels=1, max_pixels=10**6, video_min_pixels=1, video_max_pixels=10**6)
    frames = clip(3, 70, 64)
    made = ours.video(frames)
    assert made.grids == ((2, 2, 2),)
    pictures = [ours.image(frame).pixel_values.unflatten(1, (3, 2, -1)) for frame in frames]
    pairs = [torch.stack([pictures[first][:, :, 0], pictures[second][:, :, 1]], dim=2) for first, second in ((0, 1), (2, 2))]
    assert torch.equal(made.pixel_values, torch.cat(pairs).flatten(1))


# Frames and times


@given(st.integers(1, 20_000), st.floats(0.5, 120), st.sampled_from([1.0, 2.0, 0.5, 4.0]))
@settings(max_examples=300, deadline=None)
def test_sampled_frames_are_those_of_transformers(num_frames: int, fps: float, sampled_fps: float) -> None:
    fake = SimpleNamespace(fps=sampled_fps, min_frames=4, max_frames=768)
    metadata = SimpleNamespace(total_num_frames=num_frames, fps=fps)
    expected = official_module().Qwen3VLVideoProcessor.sample_frames(fake, metadata)
    assert Qwen3VLSampling(sampled_fps).indices(num_frames, fps) == expected.tolist()


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=30).map(sorted), st.floats(0.5, 120))
@settings(max_examples=200, deadline=None)
def test_times_are_those_of_transformers(indices: list[int], fps: float) -> None:
    module = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl")
    expected = module.Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps)
    assert group_times(indices, fps, 2) == expected


def test_a_file_tells_its_own_times(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "clip.mp4", 59, fps=Fraction(30000, 1001))
    video = sample_video(path, Qwen3VLSampling())
    assert video.indices == (0, 19, 39, 58)
    planned = Qwen3VLImageProcessor().plan_video(video)
    expected = f"<0.3 seconds>{FRAME}<1.6 seconds>{FRAME}"  # 9.5 and 48.5 frames
    assert planned.text == planned.read().text == expected


def test_fewer_frames_than_announced_give_fewer_times() -> None:
    def decode(transform: Any) -> list[Any]:
        return [transform(frame) for frame in clip(3, 64, 64)]

    video = SampledVideo((0, 10, 20, 30, 40, 50), 64, 64, decode, fps=10.0, seconds=6.0)
    planned = Qwen3VLImageProcessor().plan_video(video)
    assert planned.text.count("seconds") == 3
    read = planned.read()
    assert read.text == f"<0.5 seconds>{FRAME}<2.0 seconds>{FRAME}"
    assert read.grids[0][0] == 2


@pytest.mark.parametrize("sampling", [Qwen3VLSampling(), FpsSampling(), UniformSampling(4)])
def test_a_list_of_frames_counts_as_two_a_second_as_in_qwens_own_code(sampling: Any) -> None:
    """transformers takes 24 a second."""
    text = Qwen3VLImageProcessor().plan_video(sample_video(clip(4, 64, 64), sampling)).text
    assert text == f"<0.2 seconds>{FRAME}<1.2 seconds>{FRAME}"


# Settings


def write(folder: Path, pictures: dict[str, Any], videos: dict[str, Any] | None = None) -> Path:
    known = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**known, **pictures}))
    if videos is not None:
        (folder / "video_preprocessor_config.json").write_text(json.dumps({**known, **videos}))
    return folder


def test_the_released_bounds_are_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "image_processor_type": "Qwen2VLImageProcessorFast"},
        {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, "video_processor_type": "Qwen3VLVideoProcessor"},
    )
    assert Qwen3VLImageProcessor.from_folder(tmp_path, TOWER) == Qwen3VLImageProcessor(**RELEASED)


def test_settings_that_transformers_saved_again_are_read_alike(tmp_path: Path) -> None:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    pictures = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}}
    saved = module.Qwen2VLImageProcessorPil.from_pretrained(write(tmp_path, pictures)).to_dict()
    defaults = official_module().Qwen3VLVideoProcessor
    names = (
        "patch_size",
        "image_mean",
        "image_std",
        "min_frames",
        "max_frames",
        "fps",
        "cap_pixels_per_frame",
        "max_video_tokens",
    )
    videos = {**{name: getattr(defaults, name) for name in names}, "size": {"longest_edge": 25165824, "shortest_edge": 4096}}
    nested = {"image_processor": saved, "video_processor": {**videos, "video_processor_type": "Qwen3VLVideoProcessor"}}
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert Qwen3VLImageProcessor.from_folder(tmp_path, TOWER) == Qwen3VLImageProcessor(**RELEASED)


def test_max_pixels_bounds_a_picture_and_every_frame(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"size": {"longest_edge": 16777216, "shortest_edge": 65536}},
        {"size": {"longest_edge": 25165824, "shortest_edge": 4096}},
    )
    made = Qwen3VLImageProcessor.from_folder(tmp_path, TOWER, max_pixels=32 * 32 * 6)
    assert made.image(picture(400, 300)).grids == ((1, 2, 2),)
    for count in (2, 5, 12):
        assert made.video(clip(count, 400, 300)).grids == ((-(-count // 2), 2, 2),)


def test_without_video_settings_those_of_the_class_and_of_the_pictures_hold(tmp_path: Path) -> None:
    write(tmp_path, {"image_processor_type": "Qwen2VLImageProcessor"})
    made = Qwen3VLImageProcessor.from_folder(tmp_path, TOWER)
    assert made == Qwen3VLImageProcessor()
    defaults = official_module().Qwen3VLVideoProcessor
    assert (made.video_min_pixels, made.video_max_pixels) == tuple(
        defaults.size[edge] for edge in ("shortest_edge", "longest_edge")
    )
    assert (made.patch_size, list(made.image_mean)) == (defaults.patch_size, list(defaults.image_mean))


def test_the_cap_of_a_frame_holds_where_the_folder_asks_for_it(tmp_path: Path) -> None:
    for cap, expected in ((True, 768), (False, None), (None, None)):
        write(tmp_path, {}, {"cap_pixels_per_frame": cap})
        assert Qwen3VLImageProcessor.from_folder(tmp_path, TOWER).max_video_tokens == expected
    write(tmp_path, {}, {"cap_pixels_per_frame": True, "max_video_tokens": 100})
    assert Qwen3VLImageProcessor.from_folder(tmp_path, TOWER).max_video_tokens == 100


@pytest.mark.parametrize(
    ("pictures", "videos", "message"),
    [
        ({"patch_size": 14}, {}, "patch_size = 14 is not supported, only 16 is"),
        ({}, {"patch_size": 14}, "patch_size = 14 is not supported, only 16 is"),
        ({}, {"image_mean": [0.4] * 3}, "videos have another image_mean or image_std than pictures"),
        ({"size": {"height": 3, "width": 3}}, {}, "size .* is not supported; expected shortest_edge and longest_edge"),
        ({}, {"video_processor_type": "Qwen2VLVideoProcessor"}, "only Qwen3VLVideoProcessor"),
        ({"image_processor_type": "CLIPImageProcessor"}, {}, "only Qwen2VLImageProcessor"),
        ({"size": {"shortest_edge": 100, "longest_edge": 1000}}, {}, "leave room for one vision token of 32x32 = 1024 pixels"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_obeyed_are_refused_by_name(
    pictures: dict[str, Any], videos: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Qwen3VLImageProcessor.from_folder(write(tmp_path, pictures, videos), TOWER)


def test_a_folder_without_image_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stores no image settings; copy preprocessor_config\.json"):
        Qwen3VLImageProcessor.from_folder(tmp_path, TOWER)


def test_more_pixels_than_memory_allows_are_refused_before_anything_is_decoded() -> None:
    video = SampledVideo(tuple(range(768)), 4000, 4000, decode=lambda transform: [])
    with pytest.raises(ValueError, match=r"the video would become .*take fewer frames"):
        Qwen3VLImageProcessor(video_max_pixels=2**31).plan_video(video)
