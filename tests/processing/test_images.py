"""Pictures: pixel values equal to the official processors', and clear errors for pictures that cannot be used."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nanovlm_v2drop.processing.images import (
    CLIP_IMAGE_MEAN,
    CLIP_IMAGE_STD,
    ImageProcessor,
    pad_to_square,
    resize_and_crop,
    resize_bicubic,
)
from nanovlm_v2drop.processing.opening import open_image

IMAGE_SIZE = 24
SIZES = [(64, 48), (48, 64), (50, 50), (24, 24), (23, 25), (1, 1), (7, 5), (301, 200), (600, 3), (3, 400)]
ORIENTATION = 0x0112  # EXIF tag


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise is the hardest case for a resampler: every rounding shows."""
    rng = np.random.default_rng(width * 10_000 + height)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    if mode == "P":
        return picture.convert("RGB").quantize(16)
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode)


def processor(image_aspect_ratio: str = "pad", image_size: int = IMAGE_SIZE) -> ImageProcessor:
    return ImageProcessor(image_size, CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, image_aspect_ratio)


def official_processor(image_aspect_ratio: str, image_size: int = IMAGE_SIZE):
    """transformers' LLaVA processor on Pillow; with do_pad off it is CLIP's, which llava-hf's checkpoints name."""
    module = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    return module.LlavaImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        do_pad=image_aspect_ratio == "pad",
    )


def bicubic_weights(length: int, new_length: int) -> np.ndarray:
    """Pillow's bicubic filter (a = -0.5) as a matrix (new_length, length) of integers with 22 fractional bits."""
    scale = length / new_length
    stretch = max(scale, 1.0)
    weights = np.zeros((new_length, length))
    for index in range(new_length):
        centre = (index + 0.5) * scale
        first = max(int(centre - 2 * stretch + 0.5), 0)
        last = min(int(centre + 2 * stretch + 0.5), length)
        distance = np.abs((np.arange(first, last) - centre + 0.5) * (1.0 / stretch))
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
        taps = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
        weights[index, first:last] = taps / taps.sum()
    return np.floor(np.abs(weights) * 2**22 + 0.5) * np.sign(weights)


