"""Qwen2-VL's pictures and videos: patches equal to the official processor's, and clear errors for what cannot be used."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import resizing_horizontally_first

from nanovlm_v2drop.models.config import Qwen2VLVisionConfig
from nanovlm_v2drop.processing.images import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from nanovlm_v2drop.processing.images_qwen2 import Qwen2VLImageProcessor, smart_resize
from nanovlm_v2drop.processing.video import SampledVideo, take_all

TOWER = Qwen2VLVisionConfig(patch_size=4)
# With a factor of 8 and 128..1024 pixels: kept, halves to the even multiple, grown, shrunk, thin both ways, one pixel.
SIZES = [(24, 16), (20, 28), (12, 20), (5, 3), (64, 48), (301, 200), (150, 3), (3, 150), (1, 1), (200, 1)]


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise is the hardest case for a resampler: every rounding shows."""
    rng = np.random.default_rng((seed, width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def processor(**changes) -> Qwen2VLImageProcessor:
    pixels = {"min_pixels": 128, "max_pixels": 1024, "video_min_pixels": 256, "video_max_pixels": 512}
    return Qwen2VLImageProcessor(**({"patch_size": 4} | pixels | changes))


def official_module():
    return pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")


def official(picture: Image.Image, ours: Qwen2VLImageProcessor, **bounds: int) -> tuple[torch.Tensor, list[int]]:
    """Patches and grid (frames, rows, columns of patches) of transformers' processor on Pillow."""
    sizes = {name: getattr(ours, name) for name in ("patch_size", "temporal_patch_size", "merge_size")}
    bounds = bounds or {"min_pixels": ours.min_pixels, "max_pixels": ours.max_pixels}
    with resizing_horizontally_first():
        made = official_module().Qwen2VLImageProcessorPil(**sizes, **bounds)(picture, return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"][0].tolist()


# The size


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    factor=st.sampled_from([8, 28]),
    bounds=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)).map(sorted),
)
@settings(max_examples=400, deadline=None)
def test_smart_resize_equals_the_official_one(height, width, factor, bounds):
    try:
        expected = official_module().smart_resize(height, width, factor, *bounds)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio of 200 at most"):
            smart_resize(height, width, factor, *bounds)
    else:
        assert smart_resize(height, width, factor, *bounds) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (476, 644)),
        ((1080, 1920), (728, 1316)),
        ((42, 70), (56, 56)),  # 1.5 and 2.5 multiples of 28 both go to 2
        ((56, 98), (56, 112)),  # 3.5 goes to 4
        ((10, 1000), (28, 560)),  # the short side rounds to 0, so the picture counts as too small, and even shrinks
        ((1, 1), (56, 56)),
        ((8000, 8000), (980, 980)),
    ],
)
def test_smart_resize_has_the_bounds_of_the_class_in_transformers(size, expected):
    assert smart_resize(*size) == expected


@pytest.mark.parametrize("size", [(1, 201), (201, 1), (0, 5), (5, 0), (0, 0)])
def test_a_shape_that_the_model_cannot_take_is_refused_with_its_size_and_the_limit(size):
    with pytest.raises(ValueError, match=f"is {size[1]}x{size[0]} pixels.*ratio of 200 at most; cut it"):
        smart_resize(*size)


def test_a_thin_picture_is_refused_by_the_processor():
    with pytest.raises(ValueError, match="is 402x2 pixels"):
        processor().image(noise(402, 2))


