"""Videos: which frames a model looks at, and what they cost before they are decoded.

Five official ways to choose the frames exist. Each is offered as a `FrameSampling`, by its name in SAMPLINGS:
  UniformSampling   LLaVA-OneVision: as many frames as asked, spread evenly from the first frame to the last
  FpsSampling       Qwen2-VL: so many frames per second of video, an even number, between two bounds
  Qwen3VLSampling   Qwen3-VL: so many frames per second of video, spread evenly from the first frame to the last
  LmmsEvalSampling  Qwen2-VL in lmms-eval: the frames of qwen_vl_utils, of which 32 are kept
  SmolVLMSampling   SmolVLM2: one frame per second of video, at most 64
All count frames, not seconds, as the official code does: where the frame rate varies, so does the time between frames.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from .opening import ImageSource, check_pixel_count, image_size, open_image
from .video_file import Transform, VideoFile, decode_frames, inspect_video

Result = TypeVar("Result")
VideoSource = str | Path | Sequence[ImageSource]

MAX_FRAMES = 4096  # the most frames that a sampling may choose; Qwen2-VL's own maximum is 768
SKIPPED_SECONDS = 1  # at both ends of a long video, by SmolVLM2
TEMPORAL_PATCH_SIZE = 2  # Qwen2-VL's tower reads frames in pairs
PASSES = 2  # the second pass is for a container that announces more frames than decode


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
        _check_whole(self.num_frames, "num_frames (--frames)", minimum=1, maximum=MAX_FRAMES)

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

    As `Qwen2VLVideoProcessor.sample_frames` of transformers (models/qwen2_vl/video_processing_qwen2_vl.py): k of n frames in
    steps of n / k from frame 0, in float32. Where these steps add an index past the end, it is left out: no frame has it.
    Of one frame, where the official code fails, that frame is chosen: the processor doubles it.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    def __post_init__(self) -> None:
        _check_rate(self.fps, "fps", "2.0 is Qwen2-VL's")
        _check_whole(self.min_frames, "min_frames", minimum=1)
        _check_whole(self.max_frames, "max_frames", minimum=max(self.min_frames, TEMPORAL_PATCH_SIZE), maximum=MAX_FRAMES)

    def indices(self, num_frames: int, fps: float | None) -> list[int]:
        """The indices into a video of `num_frames` frames at `fps` frames per second.

        Where the rate is unknown (None), every frame counts as one sampled at `self.fps`.
        Raises ValueError for a video without frames, and for a rate that is no positive number.
        """
        count = self.count(num_frames, fps)
        steps = torch.arange(0, num_frames, num_frames / count).int().clamp_(max=num_frames - 1)
        return steps.tolist()[:count]

    def count(self, num_frames: int, fps: float | None) -> int:
        """How many frames are chosen; raises as `indices`."""
        rate = self.checked_rate(num_frames, fps)
        wanted = min(max(num_frames / rate * self.fps, self.min_frames), self.max_frames, num_frames)
        return max(math.floor(wanted / TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE, 1)

    def checked_rate(self, num_frames: int, fps: float | None) -> float:
        """The rate of a video, by default `self.fps`; raises as `indices`."""
        _check_whole(num_frames, "the video's number of frames", minimum=1)
        rate = self.fps if fps is None else fps
        _check_rate(rate, "the video's frame rate", "use UniformSampling, or give the frames as a list of pictures")
        return rate


@dataclass(frozen=True)
class Qwen3VLSampling(FpsSampling):
    """`fps` frames per second of video, spread evenly, the first and the last frame included; their number may be odd.

    As `Qwen3VLVideoProcessor.sample_frames` of transformers (models/qwen3_vl/video_processing_qwen3_vl.py).
    """

    def indices(self, num_frames: int, fps: float | None) -> list[int]:
        """The indices into a video of `num_frames` frames at `fps` frames per second; raises as `FpsSampling.indices`."""
        return np.linspace(0, num_frames - 1, self.count(num_frames, fps)).round().astype(int).tolist()

    def count(self, num_frames: int, fps: float | None) -> int:
        """How many frames are chosen; raises as `indices`."""
        rate = self.checked_rate(num_frames, fps)
        return min(max(int(num_frames / rate * self.fps), self.min_frames), self.max_frames, num_frames)


@dataclass(frozen=True)
class LmmsEvalSampling:
    """`num_frames` frames at most, spread evenly over those that qwen_vl_utils chooses.

    As lmms-eval 0.7.3 samples for Qwen2-VL (models/simple/qwen2_vl.py): qwen_vl_utils 0.0.14 (vision_process.py) takes as
    many frames as `FpsSampling`, by `linspace(0, n - 1, k).round()`, and of those lmms-eval keeps
    `np.unique(np.linspace(0, k - 1, num_frames, dtype=int))`. lmms-eval also sets `max_pixels` to 602112.
    """

    num_frames: int = 32

    def __post_init__(self) -> None:
        _check_whole(self.num_frames, "num_frames (--frames)", minimum=1, maximum=MAX_FRAMES)

    @property
    def max_frames(self) -> int:
        return self.num_frames

    def indices(self, num_frames: int, fps: float | None) -> list[int]:
        """The indices into a video of `num_frames` frames at `fps` frames per second; raises as `FpsSampling.indices`."""
        count = FpsSampling().count(num_frames, fps)
        first = torch.linspace(0, num_frames - 1, count).round().long()
        return first[np.unique(np.linspace(0, count - 1, self.num_frames, dtype=int))].tolist()


@dataclass(frozen=True)
class SmolVLMSampling:
    """`fps` frames per second of video, `max_frames` at most, spread evenly. The ends of a long video are left out.

    As `SmolVLMVideoProcessor.sample_frames` of transformers (models/smolvlm/video_processing_smolvlm.py).
    """

    fps: float = 1.0
    max_frames: int = 64

    def __post_init__(self) -> None:
        _check_rate(self.fps, "fps", "1.0 is SmolVLM2's")
        _check_whole(self.max_frames, "max_frames", minimum=1, maximum=MAX_FRAMES)

    def indices(self, num_frames: int, fps: float | None) -> list[int]:
        """The indices into a video of `num_frames` frames at `fps` frames per second; raises as `FpsSampling.indices`.

        Where the rate is unknown (None), every frame counts as one sampled at `self.fps`, and the ends stay.
        """
        _check_whole(num_frames, "the video's number of frames", minimum=1)
        rate = self.fps if fps is None else fps
        _check_rate(rate, "the video's frame rate", "use UniformSampling, or give the frames as a list of pictures")
        seconds, first, last = num_frames / rate, 0, num_frames - 1
        if fps is not None and seconds - 2 * SKIPPED_SECONDS > self.max_frames * self.fps:
            first, last = int(SKIPPED_SECONDS * rate), min(int(num_frames - SKIPPED_SECONDS * rate), last)
        first, last = (first, last) if first < last else (0, num_frames - 1)
        count = max(min(round(self.fps * seconds), self.max_frames), 1)
        return np.unique(np.linspace(first, last, count, dtype=int)).tolist()


SAMPLINGS: dict[str, Callable[..., FrameSampling]] = {
    "uniform": UniformSampling,
    "fps": FpsSampling,
    "qwen3-vl": Qwen3VLSampling,
    "lmms-eval": LmmsEvalSampling,
    "smolvlm": SmolVLMSampling,
}


def _check_whole(value: Any, name: str, minimum: int, maximum: int | None = None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < minimum or (maximum is not None and value > maximum):
        most = "" if maximum is None else f" and at most {maximum}"
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {minimum}{most}")


def _check_rate(value: Any, name: str, way_out: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r} frames per second, which is no positive number; {way_out}")


@dataclass(frozen=True)
class SampledVideo:
    """The frames that a model will see of one video, before they are decoded: how many and how large.

    `indices` are the frames chosen, in rising order; of a short video some are shown several times. `height` and `width` are
    those of an upright frame in pixels. `decode` returns the frames, each of them put through a transform. `fps` is the rate of
    the video itself in frames per second, and `seconds` its length; both are None where the rate is unknown.
    """

    indices: tuple[int, ...]
    height: int
    width: int
    decode: Callable[[Transform], list[Image.Image]]
    fps: float | None = None
    seconds: float | None = None

    @property
    def num_frames(self) -> int:
        return len(self.indices)

    def read(self, transform: Transform | None = None) -> list[Image.Image]:
        """Decode the frames to 8-bit RGB pictures of one size, in order.

        Every frame goes through `transform`, such as a resize, before the next is decoded. So memory holds one frame of the
        source, and the results. Fewer frames than `num_frames` come from a damaged file that announces more than decode.

        Raises ValueError for a file that does not decode, for frames of several sizes and, without a `transform`, for more
        pixels in all than `pixel_limit`.
        """
        if transform is None:
            count = len(set(self.indices))
            check_pixel_count("the video has", count, self.width, self.height, "take fewer frames (--frames)")
        return self.decode(_OneSize(transform or _as_it_is))


def sample_video(video: VideoSource, sampling: FrameSampling) -> SampledVideo:
    """Find out which frames of a video a model sees, without decoding them.

    A file is read once, and its first frame is decoded. A list holds the frames themselves (paths, bytes or PIL pictures). All
    of them are taken, unless there are more than `sampling.max_frames`: then the list is sampled as a video of unknown rate.
    FpsSampling takes a video of unknown rate as one of `sampling.fps` frames per second.

    Raises FileNotFoundError for a missing file, ImportError where PyAV is needed and absent, and ValueError for a file
    that does not decode or holds no video or no frames, for an empty list, and for a source that is no video.
    """
    assumed = sampling.fps if isinstance(sampling, FpsSampling) else None
    match video:
        case str() | Path():
            file = inspect_video(Path(video))
            fps = assumed if file.fps is None else file.fps
            seconds = None if fps is None else file.num_frames / fps
            indices, decode = sampling.indices(file.num_frames, file.fps), partial(_read_file, file, sampling)
            return SampledVideo(tuple(indices), file.height, file.width, decode, fps, seconds)
        case Sequence() if not isinstance(video, bytes | bytearray):
            if len(video) <= sampling.max_frames:
                return take_all(video, assumed)
            return _sample_list(video, sampling.indices(len(video), None), assumed)
        case _:
            kind = type(video).__name__
            raise ValueError(f"a video must be the path of a file or a list of pictures, got {kind}; list(...) makes a list")


def take_all(pictures: Sequence[ImageSource], fps: float | None = None) -> SampledVideo:
    """A video of exactly these frames; raises ValueError for an empty list, and what `open_image` raises for the first."""
    return _sample_list(pictures, range(len(pictures)), fps)


def read_frames(video: VideoSource, sampling: FrameSampling, transform: Transform | None = None) -> list[Image.Image]:
    """The sampled frames of a video as 8-bit RGB pictures of one size, in order; raises as `sample_video` and `read`.

    Frames of a file are turned upright by the file's display matrix (phones), to the nearest quarter turn. Mirrored clips and
    non-square pixels stay as stored.
    """
    return sample_video(video, sampling).read(transform)


def _as_it_is(frame: Image.Image) -> Image.Image:
    return frame


class _OneSize:
    """A transform that refuses a frame of another size than the first."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform
        self.size: tuple[int, int] | None = None

    def __call__(self, frame: Image.Image) -> Image.Image:
        self.size = self.size or frame.size
        if frame.size != self.size:
            sizes = f"{self.size[0]}x{self.size[1]} and {frame.width}x{frame.height}"
            raise ValueError(f"the video has frames of {sizes} pixels; resize them to one size first")
        return self.transform(frame)


