"""Opening pictures: from a file, from its bytes or from a PIL picture to upright 8-bit RGB, or to one clear error.

All pictures come through `open_image`: those of the command line, of Python, of the benchmarks, and the frames of a video that
is given as a list. Every limit on pixels is `pixel_limit`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

ImageSource = str | Path | bytes | Image.Image

# The formats that people feed. Pillow knows others, and starts an outside program for some of them (PostScript).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# EXIF orientations and how each is turned upright. From 5 on, height and width change places.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FIRST_SIDEWAYS_TURN = 5
SIXTEEN_BITS_TO_EIGHT = 257  # 65535 = 257 * 255
LONGEST_NAME = 80  # characters of a name that an error message shows


def open_image(source: ImageSource) -> Image.Image:
    """Open one picture as 8-bit RGB.

    `source` is the path of a file, the bytes of a file, or a PIL picture. A file is turned upright by its EXIF orientation;
    a PIL picture is taken as it stands. Transparency is dropped, not blended over a background, as the original LLaVA's
    `convert("RGB")` does. Of an animation the first frame is taken. Grey levels of 16 bits are scaled to 8 bits.

    Raises FileNotFoundError for a missing file. Raises ValueError for a file in another format than FORMATS, a damaged file,
    a picture without pixels or with more than `pixel_limit`, a mode whose range of values is unknown (32-bit integers and
    floats), and for a source that is no picture.
    """
    with _opened(source) as picture:
        picture.load()  # Pillow turns TIFF files while it loads them.
        turn = None if isinstance(source, Image.Image) else TURNS.get(_orientation(picture))
        converted = _to_rgb(picture)
        return converted if turn is None else converted.transpose(turn)


def image_size(source: ImageSource) -> tuple[int, int]:
    """Height and width in pixels of what `open_image` returns, from the header alone; raises as it does for the header."""
    with _opened(source) as picture:
        width, height = picture.size
        # Pillow gives the size of a TIFF file upright.
        stored = isinstance(source, Image.Image) or picture.format == "TIFF"
        sideways = not stored and _orientation(picture) in range(FIRST_SIDEWAYS_TURN, max(TURNS) + 1)
        return (width, height) if sideways else (height, width)


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """The picture with its header read and its pixels not yet decoded; errors inside the block become one clear line."""
    opened: Path | BytesIO | Image.Image
    match source:
        case Image.Image():
            name, opened = "the picture given", source
        case str() | Path():
            name, opened = f"{source} as a picture", existing_file(source, "picture")
        case bytes():
            name, opened = f"{len(source)} bytes as a picture", BytesIO(source)
        case _:
            kind = type(source).__name__
            raise ValueError(f"a picture must be a path, bytes or a PIL picture, got {kind}; PIL.Image.fromarray takes arrays")
    try:
        if isinstance(opened, Image.Image):
            _check_pending(opened)
            yield opened
        else:
            with Image.open(opened, formats=_known_formats()) as picture:
                yield picture
    except UnidentifiedImageError as error:
        advice = "save it as PNG or JPEG (a telephone's HEIC too)"
        raise ValueError(f"cannot read {name}: it is none of {', '.join(FORMATS)}, or it is damaged; {advice}") from error
    except Image.DecompressionBombError as error:
        advice = "Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS."
        raise ValueError(f"cannot read {name}, it is too large: {error} {advice}") from error
    # Decoders report damaged bytes with SyntaxError, struct.error, IndexError and more. All mean the same to the reader.
    except Exception as error:
        raise ValueError(f"cannot read {name}: {' '.join(str(error).split())}") from error


def existing_file(source: str | Path, kind: str) -> Path:
    """The path of a file that is there; raises FileNotFoundError for a missing one, and says so for a web address."""
    path = Path(source)
    try:
        found = path.is_file()
    except OSError:  # A name that is too long, such as base64 text.
        found = False
    if found:
        return path
    name = str(source)
    half = LONGEST_NAME // 2
    # The end of a long path says more than its middle.
    shown = name if len(name) <= LONGEST_NAME else f"{name[:half]}...{name[-half:]}"
    advice = "; web addresses are not fetched: download the file first" if "://" in name else ""
    raise FileNotFoundError(f"no {kind} file at {shown!r}{advice}")


def _known_formats() -> list[str]:
    """FORMATS without those that this build of Pillow lacks."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_pending(picture: Image.Image) -> None:
    """Refuse a PIL picture whose pixels Pillow would still have to decode from a format outside FORMATS."""
    if getattr(picture, "tile", None) and picture.format not in FORMATS:
        raise ValueError(f"its format {picture.format} is none of {', '.join(FORMATS)}; convert it first")


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. The other tags are not read: they may be odd and the picture sound."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation)
    # Damaged EXIF says nothing about the orientation. The pixels are decoded independently of it.
    except Exception:
        return 1
    return value if value in TURNS else 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    if 0 in picture.size:
        raise ValueError(f"the picture is {picture.width}x{picture.height}: it needs at least one pixel")
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        return _scale_sixteen_bits(picture)
    # Pillow would clip these modes at 255, which turns most such pictures white.
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"picture mode {picture.mode!r} has more than 8 bits per channel, and its range is unknown; "
            "scale it to 0..255 first"
        )
    # By way of RGBA the palette's colours are the same, and Pillow has no warning to give about transparent ones.
    return (picture.convert("RGBA") if picture.mode == "P" else picture).convert("RGB")


def _scale_sixteen_bits(picture: Image.Image) -> Image.Image:
    """Grey levels 0..65535 to 0..255, rounded; raises ValueError for a TIFF file that uses the levels in another way."""
    tags = getattr(picture, "tag_v2", {})
    bits, photometric = tags.get(ExifTags.Base.BitsPerSample, (16,)), tags.get(ExifTags.Base.PhotometricInterpretation, 1)
    if bits != (16,) or photometric != 1:
        raise ValueError(
            f"a TIFF file with {bits} bits per sample and photometric interpretation {photometric} is not supported; "
            "save it with 8 bits"
        )
    levels = np.asarray(picture).astype(np.uint32)
    scaled = (levels + SIXTEEN_BITS_TO_EIGHT // 2) // SIXTEEN_BITS_TO_EIGHT
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def pixel_limit() -> int | None:
    """The most pixels that are held at once: of a picture, of a frame, of a picture on its way, or of a video's resized frames.

    It is the number at which Pillow refuses a file: 178,956,970 pixels, which are 0.5 GB as bytes and 2.1 GB as float32.
    `PIL.Image.MAX_IMAGE_PIXELS` changes it; None there lifts it.
    """
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def check_pixel_count(what: str, count: int, width: int, height: int, advice: str) -> None:
    """Raise ValueError where `count` pictures of this size are more than `pixel_limit`, before any memory is taken."""
    limit, pixels = pixel_limit(), count * width * height
    if limit is not None and pixels > limit:
        shape = f"{width}x{height} pixels" if count == 1 else f"{count} times {width}x{height} pixels"
        raise ValueError(f"{what} {shape} = {pixels} pixels, more than the limit of {limit}; {advice}")
