"""LLaVA-OneVision's pictures: tiles equal to the official processor's, and grids that count the tokens they become."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numbered_clips import write_clip
from PIL import Image
from tiny import resizing_horizontally_first
from torch import Tensor

from nanovlm_v2drop.models.config import LlavaOnevisionConfig, SiglipVisionConfig, TextConfig
from nanovlm_v2drop.processing.images_onevision import OnevisionImageProcessor, fit_into
from nanovlm_v2drop.processing.video import SampledVideo, UniformSampling, read_frames, sample_video

IMAGE_SIZE, PATCH_SIZE = 24, 8
MEAN, STD = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
SIZES = [(24, 24), (64, 48), (48, 64), (23, 25), (1, 1), (7, 5), (301, 200), (100, 3), (3, 100), (144, 144), (200, 190)]
ORIENTATION = 0x0112  # EXIF tag


def pinpoints(image_size: int = IMAGE_SIZE) -> tuple[tuple[int, int], ...]:
    return tuple((high * image_size, wide * image_size) for high in range(1, 7) for wide in range(1, 7))


def processor(image_size: int = IMAGE_SIZE, patch_size: int = PATCH_SIZE, max_tiles: int = 9) -> OnevisionImageProcessor:
    return OnevisionImageProcessor(image_size, pinpoints(image_size), patch_size, max_tiles, MEAN, STD)


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def official_processor(image_size: int = IMAGE_SIZE):
    module = pytest.importorskip("transformers.models.llava_onevision.image_processing_pil_llava_onevision")
    return module.LlavaOnevisionImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_grid_pinpoints=[list(pinpoint) for pinpoint in pinpoints(image_size)],
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def official_tiles(pictures: list[Image.Image], image_size: int = IMAGE_SIZE) -> Tensor:
    """What transformers makes of the pictures of one request, (pictures, tiles, 3, S, S)."""
    with resizing_horizontally_first():
        return official_processor(image_size)([pictures], return_tensors="pt")["pixel_values"]


def official_num_tokens(size: tuple[int, int], image_size: int, patch_size: int, max_tiles: int) -> int:
    """How many placeholders transformers' processor puts where such a picture stands."""
    module = pytest.importorskip("transformers.models.llava_onevision.processing_llava_onevision")
    kind = module.LlavaOnevisionProcessor
    stand_in = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=list(pinpoints(image_size))),
        num_image_tokens=(image_size // patch_size) ** 2,
        vision_aspect_ratio=f"anyres_max_{max_tiles}",
    )
    stand_in._get_unpadded_features = lambda *sizes: kind._get_unpadded_features(stand_in, *sizes)
    return kind._get_number_of_features(stand_in, *size, image_size, image_size)


def tone(colour: tuple[int, int, int]) -> Tensor:
    """One colour as the tower sees it, (3, 1, 1)."""
    return ((torch.tensor(colour) / 255 - torch.tensor(MEAN)) / torch.tensor(STD))[:, None, None]


# A picture alone in its request


@pytest.mark.parametrize("size", SIZES)
def test_tiles_equal_those_of_the_official_processor(size: tuple[int, int]) -> None:
    picture = noise(*size)
    ours = processor().image(picture)
    assert ours.pixel_values.dtype == torch.float32
    assert torch.equal(ours.pixel_values, official_tiles([picture])[0])


@given(width=st.integers(1, 160), height=st.integers(1, 160))
@settings(max_examples=40, deadline=None)
def test_tiles_equal_those_of_the_official_processor_for_any_shape(width: int, height: int) -> None:
    picture = noise(width, height)
    assert torch.equal(processor().image(picture).pixel_values, official_tiles([picture])[0])


def test_tiles_of_the_real_size_equal_those_of_the_official_processor() -> None:
    picture = noise(500, 333)
    ours = processor(384, 14).image(picture)
    assert torch.equal(ours.pixel_values, official_tiles([picture], 384)[0])
    assert ours.grids == ((1, 27, 27), (1, 27, 41))


@given(width=st.integers(1, 2500), height=st.integers(1, 2500), max_tiles=st.sampled_from([2, 9]))
@example(width=2304, height=2304, max_tiles=9)
@settings(max_examples=40, deadline=None)
def test_the_grids_count_the_tokens_that_transformers_makes_room_for(width: int, height: int, max_tiles: int) -> None:
    image_size, patch_size = 34, 3  # cheap tiles, 11 patches a side and a rest of one pixel
    ours = processor(image_size, patch_size, max_tiles).image(Image.new("RGB", (width, height)))
    assert ours.grids[0] == (1, 11, 11)
    assert sum(frames * rows * columns for frames, rows, columns in ours.grids) == ours.num_tokens
    assert ours.num_tokens == official_num_tokens((height, width), image_size, patch_size, max_tiles)


