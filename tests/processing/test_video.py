"""Videos: the frames that the official code would look at, whatever the container, and clear errors for the rest."""

import __future__

import ast
import functools
import math
import socket
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_clips import SIDE, SQUARE, number_of, numbered, remux, write_clip, write_numbered
from PIL import Image

from nanovlm_v2drop.processing.video import (
    SAMPLINGS,
    FpsSampling,
    FrameSampling,
    LmmsEvalSampling,
    UniformSampling,
    read_frames,
    sample_video,
    take_all,
)

LONG = 2000  # frames
FORMATS = [
    ("mp4", "libx264", {}),  # frames are stored in another order than they are shown in
    ("mp4", "mpeg4", {}),
    ("mov", "mjpeg", {"pix_fmt": "yuvj420p"}),
    ("mkv", "libx264", {}),
    ("webm", "libvpx", {}),
    ("avi", "mpeg4", {}),
    ("ts", "libx264", {}),
    ("h264", "libx264", {}),
    ("gif", "gif", {"pix_fmt": "rgb8"}),
]


def numbers_of(video, sampling: FrameSampling) -> list[int]:
    return [number_of(frame) for frame in read_frames(video, sampling)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """40 frames at 10 frames per second, the index in front of the pixels, so that a cut file still opens."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_numbered(path, 40, fps=10, container_options={"movflags": "faststart"})


def changed(clip: Path, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    path = folder / "changed.mp4"
    path.write_bytes(change(clip.read_bytes()))
    return path


def place(content: bytes, share: float) -> int:
    """The byte that stands behind this share of a clip's pixels."""
    start = content.index(b"mdat") + 4
    return start + int((len(content) - start) * share)


# Which frames


@functools.cache
def official_sample_frames() -> Callable:
    """transformers' method, cut out of its file: the module around it needs torchvision."""
    transformers = pytest.importorskip("transformers")
    path = Path(transformers.__file__).parent / "models/qwen2_vl/video_processing_qwen2_vl.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "sample_frames"]
    module = ast.Module(methods, [])
    names = {"math": math, "torch": torch}
    exec(compile(module, path, "exec", flags=__future__.annotations.compiler_flag), names)
    return names["sample_frames"]


OFFICIAL_DEFAULTS = types.SimpleNamespace(num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=768)
frame_counts = st.one_of(st.integers(2, 4000), st.integers(4000, 10_000_000))
rates = st.one_of(st.sampled_from([24.0, 25.0, 30.0, 23.976, 30000 / 1001]), st.floats(0.1, 240))


@given(num_frames=frame_counts, fps=rates, sampled_fps=rates)
@settings(max_examples=300, deadline=None)
def test_frames_per_second_are_sampled_as_by_transformers(num_frames, fps, sampled_fps):
    metadata = types.SimpleNamespace(total_num_frames=num_frames, fps=fps)
    official = official_sample_frames()(OFFICIAL_DEFAULTS, metadata, fps=sampled_fps).tolist()
    if official[-1] == num_frames:  # the float step fell short, and one more fitted in: no frame has that index
        official.pop()
    assert FpsSampling(fps=sampled_fps).indices(num_frames, fps) == official


@given(num_frames=frame_counts, fps=rates, low=st.integers(1, 40), more=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_bounds_hold_as_in_transformers(num_frames, fps, low, more):
    metadata = types.SimpleNamespace(total_num_frames=num_frames, fps=fps)
    bounds = {"min_frames": low, "max_frames": low + more}
    try:
        official = official_sample_frames()(OFFICIAL_DEFAULTS, metadata, fps=2.0, **bounds).tolist()
    except ZeroDivisionError:  # a lower bound of 1: transformers rounds down to no pair at all
        official = [0]
    assert FpsSampling(**bounds).indices(num_frames, fps) == [index for index in official if index < num_frames]


@pytest.mark.parametrize(
    ("num_frames", "fps", "expected"),
    [
        (100, 25.0, [0, 12, 25, 37, 50, 62, 75, 87]),
        (17, 2.4, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15]),  # transformers adds a frame 17, which does not exist
        (6, 30.0, [0, 1, 3, 4]),
        (3, 30.0, [0, 1]),
        (2, 30.0, [0, 1]),
        (1, 30.0, [0]),
    ],
)
def test_frames_per_second_give_an_even_number_of_frames_unless_there_is_one(num_frames, fps, expected):
    assert FpsSampling().indices(num_frames, fps) == expected


@given(num_frames=st.integers(1, 4000), count=st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_uniform_sampling_spreads_evenly_from_the_first_frame_to_the_last(num_frames, count):
    indices = UniformSampling(count).indices(num_frames)
    assert len(indices) == count
    assert all(type(index) is int for index in indices)
    exact = [position * (num_frames - 1) / max(count - 1, 1) for position in range(count)]
    assert all(-1e-9 < wanted - index < 1 + 1e-9 for wanted, index in zip(exact, indices, strict=True))
    assert indices[-1] == (num_frames - 1 if count > 1 else 0)


@given(num_frames=frame_counts, fps=rates, count=st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_lmms_evals_sampling_takes_no_more_frames_than_asked_and_none_twice(num_frames, fps, count):
    indices = LmmsEvalSampling(count).indices(num_frames, fps)
    assert indices == sorted(set(indices))
    assert 1 <= len(indices) <= count
    assert 0 == indices[0] <= indices[-1] < num_frames


def test_samplings_have_names():
    assert {name: make().max_frames for name, make in SAMPLINGS.items()} == {
        "uniform": 32,
        "fps": 768,
        "qwen3-vl": 768,
        "lmms-eval": 32,
        "smolvlm": 64,
    }


def test_uniform_sampling_repeats_frames_of_a_short_video():
    assert UniformSampling(8).indices(3) == [0, 0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: UniformSampling(0),
        lambda: UniformSampling(True),
        lambda: UniformSampling(8.0),
        lambda: UniformSampling(4097),
        lambda: UniformSampling(10**9),
        lambda: LmmsEvalSampling(0),
        lambda: LmmsEvalSampling(50_000),
        lambda: FpsSampling(max_frames=10**9),
        lambda: UniformSampling(8).indices(0),
        lambda: FpsSampling(fps=0),
        lambda: FpsSampling(fps=math.nan),
        lambda: FpsSampling(fps=math.inf),
        lambda: FpsSampling(fps="2"),
        lambda: FpsSampling(min_frames=0),
        lambda: FpsSampling(min_frames=8, max_frames=6),
        lambda: FpsSampling(min_frames=1, max_frames=1),
        lambda: FpsSampling().indices(-1, 2.0),
        lambda: FpsSampling().indices(10, 0.0),
    ],
)
def test_settings_that_choose_no_frame_or_too_many_are_refused(make):
    with pytest.raises(ValueError, match=r" is .*; it must be|no positive number; "):
        make()


# Files


@pytest.mark.parametrize(("suffix", "codec", "options"), FORMATS)
@pytest.mark.parametrize("num_frames", [1, 4, 37])
def test_exactly_the_sampled_frames_come_back_from_every_container(tmp_path, suffix, codec, options, num_frames):
    path = write_numbered(tmp_path / f"clip.{suffix}", num_frames, codec=codec, **options)
    for count in (1, 5, num_frames):
        sampling = UniformSampling(count)
        assert numbers_of(path, sampling) == sampling.indices(num_frames)


@pytest.mark.parametrize("fps", [1, 10, 25, 60])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frame_rate_of_the_file_sets_how_many_frames_are_taken(tmp_path, suffix, fps):
    path = write_numbered(tmp_path / f"clip.{suffix}", 90, fps=fps)
    count = {1: 90, 10: 18, 25: 6, 60: 4}[fps]
    assert numbers_of(str(path), FpsSampling()) == [index * 90 // count for index in range(count)]


@pytest.mark.parametrize(("num_frames", "fps"), [(48, 24), (30, 12)])
def test_rate_and_length_of_the_file_travel_with_the_frames(tmp_path, num_frames, fps):
    for sampling in (FpsSampling(), UniformSampling(5)):
        sampled = sample_video(write_numbered(tmp_path / "clip.mp4", num_frames, fps=fps), sampling)
        assert (sampled.fps, sampled.seconds) == (fps, num_frames / fps)


def test_frames_of_a_list_have_the_rate_that_is_sampled_or_none():
    pictures = [numbered(index) for index in range(6)]
    for sampling, count in ((FpsSampling(fps=3.0), 6), (FpsSampling(fps=3.0, max_frames=4), 4)):
        sampled = sample_video(pictures, sampling)
        assert (sampled.num_frames, sampled.fps, sampled.seconds) == (count, 3, 2)
    for sampled in (sample_video(pictures, UniformSampling(6)), take_all(pictures)):
        assert (sampled.fps, sampled.seconds) == (None, None)


def test_one_frame_in_a_stream_that_states_no_average_rate_is_sampled(tmp_path):
    path = write_numbered(tmp_path / "clip.ts", 1, codec="libx264")
    assert numbers_of(path, FpsSampling()) == [0]


@pytest.mark.parametrize("size", [(64, 48), (50, 34)])
def test_pixels_equal_those_that_transformers_reads(tmp_path, size):
    pytest.importorskip("av")
    video_utils = pytest.importorskip("transformers.video_utils")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(12)]
    path = write_clip(tmp_path / "clip.mp4", pictures, codec="libx264")
    official, _ = video_utils.read_video_pyav(str(path), lambda metadata, **_: [0, 5, 11])
    assert np.array_equal(np.stack([np.asarray(frame) for frame in read_frames(path, UniformSampling(3))]), official)


@pytest.mark.parametrize("rotation", [0, 90, 180, -90, 88])
def test_frames_are_turned_upright_by_the_display_matrix(tmp_path, rotation):
    stored = Image.new("RGB", (SIDE, SIDE // 2))
    stored.paste((255, 255, 255), (0, 0, SQUARE, SQUARE))
    path = write_clip(tmp_path / "phone.mp4", [stored] * 3, rotation=rotation)
    (frame,) = read_frames(path, UniformSampling(1))
    upright = stored.rotate(round(rotation, -1), expand=True)  # counterclockwise, as the matrix says
    assert frame.size == upright.size
    assert np.abs(np.asarray(frame).astype(int) - np.asarray(upright)).max() < 30


def test_file_in_fragments_is_sampled_to_its_end(tmp_path):
    path = write_numbered(
        tmp_path / "clip.mp4", 120, codec_options={"g": "10"}, container_options={"movflags": "frag_keyframe"}
    )
    with pytest.importorskip("av").open(str(path)) as container:
        assert container.streams.video[0].frames < 120  # what the header counts
    assert numbers_of(path, UniformSampling(5)) == [0, 29, 59, 89, 119]


@pytest.mark.parametrize("share", [0.35, 0.6, 0.9])
def test_unfinished_download_is_sampled_over_the_frames_that_are_there(clip, tmp_path, share):
    path = changed(clip, tmp_path, lambda content: content[: place(content, share)])
    numbers = numbers_of(path, UniformSampling(6))
    assert numbers == UniformSampling(6).indices(numbers[-1] + 1)
    assert 6 < numbers[-1] < 38


def test_frames_that_a_cut_hides_are_neither_counted_nor_shown(tmp_path, monkeypatch):
    """As a phone trims: the file keeps the frames from the last key frame on, and an edit list skips the first ones."""
    av = pytest.importorskip("av")
    whole = write_numbered(tmp_path / "whole.mp4", 30, codec="libx264", codec_options={"bf": "0"})
    path = remux(whole, tmp_path / "trimmed.mp4", slice(None), delay=-5)
    watch = Watch(av.open)
    monkeypatch.setattr(av, "open", watch.open)
    assert numbers_of(path, UniformSampling(25)) == list(range(5, 30))
    assert watch.decoded == 25 + 1  # in one pass: nothing was chosen again


def test_frames_are_chosen_again_where_fewer_decode_than_the_file_holds(tmp_path):
    """As in a recording that was started in the middle: what depends on an earlier frame is skipped by the decoder."""
    av = pytest.importorskip("av")
    keyframes = {"g": "10", "bf": "0", "sc_threshold": "0"}
    whole = write_numbered(tmp_path / "whole.mp4", 30, codec="libx264", codec_options=keyframes)
    path = remux(whole, tmp_path / "joined.mkv", slice(5, None))
    with av.open(str(path)) as container:
        decoded = [number_of(frame.to_image()) for frame in container.decode(video=0)]
    assert 2 < len(decoded) < 25
    assert numbers_of(path, UniformSampling(25)) == [decoded[index] for index in UniformSampling(25).indices(len(decoded))]


@pytest.mark.parametrize("name", ["a:b.mp4", "100%d.mp4", "no suffix", "-i.mp4", "héé.mp4"])
def test_any_file_name_is_read(clip, tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert numbers_of(name, UniformSampling(2)) == [0, 39]


def test_few_decoded_frames_are_alive_at_once(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    path = write_numbered(tmp_path / "long.mp4", LONG)
    watch = Watch(av.open)
    monkeypatch.setattr(av, "open", watch.open)
    assert numbers_of(path, UniformSampling(8)) == UniformSampling(8).indices(LONG)
    assert watch.decoded == LONG + 1  # the first one twice: its size is asked for before the frames are decoded
    assert watch.most_alive <= 3
    assert watch.converted == 8


class Watch:
    """Stands before a PyAV container, and counts the decoded frames that are still referred to."""

    def __init__(self, open_container: Callable):
        self.open_container = open_container
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.decoded = self.converted = self.most_alive = 0

    def open(self, *args, **settings) -> "Watch":
        self.container = self.open_container(*args, **settings)
        return self

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_) -> None:
        self.container.close()

    def __getattr__(self, name: str):
        return getattr(self.container, name)

    def demux(self, stream) -> Iterator["WatchedPacket"]:
        return (WatchedPacket(packet, self) for packet in self.container.demux(stream))


class WatchedPacket:
    def __init__(self, packet, watch: Watch):
        self.packet, self.watch = packet, watch

    def __getattr__(self, name: str):
        return getattr(self.packet, name)

    def decode(self) -> list["WatchedFrame"]:
        frames = [WatchedFrame(frame, self.watch) for frame in self.packet.decode()]
        self.watch.decoded += len(frames)
        self.watch.alive.update(frames)
        self.watch.most_alive = max(self.watch.most_alive, len(self.watch.alive))
        return frames


class WatchedFrame:
    def __init__(self, frame, watch: Watch):
        self.frame, self.watch = frame, watch

    def __getattr__(self, name: str):
        return getattr(self.frame, name)

    def to_image(self) -> Image.Image:
        self.watch.converted += 1
        return self.frame.to_image()


def test_decoding_stops_after_the_last_sampled_frame(clip, monkeypatch):
    av = pytest.importorskip("av")
    watch = Watch(av.open)
    monkeypatch.setattr(av, "open", watch.open)
    assert numbers_of(clip, UniformSampling(1)) == [0]
    assert watch.decoded == 1 + 1


# Files that cannot be used


def test_missing_file_is_named():
    pytest.importorskip("av")
    with pytest.raises(FileNotFoundError, match=r"no video file at 'nowhere/clip.mp4'"):
        read_frames("nowhere/clip.mp4", UniformSampling())


def test_folder_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="is a folder; give its pictures as a list"):
        read_frames(tmp_path, UniformSampling())


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.mp4", ""), ("text.mp4", "one line\n" * 99), ("text.txt", "one line\n" * 99), ("broken.jpg", "one line\n" * 99)],
)
def test_file_that_is_no_video_is_refused(tmp_path, name, content):
    pytest.importorskip("av")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} (as a|is no) video"):
        read_frames(tmp_path / name, UniformSampling())


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_picture_is_refused_as_a_video_file(tmp_path, suffix):
    pytest.importorskip("av")
    numbered(1).save(tmp_path / f"picture.{suffix}")
    with pytest.raises(ValueError, match=r"is no video .*; a video of one picture is a list: \[picture\]"):
        read_frames(tmp_path / f"picture.{suffix}", UniformSampling())


def write_song(path: Path, with_cover: bool) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        if with_cover:
            cover = container.add_stream("mjpeg", rate=1)
            cover.width = cover.height = SIDE
            cover.pix_fmt = "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            container.mux([*cover.encode(av.VideoFrame.from_image(numbered(1))), *cover.encode()])
        container.mux([*audio.encode(sound), *audio.encode()])
    return path


@pytest.mark.parametrize(("with_cover", "streams"), [(False, "audio"), (True, "audio, cover picture")])
def test_song_is_refused_even_with_a_cover_picture(tmp_path, with_cover, streams):
    path = write_song(tmp_path / "song.mp4", with_cover)
    with pytest.raises(ValueError, match=f"song.mp4 has no video stream, only: {streams};"):
        read_frames(path, UniformSampling())


def test_video_stream_without_frames_is_refused(clip, tmp_path):
    path = changed(clip, tmp_path, lambda content: content[: place(content, 0)])
    with pytest.raises(ValueError, match=r"changed.mp4 has a video stream without a single frame"):
        read_frames(path, UniformSampling())


@pytest.mark.parametrize("sampling", [UniformSampling(40), UniformSampling(2), FpsSampling()])
def test_damage_in_the_middle_names_the_file_and_the_frame(clip, tmp_path, sampling):
    def damaged(content: bytes) -> bytes:
        middle = place(content, 0.5)
        return content[:middle] + bytes(len(content) - middle)

    path = changed(clip, tmp_path, damaged)
    with pytest.raises(ValueError, match=r"changed.mp4 does not decode past frame (1\d|2\d): ") as raised:
        read_frames(path, sampling)
    assert "re-encode it" in str(raised.value)


def test_damage_after_the_last_sampled_frame_is_not_met(clip, tmp_path):
    path = changed(clip, tmp_path, lambda content: content[: place(content, 0.5)] + bytes(400))
    assert numbers_of(path, UniformSampling(1)) == [0]


def test_file_that_never_decodes_alike_is_refused(clip, monkeypatch):
    monkeypatch.setattr("nanovlm_v2drop.processing.video.decode_frames", lambda file, wanted, _: ({}, len(wanted) - 1))
    with pytest.raises(ValueError, match="another number of frames each time it is decoded"):
        read_frames(clip, UniformSampling(40))


def test_playlist_reaches_no_network(tmp_path):
    pytest.importorskip("av")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/part.ts"
        playlist = tmp_path / "clip.m3u8"
        playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{address}\n#EXT-X-ENDLIST\n")
        with pytest.raises(ValueError, match=r"clip.m3u8 as a video"):
            read_frames(playlist, UniformSampling())
        with pytest.raises(BlockingIOError):  # nobody called
            server.accept()


def test_missing_pyav_names_the_extra_and_lists_do_without(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "nanovlm-v2drop\[video\]"'):
        read_frames(clip, UniformSampling())
    assert numbers_of([numbered(5)], UniformSampling()) == [5]


# Lists of frames


@pytest.mark.parametrize("sampling", [UniformSampling(8), FpsSampling(max_frames=8), FpsSampling(max_frames=9)])
@pytest.mark.parametrize("spare", [0, 1, 3, 5, 7])
def test_list_within_the_maximum_is_taken_as_it_stands_odd_or_even(sampling, spare):
    length = sampling.max_frames - spare
    assert numbers_of([numbered(index) for index in range(length)], sampling) == list(range(length))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (UniformSampling(4), [0, 3, 6, 9]),
        (FpsSampling(min_frames=2, max_frames=4), [0, 2, 5, 7]),
        (FpsSampling(fps=0.5, min_frames=2, max_frames=9), [0, 1, 2, 3, 5, 6, 7, 8]),
    ],
)
def test_longer_list_is_sampled_as_a_video(sampling, expected):
    assert numbers_of(tuple(numbered(index) for index in range(10)), sampling) == expected


def test_list_holds_paths_and_pictures_and_opens_only_what_it_needs(tmp_path):
    numbered(7).save(tmp_path / "frame.png")
    video = [numbered(6), "never opened", tmp_path / "frame.png"]
    assert numbers_of(video, UniformSampling(2)) == [6, 7]


@pytest.mark.parametrize(
    "video", [(picture for picture in [numbered(1)]), numbered(1), b"clip.mp4", np.zeros((4, 64, 64, 3)), None, {"frames": 1}]
)
def test_what_is_neither_a_path_nor_a_list_is_refused(video):
    with pytest.raises(ValueError, match=r"must be the path of a file or a list of pictures, got \w+; "):
        read_frames(video, UniformSampling())


def test_empty_list_is_refused():
    with pytest.raises(ValueError, match="is an empty list; it needs at least one picture"):
        read_frames([], UniformSampling())


def test_what_is_no_picture_is_named_by_its_place_in_the_list():
    with pytest.raises(ValueError, match="frame 1 of the video: a picture must be a path, bytes or a PIL picture, got ndarray"):
        read_frames([numbered(0), np.zeros((64, 64, 3))], UniformSampling())


def test_frames_of_several_sizes_are_refused():
    with pytest.raises(ValueError, match="has frames of 64x64 and 64x32 pixels; resize them to one size first"):
        read_frames([numbered(0), numbered(1).resize((64, 32))], UniformSampling())