def horizontal_first(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bicubic resize of (H, W, 3) bytes, rounded to bytes after the horizontal pass and again after the vertical."""
    for axis, new_length in ((1, width), (0, height)):
        if pixels.shape[axis] == new_length:
            continue
        weights = bicubic_weights(pixels.shape[axis], new_length)
        # float64 holds these integers exactly, and multiplies them faster than int64.
        sums = np.moveaxis(np.tensordot(weights, pixels.astype(np.float64), (1, axis)), 0, axis)
        pixels = np.clip(np.floor((sums + 2**21) / 2**22), 0, 255)
    return pixels.astype(np.uint8)


def resize_like_pillow_12(picture: Image.Image, size: tuple[int, int], **_) -> Image.Image:
    return Image.fromarray(horizontal_first(np.asarray(picture), *size))


def pixel_levels(pixel_values: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation, to grey levels in 0..255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_IMAGE_MEAN, CLIP_IMAGE_STD))
    return (pixel_values * std + mean) * 255


# Equality with the official processors


def assert_equals_official(picture: Image.Image, image_aspect_ratio: str) -> None:
    ours = processor(image_aspect_ratio)([picture])
    official = official_processor(image_aspect_ratio)
    # transformers 5 blends transparency over white, the original LLaVA drops it: so the official one gets plain RGB.
    picture = picture.convert("RGB")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize_like_pillow_12)
        assert torch.equal(ours, official(picture, return_tensors="pt")["pixel_values"])
    as_installed = official(picture, return_tensors="pt")["pixel_values"]
    if image_aspect_ratio == "pad" or picture.width >= picture.height:
        assert torch.equal(ours, as_installed)
    else:
        # Pillow 13 runs the vertical pass first in some tall pictures, which moves the rounding by one grey level.
        assert (pixel_levels(ours) - pixel_levels(as_installed)).abs().max() < 1.01


@pytest.mark.parametrize("size", SIZES)
def test_crop_equals_the_official_processor(size):
    assert_equals_official(noise(*size), "crop")


@pytest.mark.parametrize("size", SIZES)
def test_pad_equals_the_official_processor(size):
    assert_equals_official(noise(*size), "pad")


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "crop"])
@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1", "CMYK"])
def test_every_mode_equals_the_official_processor(mode, image_aspect_ratio):
    assert_equals_official(noise(50, 37, mode), image_aspect_ratio)


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "crop"])
def test_models_real_size_equals_the_official_processor(image_aspect_ratio):
    picture = noise(640, 427)
    official = official_processor(image_aspect_ratio, 336)(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(image_aspect_ratio, 336)([picture]), official)


# The resize itself


@pytest.mark.parametrize(("width", "height"), [(40, 90), (90, 40), (1, 1), (60, 10), (10, 60), (200, 7), (48, 36)])
def test_resize_equals_an_independent_horizontal_first_resize(width, height):
    picture = noise(48, 64)
    expected = horizontal_first(np.asarray(picture), width, height)
    assert np.array_equal(np.asarray(resize_bicubic(picture, width, height)), expected)


lengths = st.integers(1, 80)


@given(width=lengths, height=lengths, new_width=lengths, new_height=lengths)
@settings(max_examples=60, deadline=None)
def test_resize_runs_horizontal_first_for_any_shape(width, height, new_width, new_height):
    picture = noise(width, height)
    expected = horizontal_first(np.asarray(picture), new_width, new_height)
    assert np.array_equal(np.asarray(resize_bicubic(picture, new_width, new_height)), expected)


@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_both_ways_to_a_square_always_arrive_there(width, height, size):
    picture = noise(width, height)
    assert resize_and_crop(picture, size).size == (size, size)
    assert pad_to_square(picture, (0, 0, 0)).size == (max(width, height),) * 2


def test_crop_truncates_the_long_side_and_the_offset():
    # 24 * 25 / 23 = 26.09 -> 26 pixels wide, one cut off at each end.
    picture = noise(25, 23)
    expected = resize_bicubic(picture, 26, 24).crop((1, 0, 25, 24))
    assert resize_and_crop(picture, 24).tobytes() == expected.tobytes()


def test_pad_puts_the_odd_row_at_the_bottom():
    padded = np.asarray(pad_to_square(Image.new("RGB", (4, 1), (255, 0, 0)), (1, 2, 3)))
    assert padded[1].tolist() == [[255, 0, 0]] * 4
    assert (padded[[0, 2, 3]] == (1, 2, 3)).all()


def test_padding_has_clips_mean_colour():
    pixel_values = processor()([Image.new("RGB", (100, 20), (255, 255, 255))])
    assert torch.allclose(pixel_levels(pixel_values[0])[:, 0, 0], torch.tensor([122.0, 116.0, 104.0]), atol=1e-4)


# Batches


def test_a_batch_equals_its_pictures_one_by_one():
    pictures = [noise(30, 20), noise(20, 30), noise(1, 1)]
    batch = processor()(pictures)
    assert batch.shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.cat([processor()([picture]) for picture in pictures]))


def test_no_pictures_make_an_empty_batch():
    assert processor()([]).shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_pictures_may_be_given_as_paths(tmp_path):
    noise(30, 20).save(tmp_path / "a.png")
    from_paths = processor()([tmp_path / "a.png", str(tmp_path / "a.png")])
    assert torch.equal(from_paths, processor()([noise(30, 20)] * 2))


def test_pictures_are_left_unchanged():
    picture = noise(30, 20, "RGBA")
    processor()([picture])
    assert picture.mode == "RGBA"
    assert picture.tobytes() == noise(30, 20, "RGBA").tobytes()


# Opening


def saved_with_exif_turn(path) -> Image.Image:
    picture = noise(30, 20)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture.save(path, exif=exif)
    return picture


def test_file_is_turned_upright(tmp_path):
    picture = saved_with_exif_turn(tmp_path / "turned.png")
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    opened = open_image(tmp_path / "turned.png")
    assert opened.size == (20, 30)
    assert opened.tobytes() == upright.tobytes()


def test_turned_jpeg_equals_the_official_processor_on_the_upright_picture(tmp_path):
    saved_with_exif_turn(tmp_path / "turned.jpg")
    image_utils = pytest.importorskip("transformers.image_utils")
    official = image_utils.load_image(str(tmp_path / "turned.jpg"))
    assert open_image(tmp_path / "turned.jpg").tobytes() == official.tobytes()
    assert_equals_official(open_image(tmp_path / "turned.jpg"), "crop")


def test_opened_picture_is_not_turned_again(tmp_path):
    saved_with_exif_turn(tmp_path / "turned.jpg")
    with Image.open(tmp_path / "turned.jpg") as picture:
        assert open_image(picture).size == (30, 20)


def test_transparency_is_dropped_and_not_blended():
    transparent_red = Image.new("RGBA", (2, 2), (200, 10, 20, 0))
    assert open_image(transparent_red).getpixel((0, 0)) == (200, 10, 20)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [0, bytes(range(16))])
def test_palette_transparency_is_dropped_without_a_warning(tmp_path, transparency):
    picture = noise(8, 8, "P")
    picture.save(tmp_path / "palette.png", transparency=transparency)
    assert open_image(tmp_path / "palette.png").tobytes() == picture.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_one_pixel_is_enough(tmp_path, mode):
    noise(1, 1, mode).save(tmp_path / "pixel.png")
    opened = open_image(tmp_path / "pixel.png")
    assert (opened.mode, opened.size) == ("RGB", (1, 1))


def test_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "two.gif").getpixel((0, 0)) == (255, 0, 0)


# Pictures that cannot be used


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no picture file at .*gone\.png"):
        open_image(tmp_path / "gone.png")


def test_folder_is_not_a_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match="no picture file"):
        open_image(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 40, 500])
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_broken_file_is_an_error_that_names_it(tmp_path, extension, kept):
    path = tmp_path / f"broken.{extension}"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"cannot read .*broken\.{extension} as a picture"):
        open_image(path)


@given(damage=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_a_value_error(tmp_path, damage):
    buffer = io.BytesIO()
    noise(12, 12).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    for position, value in damage:
        content[position % len(content)] = value
    (tmp_path / "damaged.png").write_bytes(content)
    try:
        assert open_image(tmp_path / "damaged.png").mode == "RGB"
    except ValueError as error:
        assert "damaged.png" in str(error)  # noqa: PT017


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_picture_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match=f"the picture is {size[0]}x{size[1]}: it needs at least one pixel"):
        open_image(Image.new("RGB", size))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mode_of_unknown_range_is_refused(mode):
    with pytest.raises(ValueError, match=f"{mode}' has more than 8 bits per channel, and its range is unknown; scale it"):
        open_image(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("source", [None, 3, np.zeros((4, 4, 3), np.uint8)])
def test_unsupported_source_is_refused(source):
    with pytest.raises(ValueError, match="must be a path, bytes or a PIL picture, got"):
        open_image(source)


def test_huge_file_is_refused_with_its_pixel_count_and_the_limit(tmp_path, monkeypatch):
    noise(30, 20).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"huge\.png as a picture, it is too large.*600 pixels.*200 pixels.*MAX_IMAGE_PIXELS"):
        open_image(tmp_path / "huge.png")


@pytest.mark.parametrize(("image_aspect_ratio", "grown"), [("pad", "200000x200000"), ("crop", "9600000x24")])
def test_thin_picture_is_refused_before_it_fills_the_memory(image_aspect_ratio, grown):
    picture = Image.new("RGB", ({"pad": 200_000, "crop": 400_000}[image_aspect_ratio], 1))
    with pytest.raises(ValueError, match=f"become {grown} pixels = .* more than the limit of 178956970; cut it"):
        processor(image_aspect_ratio)([picture])


def test_pixel_limit_can_be_lifted(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert pad_to_square(noise(30, 1), (0, 0, 0)).size == (30, 30)


# Settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 0}, "image_size must be a positive number of pixels, got 0"),
        ({"image_size": 33.6}, "image_size must be a positive number of pixels, got 33.6"),
        ({"image_mean": (0.5, 0.5)}, "image_mean must be three values"),
        ({"image_mean": (127.5, 127.5, 127.5)}, "image_mean must be three values in 0..1"),
        ({"image_std": (0.5, 0.5, 0.0)}, "image_std must be three positive and finite values"),
        ({"image_std": (0.5, 0.5, float("inf"))}, "image_std must be three positive and finite values"),
        ({"image_mean": (0.5, 0.5, float("nan"))}, "image_mean must be three values in 0..1"),
        ({"image_aspect_ratio": "stretch"}, "unknown image_aspect_ratio 'stretch'; choose one of: pad, crop, squeeze"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    fields = {"image_size": 24, "image_mean": CLIP_IMAGE_MEAN, "image_std": CLIP_IMAGE_STD} | wrong
    with pytest.raises(ValueError, match=message):
        ImageProcessor(**fields)


HUB_SETTINGS = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.1, 0.2, 0.3],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 336},
}


def write_settings(folder, **changes) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(HUB_SETTINGS | changes))


@pytest.mark.parametrize("size", [336, {"shortest_edge": 336}])
@pytest.mark.parametrize("crop_size", [336, [336, 336], {"height": 336, "width": 336}])
def test_every_spelling_of_the_size_is_read(tmp_path, size, crop_size):
    write_settings(tmp_path, size=size, crop_size=crop_size)
    expected = ImageProcessor(336, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3), "crop")
    assert ImageProcessor.from_folder(tmp_path, 336, "crop") == expected


def test_settings_saved_by_transformers_are_read(tmp_path):
    official_processor("crop", 336).save_pretrained(tmp_path)
    assert ImageProcessor.from_folder(tmp_path, 336) == processor("pad", 336)


def test_nested_settings_are_read_before_those_of_a_file_of_their_own_as_by_transformers(tmp_path):
    write_settings(tmp_path, image_mean=[0.1, 0.1, 0.1])
    assert ImageProcessor.from_folder(tmp_path, 336).image_mean == (0.1, 0.1, 0.1)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": HUB_SETTINGS}))
    assert ImageProcessor.from_folder(tmp_path, 336).image_mean == (0.4, 0.5, 0.6)
    official = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil
    assert tuple(official.from_pretrained(tmp_path).image_mean) == (0.4, 0.5, 0.6)


@pytest.mark.parametrize("other_file", [None, "processor_config.json"])
def test_folder_without_image_settings_gets_clips(tmp_path, other_file):
    if other_file is not None:
        (tmp_path / other_file).write_text('{"patch_size": 14}')
    assert ImageProcessor.from_folder(str(tmp_path), 336) == processor("pad", 336)


@pytest.mark.parametrize("name", ["size", "crop_size"])
@pytest.mark.parametrize("side", [224, [336, 224], {"height": 336, "width": 224}])
def test_size_that_disagrees_with_the_tower_is_refused(tmp_path, name, side):
    write_settings(tmp_path, **{name: side})
    with pytest.raises(ValueError, match=f"{name} is .*224.*image_size is 336"):
        ImageProcessor.from_folder(tmp_path, 336)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"longest_edge": 336}}, "size .*longest_edge.* is not supported"),
        ({"crop_size": {"shortest_edge": 336}}, "crop_size .*shortest_edge.* is not supported"),
        ({"do_center_crop": False}, "do_center_crop = False is not supported, pictures would not become square"),
        ({"do_center_crop": "no"}, "do_center_crop = 'no' is not supported"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor = .* is not supported"),
        ({"do_resize": 1}, "do_resize = 1 is not supported; expected one of False, True"),
        ({"image_mean": 0.5}, "image_mean = 0.5 is not supported; expected a list of 3"),
        ({"image_std": ["0.1", "0.2", "0.3"]}, "image_std = .* is not supported; expected a list of 3"),
        ({"do_pad": True, "pad_size": {"height": 400, "width": 400}}, "pad_size = .* is not supported"),
        (
            {"image_processor_type": "ViTImageProcessor"},
            "'ViTImageProcessor' is not supported, only LlavaImageProcessor or CLIP",
        ),
        ({"resample": 2}, "resample = 2 is not supported, only "),
        ({"do_normalize": False}, "do_normalize = False is not supported, only True"),
    ],
)
def test_settings_for_another_processor_are_refused(tmp_path, changes, message):
    write_settings(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        ImageProcessor.from_folder(tmp_path, 336)


@pytest.mark.parametrize(("content", "message"), [("{", "is not valid JSON"), ("[]", "must hold a JSON object, got list")])
def test_broken_settings_file_is_an_error_that_names_it(tmp_path, content, message):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json {message}"):
        ImageProcessor.from_folder(tmp_path, 336)


def test_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder at .*gone"):
        ImageProcessor.from_folder(tmp_path / "gone", 336)
