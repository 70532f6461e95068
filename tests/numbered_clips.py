"""Small clips whose frames show their number, for the tests of videos."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE, SQUARE = 64, 16  # pixels


def numbered(number: int) -> Image.Image:
    """A picture that shows its number in binary, as 4 x 4 black or white squares, the lowest bit at the top left."""
    bits = (number >> np.arange((SIDE // SQUARE) ** 2).reshape(SIDE // SQUARE, -1)) & 1
    return Image.fromarray(np.kron(bits, np.full((SQUARE, SQUARE), 255)).astype(np.uint8)).convert("RGB")


def number_of(picture: Image.Image) -> int:
    assert picture.mode == "RGB"
    assert picture.size == (SIDE, SIDE)
    bits = np.asarray(picture.convert("L"))[SQUARE // 2 :: SQUARE, SQUARE // 2 :: SQUARE] > 127
    return int((bits.ravel() << np.arange(bits.size)).sum())


def write_clip(
    path: Path,
    pictures,
    fps: float = 24,
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    rotation: float | None = None,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=codec_options or {})
        stream.pix_fmt = pix_fmt
        stream.bit_rate = 2_000_000
        for index, picture in enumerate(pictures):
            if index == 0:
                stream.width, stream.height = picture.size
                if rotation is not None:
                    stream.set_display_rotation(rotation)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def write_numbered(path: Path, num_frames: int, **settings) -> Path:
    return write_clip(path, map(numbered, range(num_frames)), **settings)


def remux(source_path: Path, path: Path, packets: slice, delay: int = 0) -> Path:
    """The encoded frames of a file, from `packets`, written as they are and shown `delay` frames later."""
    av = pytest.importorskip("av")
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(source_path)) as source, av.open(str(path), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(video=0) if packet.size][packets]:
            packet.stream = stream
            packet.pts += delay * packet.duration
            packet.dts += delay * packet.duration
            target.mux(packet)
    return path