# Pictures


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_equals_the_official_processors(size):
    made = processor().image(noise(*size))
    pixel_values, (frames, rows, columns) = official(noise(*size), processor())
    assert torch.equal(made.pixel_values, pixel_values)
    assert made.grids == ((frames, rows // 2, columns // 2),)
    assert made.num_tokens * 4 == len(made.pixel_values)
    assert made.size == size[::-1]
    assert made.pixel_values.dtype == torch.float32
    assert not made.is_video


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_every_mode_equals_the_official_processors(mode):
    assert torch.equal(processor().image(noise(50, 37, mode)).pixel_values, official(noise(50, 37, mode), processor())[0])


def test_transparency_is_dropped_and_not_blended():
    # transformers 5 blends it over white; the processors that the models were trained with drop it.
    picture = noise(24, 16)
    see_through = picture.copy()
    see_through.putalpha(Image.new("L", picture.size, 77))
    assert torch.equal(processor().image(see_through).pixel_values, processor().image(picture).pixel_values)


@pytest.mark.parametrize("changes", [{"merge_size": 1}, {"merge_size": 3}, {"temporal_patch_size": 1}, {"patch_size": 6}])
def test_other_patch_sizes_equal_the_official_processors(changes):
    other = processor(**changes)
    made, (pixel_values, grid) = other.image(noise(40, 30)), official(noise(40, 30), processor(**changes))
    assert torch.equal(made.pixel_values, pixel_values)
    assert [side * other.merge_size for side in made.grids[0][1:]] == grid[1:]


def test_the_models_real_sizes_equal_the_official_processors():
    real = Qwen2VLImageProcessor()
    made, (pixel_values, grid) = real.image(noise(213, 320)), official(noise(213, 320), real)
    assert made.pixel_values.shape == (22 * 16, 1176)
    assert (grid, made.grids) == ([1, 22, 16], ((1, 11, 8),))
    assert torch.equal(made.pixel_values, pixel_values)


def test_a_picture_may_be_given_as_a_path(tmp_path):
    noise(30, 20).save(tmp_path / "a.png")
    assert torch.equal(processor().image(tmp_path / "a.png").pixel_values, processor().image(noise(30, 20)).pixel_values)


def test_a_picture_among_others_is_the_same_as_alone():
    assert torch.equal(
        processor().image(noise(30, 20), alone=False).pixel_values, processor().image(noise(30, 20)).pixel_values
    )


# Videos


def official_video(frames: list[Image.Image], ours: Qwen2VLImageProcessor) -> torch.Tensor:
    """From the official processor of pictures: it shows each frame twice, and a video's patch takes one from each of two."""
    bounds = {"min_pixels": ours.video_min_pixels, "max_pixels": ours.video_max_pixels}
    pictures = [official(frame, ours, **bounds)[0] for frame in frames]
    halves = [picture.unflatten(1, (3, 2, ours.patch_size**2))[:, :, 0] for picture in pictures]
    pairs = [torch.stack(pair, dim=2).flatten(1) for index, pair in enumerate(pairwise(halves)) if index % 2 == 0]
    return torch.cat(pairs)


@pytest.mark.parametrize("size", SIZES)
def test_a_video_equals_the_official_picture_processor_two_frames_at_a_time(size):
    frames = [noise(*size, seed=seed) for seed in range(6)]
    made = processor().video(frames)
    assert torch.equal(made.pixel_values, official_video(frames, processor()))
    assert made.grids[0][0] == 3
    assert made.num_tokens * 4 == len(made.pixel_values)
    assert (made.size, made.is_video) == (size[::-1], True)


@pytest.mark.parametrize("count", [1, 3])
def test_an_odd_number_of_frames_repeats_the_last(count):
    frames = [noise(24, 16, seed=seed) for seed in range(count)]
    made = processor().video(frames)
    assert torch.equal(made.pixel_values, processor().video([*frames, frames[-1]]).pixel_values)
    assert made.grids[0][0] == (count + 1) // 2


def test_a_video_of_one_frame_is_the_picture_where_the_bounds_are_equal():
    same = processor(video_min_pixels=128, video_max_pixels=1024)
    assert torch.equal(same.video([noise(30, 20)]).pixel_values, same.image(noise(30, 20)).pixel_values)


@given(height=st.integers(1, 60), width=st.integers(1, 60), count=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_grid_holds_all_patches_of_any_video(height, width, count):
    made = processor().video([noise(width, height, seed=seed) for seed in range(count)])
    assert made.pixel_values.shape == (4 * made.num_tokens, 3 * 2 * 4 * 4)
    assert made.grids[0][0] == (count + 1) // 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([], "the video is an empty list"), ([(8, 8), (8, 9)], "the video has frames of 8x8 and 8x9 pixels")],
)
def test_a_video_without_frames_or_with_frames_of_several_sizes_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        processor().video([noise(*size) for size in sizes])


# Settings

HUB_SETTINGS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(CLIP_IMAGE_MEAN),
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": list(CLIP_IMAGE_STD),
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 12845056, "shortest_edge": 3136},
    "temporal_patch_size": 2,
}


def write(folder, name: str = "preprocessor_config", **content) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content))


def read(folder, config: Qwen2VLVisionConfig = TOWER, max_pixels: int | None = None) -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor.from_folder(folder, config, max_pixels)


def test_the_official_settings_bound_pictures_and_frames_alike(tmp_path):
    write(tmp_path, **HUB_SETTINGS)
    made = read(tmp_path, Qwen2VLVisionConfig())
    assert (made.min_pixels, made.max_pixels, made.video_min_pixels, made.video_max_pixels) == (3136, 12845056) * 2