def _sample_list(pictures: Sequence[ImageSource], indices: Sequence[int], fps: float | None) -> SampledVideo:
    if not pictures:
        raise ValueError("the video is an empty list; it needs at least one picture")
    height, width = _of_frame(image_size, pictures, indices[0])
    seconds = None if fps is None else len(pictures) / fps
    return SampledVideo(tuple(indices), height, width, partial(_read_list, pictures, indices), fps, seconds)


def _read_list(pictures: Sequence[ImageSource], indices: Sequence[int], transform: Transform) -> list[Image.Image]:
    return [transform(_of_frame(open_image, pictures, index)) for index in indices]


def _of_frame(read: Callable[[ImageSource], Result], pictures: Sequence[ImageSource], index: int) -> Result:
    """What `read` gives for one frame of a list; its errors name the frame."""
    try:
        return read(pictures[index])
    except ValueError as error:
        raise ValueError(f"frame {index} of the video: {error}") from error


def _read_file(file: VideoFile, sampling: FrameSampling, transform: Transform) -> list[Image.Image]:
    """Choose among the frames and decode them; where fewer decode than counted, choose again among those."""
    num_frames = file.num_frames
    for _ in range(PASSES):
        indices = sampling.indices(num_frames, file.fps)
        frames, num_frames = decode_frames(file, frozenset(indices), transform)
        if frames.keys() >= set(indices):
            return [frames[index] for index in indices]
        if num_frames == 0:
            break
    raise ValueError(f"{file.path} gives another number of frames each time it is decoded, last {num_frames}; re-encode it")
