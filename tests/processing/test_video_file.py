"""Video files as recorders, browsers and cameras write them: rates, streams, mirrored clips and lost data."""

import random
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numbered_clips import SIDE, number_of, numbered, remux, write_clip, write_numbered
from PIL import Image, ImageOps

from nanovlm_v2drop.processing.video import FpsSampling, LmmsEvalSampling, UniformSampling, read_frames, sample_video
from nanovlm_v2drop.processing.video_file import inspect_video

av = pytest.importorskip("av")
TS_PACKET = 188  # bytes
ONE_GROUP = {"g": "250", "bf": "0", "sc_threshold": "0", "crf": "20", "preset": "ultrafast"}


def numbers_of(path: Path, count: int) -> list[int]:
    return [number_of(frame) for frame in read_frames(path, UniformSampling(count))]


# Lost data


def video_packets(content: bytes) -> list[int]:
    """Where the transport-stream packets of the video begin; it has the most."""
    starts = range(0, len(content), TS_PACKET)
    streams = [(content[start + 1] & 31) << 8 | content[start + 2] for start in starts]
    video = max(set(streams), key=streams.count)
    return [start for start, stream in zip(starts, streams, strict=True) if stream == video]


def noisy(number: int) -> Image.Image:
    """A large picture that fills several transport-stream packets."""
    noise = np.random.default_rng(number).integers(-40, 40, (4 * SIDE, 4 * SIDE, 3))
    return Image.fromarray(np.clip(np.asarray(numbered(number).resize((4 * SIDE, 4 * SIDE))) + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("count", [1, 3])
def test_lost_packets_in_the_middle_leave_the_frames_that_ffmpeg_decodes_by_default(tmp_path, share, count):
    pictures = map(noisy, range(30))
    whole = write_clip(tmp_path / "whole.ts", pictures, codec="libx264", codec_options=ONE_GROUP)
    content = whole.read_bytes()
    lost = video_packets(content)[int(len(video_packets(content)) * share) :][:count]
    path = tmp_path / "damaged.ts"
    path.write_bytes(b"".join(content[at : at + TS_PACKET] for at in range(0, len(content), TS_PACKET) if at not in lost))
    with av.open(str(path)) as container:
        expected = [np.asarray(frame.to_image()) for frame in container.decode(video=0)]
        assert len(expected) == 30
    found = [np.asarray(frame) for frame in read_frames(path, UniformSampling(30))]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_an_incomplete_last_packet_is_not_shown(tmp_path, suffix):
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    pictures = (Image.effect_noise((SIDE, SIDE), 60 + number).convert("RGB") for number in range(20))
    whole = write_clip(tmp_path / f"whole.{suffix}", pictures, codec="mpeg4", container_options=options)
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        place, size = packets[12].pos, packets[12].size

    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole.read_bytes()[: place + size // 2])
    assert inspect_video(path).num_frames == 12
    with av.open(str(whole)) as container:
        expected = [frame.to_image() for frame in container.decode(video=0)][:12]
    assert all(np.array_equal(*pair) for pair in zip(read_frames(path, UniformSampling(12)), expected, strict=True))


# Rates


def record(path: Path, times: list[int], codec: str, **options: str) -> Path:
    """A clip whose frames are shown at these times in milliseconds; no rate is stored."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = SIDE, SIDE, "yuv420p", 400_000
        stream.codec_context.time_base, stream.codec_context.framerate = Fraction(1, 1000), Fraction(0, 1)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_image(numbered(number))
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_browsers_recording_without_a_rate_is_sampled_by_its_packets_times(tmp_path):
    random.seed(0)
    times = [0]
    while times[-1] < 20_000:
        times.append(times[-1] + random.choice([30, 33, 34, 36]))
    path = record(tmp_path / "recording.webm", times, "libvpx", live="1")
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate is None
    assert inspect_video(path).fps == pytest.approx((len(times) - 1) / times[-1] * 1000)
    assert len(read_frames(path, FpsSampling())) == 40


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "libvpx"), ("mp4", "mpeg4")])
@pytest.mark.parametrize("begin", [0, 7000])
def test_a_rate_that_varies_is_the_mean_over_the_whole_file(tmp_path, suffix, codec, begin):
    """As a screen recorder writes: 2 seconds at 50 frames per second, then 20 seconds at 5."""
    times = [begin + 20 * number for number in range(100)] + [begin + 2000 + 200 * number for number in range(100)]
    path = record(tmp_path / f"clip.{suffix}", times, codec)
    assert inspect_video(path).fps == pytest.approx(200 / 22, rel=0.01)
    assert len(read_frames(path, FpsSampling())) in (42, 44)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "ts", "avi", "mov"])
@pytest.mark.parametrize("fps", [Fraction(30000, 1001), Fraction(24), Fraction(15)])
def test_a_constant_rate_is_the_stored_one(tmp_path, suffix, fps):
    codec = {"webm": "libvpx", "ts": "libx264"}.get(suffix, "mpeg4")
    path = write_numbered(tmp_path / f"clip.{suffix}", 45, fps=fps, codec=codec)
    assert inspect_video(path).fps == pytest.approx(float(fps), rel=1e-4)


def test_one_frame_has_no_rate_to_be_measured(tmp_path):
    assert len(read_frames(record(tmp_path / "one.webm", [0], "libvpx", live="1"), FpsSampling())) == 1


# Streams


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_the_stream_that_ffmpeg_thinks_best_is_shown(tmp_path, suffix):
    """As a camera writes: a small preview first, and behind it the main stream, marked default."""
    path = tmp_path / f"two.{suffix}"
    with av.open(str(path), "w") as container:
        preview, main = (container.add_stream("mpeg4", rate=10) for _ in range(2))
        preview.width = preview.height = 32
        main.width = main.height = SIDE
        preview.pix_fmt = main.pix_fmt = "yuv420p"
        preview.disposition, main.disposition = av.stream.Disposition(0), av.stream.Disposition.default
        for number in range(20):
            small = ImageOps.invert(numbered(number)).resize((32, 32))
            container.mux(preview.encode(av.VideoFrame.from_image(small)))
            container.mux(main.encode(av.VideoFrame.from_image(numbered(number))))
        container.mux(preview.encode())
        container.mux(main.encode())
    assert numbers_of(path, 5) == [0, 4, 9, 14, 19]


# Mirrored and turned clips


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """The same clip with the display matrix (a, b, c, d) in its track header."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (entry << 16 for entry in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def corners(picture: Image.Image) -> list[int]:
    """0 for black and 1 for white: top left, top right, bottom left, bottom right."""
    grey, right, bottom = picture.convert("L"), picture.width - 4, picture.height - 4
    return [int(grey.getpixel(place) > 127) for place in ((4, 4), (right, 4), (4, bottom), (right, bottom))]


@pytest.mark.parametrize(
    ("matrix", "expected", "size"),
    [
        ((1, 0, 0, 1), [1, 1, 1, 0], (SIDE, 48)),
        ((-1, 0, 0, 1), [1, 1, 1, 0], (SIDE, 48)),  # left and right mirrored, as front cameras write it
        ((1, 0, 0, -1), [1, 1, 1, 0], (SIDE, 48)),
        ((0, 1, 1, 0), [1, 1, 1, 0], (SIDE, 48)),
        ((0, -1, -1, 0), [1, 1, 1, 0], (SIDE, 48)),
        ((-1, 0, 0, -1), [0, 1, 1, 1], (SIDE, 48)),
        ((0, 1, -1, 0), [1, 1, 0, 1], (48, SIDE)),  # a quarter turn clockwise: bottom left comes to the top left
        ((0, -1, 1, 0), [1, 0, 1, 1], (48, SIDE)),
    ],
)
def test_turned_clips_are_turned_upright_and_mirrored_ones_stay_as_stored(tmp_path, matrix, expected, size):
    picture = Image.new("RGB", (SIDE, 48), "white")
    picture.paste("black", (SIDE // 2, 24, SIDE, 48))
    path = with_matrix(write_clip(tmp_path / "clip.mp4", [picture] * 3, codec="mpeg4"), matrix)
    (frame,) = read_frames(path, UniformSampling(1))
    assert (corners(frame), frame.size) == (expected, size)
    video = sample_video(path, UniformSampling(1))
    assert (video.width, video.height) == size


# Cost before it is paid


def test_the_cost_of_a_file_is_known_after_one_decoded_frame(tmp_path, monkeypatch):
    path = write_numbered(tmp_path / "clip.mp4", 300, fps=10)
    decoded = []
    frames = "nanovlm_v2drop.processing.video_file._frames"
    monkeypatch.setattr(frames, lambda packet, *_: decoded.extend(packet.decode()) or decoded)
    video = sample_video(path, FpsSampling())
    assert (video.num_frames, video.height, video.width) == (60, SIDE, SIDE)
    assert len(decoded) == 1


def test_frames_are_put_through_a_transform_one_by_one(tmp_path):
    path = write_numbered(tmp_path / "clip.mp4", 30)
    frames = read_frames(path, UniformSampling(10), lambda frame: frame.resize((8, 8)))
    assert {frame.size for frame in frames} == {(8, 8)}


def test_more_pixels_than_the_limit_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write_numbered(tmp_path / "clip.mp4", 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5 * SIDE * SIDE)
    message = (
        r"the video has 11 times 64x64 pixels = 45056 pixels, more than the limit of 40960; take fewer frames \(--frames\)"
    )
    with pytest.raises(ValueError, match=message):
        read_frames(path, UniformSampling(11))
    assert len(read_frames(path, UniformSampling(10))) == 10
    assert len(read_frames(path, UniformSampling(30), lambda frame: frame.resize((8, 8)))) == 30


def test_a_file_with_frames_above_the_limit_is_refused(tmp_path, monkeypatch):
    path = write_numbered(tmp_path / "clip.mp4", 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(
        ValueError, match=r"the frames of .*clip\.mp4 have 64x64 pixels = 4096 pixels, more than the limit of 4000"
    ):
        read_frames(path, UniformSampling(1))


def test_lmms_evals_sampling_is_that_of_qwen_vl_utils_and_then_spread_evenly(tmp_path):
    path = write_numbered(tmp_path / "clip.mp4", 401, fps=10)
    found = [number_of(frame) for frame in read_frames(path, LmmsEvalSampling(32))]
    first = np.linspace(0, 400, 80).round()
    assert found == first[np.unique(np.linspace(0, 79, 32, dtype=int))].tolist()


def test_frames_that_depend_on_missing_ones_are_left_out_of_a_transformed_video_too(tmp_path):
    whole = write_numbered(tmp_path / "whole.mp4", 30, codec="libx264", codec_options={"g": "10", "bf": "0"})
    path = remux(whole, tmp_path / "joined.mkv", slice(5, None))
    small = read_frames(path, UniformSampling(25), lambda frame: frame.resize((32, 32)))
    large = read_frames(path, UniformSampling(25))
    assert [np.array_equal(one, other.resize((32, 32))) for one, other in zip(small, large, strict=True)] == [True] * 25