@pytest.mark.parametrize("stored", [{}, {"resample": 3}, {"size": None, "min_pixels": None, "max_pixels": None}])
def test_settings_without_bounds_get_those_of_the_classes_in_transformers(tmp_path, stored):
    write(tmp_path, **stored)
    made = read(tmp_path, Qwen2VLVisionConfig())
    assert made == Qwen2VLImageProcessor()
    size = official_module().Qwen2VLImageProcessorPil().size
    assert (made.min_pixels, made.max_pixels) == (size.shortest_edge, size.longest_edge) == (3136, 1003520)
    assert (made.video_min_pixels, made.video_max_pixels) == (100352, 602112)


def test_a_picture_has_no_more_tokens_than_in_transformers_where_the_folder_stores_no_bounds(tmp_path):
    write(tmp_path, resample=3)
    picture = noise(1300, 1100)
    made = read(tmp_path, Qwen2VLVisionConfig()).image(picture)
    module = official_module().Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    expected = module(picture, return_tensors="pt")
    assert made.num_tokens * 4 == expected["image_grid_thw"].prod() == 4 * 1216
    assert made.pixel_values.shape == expected["pixel_values"].shape


def test_a_folder_without_settings_gets_those_of_the_classes_and_the_towers_sizes(tmp_path):
    assert read(tmp_path) == Qwen2VLImageProcessor(patch_size=4)


@pytest.mark.parametrize(
    "spelling",
    [
        {"min_pixels": 256, "max_pixels": 512},
        {"size": {"shortest_edge": 256, "longest_edge": 512}},
        {"size": {"min_pixels": 256, "max_pixels": 512}},
        {"size": {"shortest_edge": 1, "longest_edge": 9}, "min_pixels": 256, "max_pixels": 512},
        {"size": {"shortest_edge": 256, "longest_edge": 512}, "min_pixels": None, "max_pixels": None},
    ],
)
def test_every_spelling_of_the_bounds_is_read(tmp_path, spelling):
    write(tmp_path, patch_size=4, **spelling)
    made = read(tmp_path)
    assert (made.min_pixels, made.max_pixels, made.video_min_pixels, made.video_max_pixels) == (256, 512, 256, 512)


def test_settings_saved_by_transformers_are_read(tmp_path):
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    made = official_module().Qwen2VLImageProcessorPil(
        patch_size=4, min_pixels=256, max_pixels=512, image_mean=mean, image_std=std
    )
    made.save_pretrained(tmp_path)
    bounds = {"min_pixels": 256, "max_pixels": 512, "video_min_pixels": 256, "video_max_pixels": 512}
    assert read(tmp_path) == processor(**bounds, image_mean=mean, image_std=std)


@pytest.mark.parametrize("nested", [False, True])
def test_frames_go_by_the_folders_own_video_settings(tmp_path, nested):
    pictures = {"size": {"shortest_edge": 128, "longest_edge": 1024}, "patch_size": 4}
    videos = {"size": {"shortest_edge": 256, "longest_edge": 512}, "patch_size": 4}
    if nested:
        write(tmp_path, "processor_config", image_processor=pictures, video_processor=videos)
    else:
        write(tmp_path, **pictures)
        write(tmp_path, "video_preprocessor_config", **videos)
    assert read(tmp_path) == processor()


