"""Opening pictures: every way in gives the same pixels, and every picture that cannot be used gives one clear line."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from nanovlm_v2drop.processing.images import resize_bicubic
from nanovlm_v2drop.processing.opening import FORMATS, TURNS, image_size, open_image

ORIENTATION, SHORT = 274, 3


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 9, height: int = 6) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of these entries (tag, type, count, value), little-endian."""
    head, data, start = struct.pack("<H", len(entries)), b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        inside = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", start + len(data))
        head, data = head + struct.pack("<HHI", tag, kind, count) + inside, data + (b"" if len(value) <= 4 else value)
    return b"Exif\0\0II*\0\x08\0\0\0" + head + b"\0\0\0\0" + data


def turn(orientation: int) -> tuple[int, int, int, bytes]:
    return ORIENTATION, SHORT, 1, struct.pack("<H", orientation)


# Ways in


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "MPO"])
def test_a_path_bytes_and_a_pil_picture_give_the_same_pixels(tmp_path, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    data = encoded(noise(), kind)
    (tmp_path / "picture").write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (data, tmp_path / "picture", str(tmp_path / "picture"), Image.open(io.BytesIO(data))):
        assert np.array_equal(open_image(source), expected)
        assert image_size(source) == (6, 9)


def test_the_pictures_of_a_stereo_camera_are_read(tmp_path):
    data = encoded(noise(), "MPO", save_all=True, append_images=[noise()])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert open_image(data).size == (9, 6)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_a_file_is_turned_as_pillow_turns_it(kind, orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(noise(), kind, exif=tags, **options)
    from PIL import ImageOps

    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(open_image(data), expected)
    assert image_size(data) == (expected.height, expected.width)
    assert (expected.size == (6, 9)) == (orientation >= 5)


ODD_ENTRIES = {
    "ImageWidth as text": [(256, 2, 5, b"4032\0"), turn(6)],
    "BitsPerSample too large": [(258, 4, 1, struct.pack("<I", 70000)), turn(6)],
    "negative XResolution": [turn(6), (282, 9, 1, struct.pack("<i", -5))],
    "Software as rational": [turn(6), (305, 5, 1, struct.pack("<II", 1, 2))],
    "resolution over zero": [turn(6), (283, 5, 1, struct.pack("<II", 1, 0))],
    "unknown type": [turn(6), (305, 99, 1, b"abcd")],
    "orientation as long": [(ORIENTATION, 4, 1, struct.pack("<I", 6))],
}


@pytest.mark.parametrize("entries", ODD_ENTRIES.values(), ids=ODD_ENTRIES.keys())
@pytest.mark.filterwarnings("ignore")
def test_odd_exif_tags_do_not_keep_a_picture_from_being_turned(entries):
    data = encoded(noise(90, 60), "JPEG", exif=exif(*entries))
    assert open_image(data).size == (60, 90)
    assert image_size(data) == (90, 60)


@pytest.mark.parametrize(
    "tags",
    [
        exif((ORIENTATION, 2, 2, b"6\0")),
        exif(turn(9)),
        exif(turn(0)),
        b"Exif\0\0not TIFF at all",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_exif_without_a_valid_orientation_leaves_a_picture_as_stored(tags):
    data = encoded(noise(90, 60), "JPEG", exif=tags)
    assert open_image(data).size == (90, 60)
    assert image_size(data) == (60, 90)


def test_every_orientation_is_known():
    assert set(TURNS) == set(range(2, 9))


# More than 8 bits


@pytest.mark.parametrize("kind", ["PNG", "TIFF", None])
def test_sixteen_bits_are_scaled_to_eight(kind):
    levels = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    picture = Image.fromarray(levels)
    opened = open_image(picture if kind is None else encoded(picture, kind))
    assert opened.mode == "RGB"
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]


def test_a_grey_picture_has_the_same_pixels_with_8_and_16_bits():
    grey = noise().convert("L")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for byte_order in (wide, Image.frombytes("I;16B", wide.size, np.asarray(wide).astype(">u2").tobytes())):
        assert np.array_equal(open_image(byte_order), open_image(grey))


def test_a_turned_16_bit_file_keeps_its_levels():
    wide = Image.fromarray(np.arange(54, dtype=np.uint16).reshape(6, 9) * 257)
    tags = Image.Exif()
    tags[ORIENTATION] = 3
    assert np.asarray(open_image(encoded(wide, "PNG", exif=tags)))[0, 0].tolist() == [53, 53, 53]


def test_a_tiff_file_that_uses_its_levels_in_another_way_is_refused():
    wide = Image.fromarray(np.zeros((2, 2), np.uint16))
    with pytest.raises(ValueError, match="photometric interpretation 0 is not supported; save it with 8 bits"):
        open_image(encoded(wide, "TIFF", tiffinfo={262: 0}))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_floats_and_32_bit_integers_are_refused_in_a_file_too(kind):
    data = encoded(Image.fromarray(np.full((2, 2), 3, kind)), "TIFF")
    with pytest.raises(ValueError, match="has more than 8 bits per channel, and its range is unknown; scale it"):
        open_image(data)


# What cannot be used


@pytest.mark.parametrize("name", ["cat.png", "cat.eps", "cat.jpg"])
def test_postscript_starts_no_program_under_any_name(tmp_path, monkeypatch, name):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, content):
        with pytest.raises(ValueError, match="as a picture: it is none of JPEG, MPO, PNG, WEBP, GIF, BMP, TIFF, AVIF"):
            open_image(source)
    with pytest.raises(ValueError, match=r"its format EPS is none of .*; convert it first"):
        open_image(Image.open(tmp_path / name))
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "SGI"])
def test_a_format_that_nobody_feeds_is_refused(kind):
    with pytest.raises(ValueError, match=r"as a picture: it is none of JPEG, .* or it is damaged; save it as PNG or JPEG"):
        open_image(encoded(noise(16, 16), kind))


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def with_text_chunk() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a" * 3_000_000, zip=True)
    return encoded(noise(), "PNG", pnginfo=text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot read 0 bytes as a picture: it is none of JPEG"),
        (b"not a picture", "cannot read 13 bytes as a picture: it is none of JPEG"),
        (encoded(noise(64, 64), "PNG")[:2000], "cannot read 2000 bytes as a picture: .*truncated"),
        (encoded(noise(64, 64), "JPEG")[:1500], "cannot read 1500 bytes as a picture: .*truncated"),
        (encoded(noise(64, 64), "WEBP")[:200], "cannot read 200 bytes as a picture: "),
        (huge_png(20_000, 20_000), "as a picture, it is too large: .*400000000 pixels.* Shrink it"),
        (huge_png(0, 5), "cannot read .* as a picture: "),
        (with_text_chunk(), "as a picture: Decompressed data too large"),
    ],
)
def test_bytes_that_cannot_be_used_give_one_line(tmp_path, data, message):
    (tmp_path / "picture.png").write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        open_image(data)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"picture\.png as a picture"):
        open_image(tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://example.com/cat.jpg", r"no picture file at 'http://example.com/cat.jpg'; web addresses are not fetched"),
        ("A" * 10_000, r"no picture file at 'A{40}\.\.\.A{40}'"),
        (Path("nowhere/cat.jpg"), "no picture file at 'nowhere/cat.jpg'"),
        ("\0", "no picture file at"),
        ("", r"no picture file at ''"),
    ],
)
def test_a_name_that_is_no_file_is_shown_with_the_way_out(source, message):
    for read in (open_image, image_size):
        with pytest.raises(FileNotFoundError, match=message):
            read(source)


def test_a_resize_that_needs_too_many_pixels_between_its_passes_is_refused():
    with pytest.raises(ValueError, match="the picture would become 400x1000000 pixels = 400000000 pixels, more than the limit"):
        resize_bicubic(Image.new("RGB", (1, 1_000_000)), 400, 400)
