"""Video files to frames with PyAV (the extra `video`): what a file holds, and the decoding of the frames asked for.

A file is read twice. `inspect_video` reads all packets and decodes one frame, to know how many frames there are, how large they
are and how fast they follow each other. `decode_frames` decodes forward and keeps only the frames asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import unpack
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from .opening import check_pixel_count, existing_file

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Transform = Callable[[Image.Image], Image.Image]

QUARTER_TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
MATRIX_FORMAT = "=9i"  # FFmpeg's display matrix: a b u c d v x y w, in the byte order of the machine
# Every thread of a decoder holds a frame. Above 4K the frames are decoded one after another, each by several threads.
MOST_PIXELS_FOR_FRAME_THREADS = 4096 * 2304


@dataclass(frozen=True)
class VideoFile:
    """What a video file holds.

    `num_frames` counts what can be shown; `num_packets` counts what is stored. `fps` is in frames per second, None where the
    file does not tell it. `height` and `width` are those of an upright frame in pixels; `quarter_turns` counterclockwise put a
    stored frame upright. `cut_short`: the last packet is incomplete, as in an unfinished download, and is not decoded.
    `is_damaged`: some packet lost data on its way.
    """

    path: Path
    num_frames: int
    num_packets: int
    fps: float | None
    height: int
    width: int
    quarter_turns: int
    cut_short: bool
    is_damaged: bool

    @property
    def thread_type(self) -> str:
        """How the decoder may use threads. Only without frame threads does FFmpeg conceal what is missing of an H.264 frame."""
        large = self.height * self.width > MOST_PIXELS_FOR_FRAME_THREADS
        return "SLICE" if large or self.is_damaged else "AUTO"


def inspect_video(path: Path) -> VideoFile:
    """Read the packets of a file and decode its first frame.

    The frames are counted and not read from the header. The header of Matroska files and of streams has no count, the header
    of a file written in fragments counts the first fragment, the header of an unfinished download counts what is missing.

    Raises FileNotFoundError for a missing file, ImportError without PyAV, and ValueError for a file that is no video, has no
    frames, does not decode, or has frames of more than `pixel_limit` pixels.
    """
    with _open(path) as container:
        stream = _video_stream(container, path)
        check_pixel_count(f"the frames of {path} have", 1, stream.width, stream.height, "re-encode it with smaller frames")
        first, last, num_packets, is_damaged, times = None, (False, False), 0, False, []
        for packet in _packets(container, stream, path):
            first = first or next(iter(_frames(packet, path, 0)), None)
            if packet.size:
                last, num_packets = (packet.is_corrupt, packet.is_discard), num_packets + 1
                is_damaged = is_damaged or packet.is_corrupt
                times += [] if packet.is_discard else [(packet.dts if packet.pts is None else packet.pts, packet.duration or 0)]
        cut_short, hidden = last
        num_frames = len(times) - (cut_short and not hidden)
        if num_frames < 1 or first is None:
            raise ValueError(f"{path} has a video stream without a single frame; give another file")
        rate, turns = _frame_rate(stream, times), _quarter_turns(first)
        height, width = (first.width, first.height) if turns % 2 else (first.height, first.width)
        return VideoFile(path, num_frames, num_packets, rate, height, width, turns, cut_short, is_damaged)


def decode_frames(file: VideoFile, wanted: frozenset[int], transform: Transform) -> tuple[dict[int, Image.Image], int]:
    """The wanted frames that exist, by index, and how many frames were decoded to find them.

    Every wanted frame is turned upright and goes through `transform` before the next one is decoded. Decoding begins at the
    start of the file, because a seek lands on the exact frame in some codecs only, and ends with the last wanted frame.
    Raises ValueError for a file that does not decode so far.
    """
    frames: dict[int, Image.Image] = {}
    index = 0
    with _open(file.path) as container:
        stream = _video_stream(container, file.path)
        stream.thread_type = file.thread_type
        for number, packet in enumerate(_packets(container, stream, file.path), start=1):
            if file.cut_short and number == file.num_packets:
                continue
            for frame in _frames(packet, file.path, index):
                if index in wanted:
                    frames[index] = transform(_to_picture(frame, file.quarter_turns))
                index += 1
                if len(frames) == len(wanted):
                    return frames, index
    return frames, index


def _packets(container: "InputContainer", stream: "VideoStream", path: Path) -> "Iterator[Packet]":
    """The packets of a stream in the order in which they are stored; the last one is empty and makes a decoder finish."""
    try:
        yield from container.demux(stream)
    except _av().FFmpegError as error:
        raise ValueError(f"cannot read {path} to its end: {error.strerror}; re-encode it") from error


def _frames(packet: "Packet", path: Path, index: int) -> "list[VideoFrame]":
    """What a packet decodes to; `index` is the number of frames before it."""
    try:
        return packet.decode()
    except _av().FFmpegError as error:
        place = f"{path} does not decode past frame {index}"
        raise ValueError(f"{place}: {error.strerror}; re-encode it, or cut it there") from error


def _frame_rate(stream: "VideoStream", times: Sequence[tuple[int | None, int]]) -> float | None:
    """Frames per second: the stored rate where the times of the packets agree with it, else the rate of the packets.

    `times` holds when each frame is shown and how long (0: unknown), in units of the stream's time base. Browsers store no
    rate, and where the rate varies the stored one may be that of the first frames.
    """
    stored = stream.average_rate
    known = [(start, duration) for start, duration in times if start is not None]
    if not known or stream.time_base is None:
        rate = stored or stream.guessed_rate
        return float(rate) if rate else None
    first, (last, duration) = min(known)[0], max(known)
    # Without a stored rate FFmpeg guesses the durations. Then the time is that of the steps between the frames.
    duration = duration if stored else 0
    steps, seconds = len(known) - (duration == 0), float((last + duration - first) * stream.time_base)
    if steps < 1 or seconds <= 0:
        return float(stored) if stored else None
    # A stored rate is exact, and the times are rounded: to milliseconds in Matroska files.
    return float(stored) if stored and abs(float(stored) * seconds - steps) < 1 else steps / seconds


def _to_picture(frame: "VideoFrame", quarter_turns: int) -> Image.Image:
    # The turn is not asked of each frame: PyAV's side data keeps a frame alive until Python's garbage collector runs.
    picture, turn = frame.to_image(), QUARTER_TURNS[quarter_turns]
    return picture if turn is None else picture.transpose(turn)


def _quarter_turns(frame: "VideoFrame") -> int:
    """How many quarter turns counterclockwise put a frame upright; 0 for a mirrored one, which stays as stored."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d, *_ = unpack(MATRIX_FORMAT, memoryview(cast(bytes, matrix)))
        # A negative determinant mirrors, and the angle that FFmpeg gives for it may turn the frame upside down.
        if a * d - b * c < 0:
            return 0
    # PyAV's rotation is counterclockwise, as Pillow's transpositions are.
    return round(frame.rotation / 90) % len(QUARTER_TURNS)


def _open(path: Path) -> "InputContainer":
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give its pictures as a list, in order")
    existing_file(path, "video")
    av = _av()
    try:
        # "file:" keeps a colon in a name from being read as a protocol, and a playlist in the file off the network.
        return av.open(f"file:{path.absolute()}")
    except av.FFmpegError as error:
        raise ValueError(f"cannot read {path} as a video: {error.strerror}; is it complete, and a video?") from error


def _video_stream(container: "InputContainer", path: Path) -> "VideoStream":
    """The stream that FFmpeg thinks best, and no cover picture. FFmpeg also plays pictures and text files: refused here."""
    name = container.format.name
    if name == "tty" or name == "image2" or name.endswith("_pipe"):
        raise ValueError(f"{path} is no video but {name!r} to FFmpeg; a video of one picture is a list: [picture]")
    attached = _av().stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & attached]
    if not streams:
        kinds = ["cover picture" if stream.type == "video" else stream.type for stream in container.streams]
        raise ValueError(f"{path} has no video stream, only: {', '.join(kinds) or 'nothing'}; give a file with moving pictures")
    best = container.streams.best("video")
    return best if best in streams else streams[0]


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError('PyAV is needed to read video files: pip install "nanovlm-v2drop[video]"') from error
    return av