def test_the_input_carries_the_size_of_the_picture_and_no_video() -> None:
    ours = processor().image(noise(64, 48))
    assert (ours.size, ours.is_video) == ((48, 64), False)


def test_the_base_tile_comes_first_and_is_squeezed() -> None:
    picture = Image.new("RGB", (96, 24), (255, 0, 0))
    picture.paste((0, 255, 0), (48, 0, 96, 24))
    base, *tiles = processor().image(picture).pixel_values
    assert len(tiles) == 4
    assert torch.allclose(base[:, :, :8], tone((255, 0, 0)), atol=1e-5)
    assert torch.allclose(base[:, :, 16:], tone((0, 255, 0)), atol=1e-5)
    assert torch.allclose(tiles[0], tone((255, 0, 0)), atol=1e-5)
    assert torch.allclose(tiles[3], tone((0, 255, 0)), atol=1e-5)


def test_the_padding_is_black_before_the_normalisation() -> None:
    tiles = processor().image(Image.new("RGB", (48, 30), (255, 255, 255))).pixel_values[1:]
    assert len(tiles) == 4
    # 48 x 30 in 48 x 48: nine black rows above and below.
    assert torch.allclose(tiles[0, :, :9], tone((0, 0, 0)), atol=1e-5)
    assert torch.allclose(tiles[0, :, 9:], tone((255, 255, 255)), atol=1e-5)
    assert torch.allclose(tiles[2, :, 15:], tone((0, 0, 0)), atol=1e-5)


def test_the_odd_row_of_the_padding_is_at_the_bottom() -> None:
    fitted = np.asarray(fit_into(Image.new("RGB", (10, 7), (9, 9, 9)), 10, 10))[:, 0, 0]
    assert fitted.tolist() == [0, 9, 9, 9, 9, 9, 9, 9, 0, 0]


def test_a_fitted_picture_is_rounded_up() -> None:
    # 300 x 7 in 100 x 100: 2.33 rows become three.
    fitted = np.asarray(fit_into(Image.new("RGB", (300, 7), (9, 9, 9)), 100, 100))[:, 0, 0]
    assert np.flatnonzero(fitted).tolist() == [48, 49, 50]


def test_pictures_are_opened_upright_and_without_transparency(tmp_path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    noise(30, 20).save(tmp_path / "turned.png", exif=exif)
    turned = processor().image(tmp_path / "turned.png")
    upright = noise(30, 20).transpose(Image.Transpose.ROTATE_270)
    assert turned.size == (30, 20)
    assert torch.equal(turned.pixel_values, processor().image(upright).pixel_values)
    clear = noise(30, 20)
    clear.putalpha(0)
    assert torch.equal(processor().image(clear).pixel_values, processor().image(noise(30, 20)).pixel_values)


# Several pictures


@pytest.mark.parametrize("size", SIZES)
def test_one_of_several_pictures_equals_that_of_the_official_processor(size: tuple[int, int]) -> None:
    pictures = [noise(*size), noise(40, 30)]
    ours = [processor().image(picture, alone=False) for picture in pictures]
    official = official_tiles(pictures)
    assert torch.equal(torch.stack([one.pixel_values for one in ours]), official)
    assert ours[0].grids == ((1, 3, 3), (1, 1, 1))
    assert (ours[0].size, ours[0].num_tokens, ours[0].is_video) == (size[::-1], 10, False)


def test_one_of_several_pictures_is_padded_with_the_mean_colour() -> None:
    ours = processor().image(Image.new("RGB", (24, 8), (255, 255, 255)), alone=False)
    assert torch.allclose(ours.pixel_values[0, :, :7], tone((102, 127, 153)), atol=1e-5)


def test_a_thin_picture_among_several_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(ValueError, match="more than the limit of 178956970; cut it"):
        processor().image(Image.new("RGB", (200_000, 1)), alone=False)


# Videos


@pytest.mark.parametrize("size", [(64, 48), (30, 90), (24, 24)])
def test_a_frame_is_squeezed_like_the_base_tile_of_the_official_processor(size: tuple[int, int]) -> None:
    frames = [noise(*size).rotate(180 * turn) for turn in range(3)]
    video = processor().video(frames)
    official = torch.stack([official_tiles([frame])[0, 0] for frame in frames])
    assert torch.equal(video.pixel_values, official)
    assert (video.grids, video.size, video.is_video) == (((3, 2, 2), (1, 1, 1)), size[::-1], True)


def test_32_frames_of_the_real_size_become_6273_tokens() -> None:
    assert processor(384, 14).video([Image.new("RGB", (8, 8))] * 32).num_tokens == 6273


def test_frames_in_another_mode_are_converted() -> None:
    grey = noise(30, 20).convert("L")
    assert torch.equal(processor().video([grey]).pixel_values, processor().video([grey.convert("RGB")]).pixel_values)


def test_a_video_without_frames_or_with_frames_of_two_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="the video is an empty list; it needs at least one picture"):
        processor().video([])
    with pytest.raises(ValueError, match="frames of 20x30 and 30x20 pixels; resize them to one size first"):
        processor().video([noise(20, 30), noise(30, 20)])


# Settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 0}, "image_size must be a positive number of pixels, got 0"),
        ({"image_mean": (127.5,) * 3}, "image_mean must be three values in 0..1"),
        ({"image_std": (0.5, 0.5, 0.0)}, "image_std must be three positive and finite values"),
        ({"patch_size": 0}, "patch_size 0 must be between 1 and image_size 24"),
        ({"patch_size": 25}, "patch_size 25 must be between 1 and image_size 24"),
        ({"max_tiles": 0}, "max_tiles must be at least 1, got 0"),
        ({"image_grid_pinpoints": ()}, "image_grid_pinpoints must name at least one size"),
        ({"image_grid_pinpoints": ((24, 24), (24, 50))}, r"\(24, 50\) must be two multiples of image_size 24"),
        ({"image_grid_pinpoints": ((24, 0),)}, r"\(24, 0\) must be two multiples of image_size 24"),
        ({"image_grid_pinpoints": ((24,),)}, r"\(24,\) must be two multiples of image_size 24"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    fields = {"image_size": 24, "image_grid_pinpoints": pinpoints(), "patch_size": 8, "max_tiles": 9} | wrong
    with pytest.raises(ValueError, match=message):
        OnevisionImageProcessor(**fields)


def from_folder(folder, **settings: str) -> OnevisionImageProcessor:
    tower = SiglipVisionConfig(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    config = LlavaOnevisionConfig(TextConfig(), vision_config=tower, image_grid_pinpoints=pinpoints(), **settings)
    return OnevisionImageProcessor.from_folder(folder, config)


def test_settings_saved_by_transformers_are_read(tmp_path) -> None:
    official_processor().save_pretrained(tmp_path)
    assert from_folder(tmp_path) == processor()


def test_a_folder_without_image_settings_gets_siglips(tmp_path) -> None:
    found = from_folder(str(tmp_path))
    assert found.image_mean == found.image_std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 336, "width": 336}}, "size is .*336.*image_size is 24"),
        ({"image_grid_pinpoints": [[24, 24]]}, "image_grid_pinpoints are not those of the model's config.json"),
        ({"resample": 2}, "resample = 2 is not supported, only "),
        ({"do_rescale": False}, "do_rescale = False is not supported, only True"),
    ],
)
def test_settings_that_disagree_with_the_model_are_refused(tmp_path, settings, message: str) -> None:
    stored = {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "image_grid_pinpoints": pinpoints()} | settings
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=message):
        from_folder(tmp_path)


def test_a_folders_processor_counts_a_videos_tokens_as_the_models_config_says(tmp_path) -> None:
    frames = [noise(40, 30)] * 2
    assert from_folder(tmp_path).video(frames).grids == ((2, 2, 2), (1, 1, 1))
    llava_video = from_folder(tmp_path, mm_spatial_pool_mode="average", mm_newline_position="grid")
    assert llava_video.video(frames).grids == ((2, 1, 2),)


def test_a_missing_folder_is_an_error_that_names_it(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder at .*gone"):
        from_folder(tmp_path / "gone")


# Cost before it is paid


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("alone", [True, False])
def test_the_plan_of_a_picture_has_the_grids_that_it_becomes(size: tuple[int, int], alone: bool) -> None:
    assert processor().plan_image(noise(*size), alone).grids == processor().image(noise(*size), alone).grids


def test_more_frames_than_the_pixel_limit_holds_are_refused_before_they_are_decoded() -> None:
    video = SampledVideo(tuple(range(400_000)), 1080, 1920, decode=lambda transform: [])
    with pytest.raises(
        ValueError, match=r"become 400000 times 24x24 pixels = 230400000 pixels.*take fewer frames \(--frames\)"
    ):
        processor().plan_video(video)


def test_a_video_file_is_squeezed_frame_by_frame(tmp_path) -> None:
    path = write_clip(tmp_path / "clip.mp4", [noise(64, 48)] * 5, codec="mpeg4")
    video = sample_video(path, UniformSampling(3))
    planned = processor().plan_video(video)
    assert planned.read().grids == planned.grids
    whole = processor().video(read_frames(path, UniformSampling(3)))
    assert torch.equal(planned.read().pixel_values, whole.pixel_values)
