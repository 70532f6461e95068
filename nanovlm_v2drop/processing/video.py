"""Videos to frames: which frames a model looks at, and the decoding of just those, with PyAV (the extra `video`).

Two official ways to choose the frames exist, and both are offered as a `FrameSampling`:
  UniformSampling   LLaVA-OneVision: as many frames as asked, spread evenly from the first frame to the last
  FpsSampling       Qwen2-VL: so many frames per second of video, an even number, between two bounds
Both count frames, not seconds, as the official code does: where the frame rate varies, so does the time between frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from .images import ImageSource, open_image

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

VideoSource = str | Path | Sequence[ImageSource]

TEMPORAL_PATCH_SIZE = 2  # Qwen2-VL's tower reads frames in pairs
QUARTER_TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
PASSES = 2  # the second, where a container announces more frames than decode


class FrameSampling(Protocol):
    """Which frames of a video a model looks at."""

    @property
    def max_frames(self) -> int:
        """The most frames that `indices` chooses; as many pictures given as a list are all taken."""

    def indices(self, num_frames: int, fps: float | None) -> list[int]:
        """Choose from `num_frames` frames at `fps` frames per second (None: unknown), in rising order."""


@dataclass(frozen=True)
class UniformSampling:
    """`num_frames` frames spread evenly, first and last included; a shorter video repeats some of its frames.

    `np.linspace(0, n - 1, num_frames, dtype=int)`, as lmms-eval's models/simple/llava_onevision.py (`load_video`).
    """

    num_frames: int = 32

    def __post_init__(self) -> None:
        _check_whole(self.num_frames, "num_frames", minimum=1)

    @property
    def max_frames(self) -> int:
        return self.num_frames

    def indices(self, num_frames: int, fps: float | None = None) -> list[int]:
        """The `self.num_frames` indices into a video of `num_frames` frames; its rate does not matter.

        Raises ValueError for a video without frames.
        """
        _check_whole(num_frames, "the video's number of frames", minimum=1)
        return np.linspace(0, num_frames - 1, self.num_frames, dtype=int).tolist()


@dataclass(frozen=True)
class FpsSampling:
    """`fps` frames per second of video, an even number of them, never under `min_frames` unless the video is shorter.

    As `Qwen2VLVideoProcessor.sample_frames` of transformers (models/qwen2_vl/video_processing_qwen2_vl.py), in steps of
    n / k from frame 0. Its float steps sometimes add one index past the end, which no frame answers; whole numbers do not.
    qwen_vl_utils chooses as many (where the bounds are even), but by `linspace(0, n - 1, k).round()`, so it ends on the
    last frame. Of one frame, where both official codes fail, that frame is chosen: the processor doubles it.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    def __post_init__(self) -> None:
        _check_rate(self.fps, "fps", "2.0 is Qwen2-VL's")
        _check_whole(self.min_frames, "min_frames", minimum=1)
        _check_whole(self.max_frames, "max_frames", minimum=max(self.min_frames, TEMPORAL_PATCH_SIZE))

    def indices(self, num_frames: int, fps: float | None) -> list[int]:
        """The indices into a video of `num_frames` frames at `fps` frames per second.

        Where the rate is unknown (None), every frame counts as one sampled at `self.fps`.
        Raises ValueError for a video without frames, and for a rate that is no positive number.
        """
        _check_whole(num_frames, "the video's number of frames", minimum=1)
        rate = self.fps if fps is None else fps
        _check_rate(rate, "the video's frame rate", "use UniformSampling, or give the frames as a list of pictures")
        wanted = min(max(num_frames / rate * self.fps, self.min_frames), self.max_frames, num_frames)
        count = max(_whole_pairs(wanted), 1)
        return [index * num_frames // count for index in range(count)]


def _whole_pairs(num_frames: float) -> int:
    return math.floor(num_frames / TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE


def _check_whole(value: Any, name: str, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {minimum}")


def _check_rate(value: Any, name: str, way_out: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r} frames per second, which is no positive number; {way_out}")


def read_frames(video: VideoSource, sampling: FrameSampling) -> list[Image.Image]:
    """The sampled frames of a video as 8-bit RGB pictures of one size, in order.

    A file is decoded forward, frame by frame, and only the sampled frames are kept. Frames are turned upright by the
    file's display matrix (phones), to the nearest quarter turn; mirroring and non-square pixels stay as stored.
    A list holds the frames themselves (paths or PIL pictures): all are taken, unless there are more than
    `sampling.max_frames`; then the list is sampled as a video of unknown frame rate.

    Raises FileNotFoundError for a missing file, ImportError where PyAV is needed and absent, and ValueError for a file
    that does not decode or holds no video, no frames, frames of several sizes, or a source that is no video.
    """
    match video:
        case str() | Path():
            frames = _read_file(Path(video), sampling)
        case Sequence() if not isinstance(video, bytes | bytearray):
            frames = _read_list(video, sampling)
        case _:
            kind = type(video).__name__
            raise ValueError(f"a video must be the path of a file or a list of pictures, got {kind}; list(...) makes a list")
    _check_one_size(frames)
    return frames


def _read_list(pictures: Sequence[ImageSource], sampling: FrameSampling) -> list[Image.Image]:
    if not pictures:
        raise ValueError("the video is an empty list; it needs at least one picture")
    if len(pictures) <= sampling.max_frames:
        return [_open_frame(pictures, index) for index in range(len(pictures))]
    return [_open_frame(pictures, index) for index in sampling.indices(len(pictures), None)]


def _open_frame(pictures: Sequence[ImageSource], index: int) -> Image.Image:
    try:
        return open_image(pictures[index])
    except ValueError as error:
        raise ValueError(f"frame {index} of the video: {error}") from error


def _check_one_size(frames: Sequence[Image.Image]) -> None:
    width, height = frames[0].size
    for frame in frames:
        if frame.size != (width, height):
            sizes = f"{width}x{height} and {frame.width}x{frame.height}"
            raise ValueError(f"the video has frames of {sizes} pixels; resize them to one size first")


def _read_file(path: Path, sampling: FrameSampling) -> list[Image.Image]:
    """Count the frames, choose among them and decode; where fewer decode than counted, choose again among those."""
    num_frames, fps = _count_packets(path)
    for _ in range(PASSES):
        if num_frames == 0:
            raise ValueError(f"{path} has a video stream without a single frame; give another file")
        indices = sampling.indices(num_frames, fps)
        frames, num_frames = _decode(path, frozenset(indices))
        if frames.keys() >= set(indices):
            return [frames[index] for index in indices]
    raise ValueError(f"{path} gives another number of frames each time it is decoded, last {num_frames}; re-encode it")


def _count_packets(path: Path) -> tuple[int, float]:
    """The number of frames and the frame rate, without decoding; 0.0 where the rate is not known.

    Counted, not read from the header: that of Matroska and streams has no count, that of a file written in fragments
    counts the first fragment, that of an unfinished download counts what is missing.
    """
    with _open(path) as container:
        stream = _video_stream(container, path)
        try:
            num_frames = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
        except _av().FFmpegError as error:
            raise ValueError(f"cannot read {path} to its end: {error.strerror}; re-encode it") from error
        rate = stream.average_rate or stream.guessed_rate
    return num_frames, float(rate or 0)


def _decode(path: Path, wanted: frozenset[int]) -> tuple[dict[int, Image.Image], int]:
    """The wanted frames that exist, by index, and how many frames were decoded to find them.

    From the start: a seek lands on the exact frame in some codecs only.
    """
    frames: dict[int, Image.Image] = {}
    index = 0
    with _open(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        try:
            for frame in container.decode(stream):
                if index in wanted:
                    frames[index] = _to_picture(frame)
                index += 1
                if len(frames) == len(wanted):
                    break
        except _av().FFmpegError as error:
            place = f"{path} does not decode past frame {index}"
            raise ValueError(f"{place}: {error.strerror}; re-encode it, or cut it there") from error
    return frames, index


def _to_picture(frame: "VideoFrame") -> Image.Image:
    # PyAV's rotation turns counterclockwise, as Pillow's transpositions do.
    turn = QUARTER_TURNS[round(frame.rotation / 90) % len(QUARTER_TURNS)]
    picture = frame.to_image()
    return picture if turn is None else picture.transpose(turn)


def _open(path: Path) -> "InputContainer":
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give its pictures as a list, in order")
    if not path.is_file():
        raise FileNotFoundError(f"no video file at {str(path)!r}")
    av = _av()
    try:
        # "file:" keeps a colon in a name from being read as a protocol, and a playlist in the file off the network.
        container = av.open(f"file:{path.absolute()}")
        # What an unfinished download cuts in half would decode to half a picture.
        container.flags |= av.container.Flags.discard_corrupt.value
        return container
    except av.FFmpegError as error:
        raise ValueError(f"cannot read {path} as a video: {error.strerror}; is it complete, and a video?") from error


def _video_stream(container: "InputContainer", path: Path) -> "VideoStream":
    """The first video stream that is no cover picture. FFmpeg also plays pictures and text files; those are refused."""
    name = container.format.name
    if name == "tty" or name == "image2" or name.endswith("_pipe"):
        raise ValueError(f"{path} is no video but {name!r} to FFmpeg; a video of one picture is a list: [picture]")
    attached = _av().stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & attached]
    if not streams:
        kinds = ["cover picture" if stream.type == "video" else stream.type for stream in container.streams]
        raise ValueError(f"{path} has no video stream, only: {', '.join(kinds) or 'nothing'}; give a file with moving pictures")
    return streams[0]


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError('PyAV is needed to read video files: pip install "nanovlm-v2drop[video]"') from error
    return av