@pytest.mark.parametrize(("max_pixels", "min_pixels"), [(9000, 3136), (700, 700)])
def test_another_maximum_replaces_the_folders_for_pictures_and_frames(tmp_path, max_pixels, min_pixels):
    write(tmp_path, **HUB_SETTINGS | {"patch_size": 4})
    made = read(tmp_path, max_pixels=max_pixels)
    assert (made.max_pixels, made.video_max_pixels) == (max_pixels, max_pixels)
    assert (made.min_pixels, made.video_min_pixels) == (min_pixels, min_pixels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": 28, "width": 28}}, "size .*height.* is not supported; expected shortest_edge"),
        ({"size": {"longest_edge": 512}}, "size .*longest_edge.* is not supported; expected shortest_edge"),
        ({"size": 336}, "size 336 is not supported; expected shortest_edge"),
        ({"resample": 2}, "resample = 2 is not supported, only 3 is"),
        ({"do_normalize": False}, "do_normalize = False is not supported"),
        ({"patch_size": 14}, "patch_size = 14 is not supported, only 4 is"),
        ({"merge_size": 4}, "merge_size = 4 is not supported"),
        ({"temporal_patch_size": 1}, "temporal_patch_size = 1 is not supported"),
        ({"size": {"shortest_edge": 1, "longest_edge": "big"}}, r"size\.longest_edge = 'big' is not supported"),
    ],
)
@pytest.mark.parametrize("name", ["preprocessor_config", "video_preprocessor_config"])
def test_settings_that_the_model_was_not_trained_with_are_refused(tmp_path, name, changes, message):
    write(tmp_path, name, **{"patch_size": 4} | changes)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_videos_with_other_colours_than_pictures_are_refused(tmp_path):
    write(tmp_path, "video_preprocessor_config", image_mean=[0.5, 0.5, 0.5], patch_size=4)
    with pytest.raises(ValueError, match="videos have another image_mean or image_std than pictures"):
        read(tmp_path)


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder at .*gone"):
        read(tmp_path / "gone")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_pixels": 0}, "^min_pixels 0 and max_pixels 1024 must be whole numbers"),
        ({"min_pixels": 2000}, "^min_pixels 2000 and max_pixels 1024 must be"),
        ({"video_max_pixels": 300.0}, "^video_min_pixels 256 and video_max_pixels 300.0 must be"),
        ({"min_pixels": 1, "max_pixels": 63}, "one vision token of 8x8 = 64 pixels"),
        ({"image_mean": (0.5, 0.5)}, "image_mean must be three values"),
        ({"image_std": (0.5, 0.5, 0.0)}, "image_std must be three positive"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        processor(**wrong)


# Cost before it is paid


def vision_process() -> Callable[..., tuple[int, int]]:
    """The rule of qwen_vl_utils 0.0.14 (fetch_video) for the size of a frame, written from its description."""

    def size(num_frames: int, height: int, width: int) -> tuple[int, int]:
        low, high, total = 128 * 28 * 28, 768 * 28 * 28, 128000 * 28 * 28 * 0.9
        return smart_resize(height, width, 28, low, max(min(high, total / num_frames * 2), int(low * 1.05)))

    return size


@pytest.mark.parametrize("num_frames", [2, 100, 300, 302, 480, 768])
@pytest.mark.parametrize("size", [(1080, 1920), (480, 640), (2160, 3840), (1920, 1080)])
def test_frames_of_a_long_video_share_the_pixels_of_the_whole_as_in_qwen_vl_utils(num_frames, size):
    video = SampledVideo(tuple(range(num_frames)), *size, decode=lambda transform: [])
    height, width = vision_process()(num_frames, *size)
    assert Qwen2VLImageProcessor().plan_video(video).grids == ((-(-num_frames // 2), height // 28, width // 28),)


def test_ten_minutes_of_full_hd_have_the_tokens_of_qwen_vl_utils():
    video = SampledVideo(tuple(range(768)), 1080, 1920, decode=lambda transform: [])
    official = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056, video_min_pixels=3136, video_max_pixels=12845056)
    assert official.plan_video(video).num_tokens == 105_984
    unbounded = replace(official, max_video_tokens=None)
    with pytest.raises(ValueError, match=r"become 768 times 1932x1092 pixels = .*; take fewer frames \(--frames\), or lower"):
        unbounded.plan_video(video)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({}, 128_000),
        ({"max_video_tokens": 5000}, 5000),
        ({"cap_pixels_per_frame": False}, None),
        ({"cap_pixels_per_frame": True}, 128_000),
    ],
)
def test_the_bound_of_a_whole_video_follows_the_folder(tmp_path, stored, expected):
    write(tmp_path, "video_preprocessor_config", patch_size=4, **stored)
    assert read(tmp_path).max_video_tokens == expected


@given(height=st.integers(1, 60), width=st.integers(1, 60), count=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_the_plan_of_a_picture_or_video_has_the_grids_that_it_becomes(height, width, count):
    frames = [noise(width, height)] * count
    assert processor().plan_video(take_all(frames)).grids == processor().video(frames).grids
    assert processor().plan_image(frames[0]).grids == processor().image(frames[0]).grids


def test_frames_are_resized_as_they_are_decoded():
    alive = []

    def decode(transform):
        for number in range(6):
            alive.append(transform(noise(64, 48, seed=number)).size)
        return [noise(*alive[0])] * 6

    made = processor().plan_video(SampledVideo(tuple(range(6)), 48, 64, decode)).read()
    assert set(alive) == {(24, 16)}
    assert made.grids == ((3, 2, 3),)


def test_a_picture_that_its_minimum_would_blow_up_is_refused():
    with pytest.raises(ValueError, match=r"the picture would become .* pixels, more than the limit .*\(--max-pixels\)"):
        processor(min_pixels=10**12, max_pixels=10**13).plan_image(noise(20, 10))
