#!/usr/bin/env bash
#
# Library: transformers 5.23.0 with PyAV 18.1.0, on Linux and Python 3.11. Seen on 2026-11-29.
#
# One expects: `load_video(..., backend="pyav")` reads a clip that PyAV decodes, whatever its container is.
#
# What happens: transformers takes the number of frames from the header of the container. Only some containers store it there.
# Matroska, WebM, MPEG transport and program streams, and Flash video give 0. With 0 frames, any `num_frames` "exceeds
# total_num_frames=0", and without an option the list of frames is empty and its last element does not exist. The same H.264
# frames in MP4, MOV or AVI load. PyAV decodes all frames of each file.
#
# Why it matters: WebM is what browsers record and download, and Matroska and transport streams are what recorders write. A data
# set of clips in mixed containers loses all of them with this backend. The way out is to count the frames by decoding or
# demuxing, or to put the clip into MP4 first (`ffmpeg -i clip.mkv -c copy clip.mp4`).
#
# Output seen:
#
#   transformers 5.23.0 PyAV 18.1.0
#   mp4 : 40 frames in the header, 40 decoded by PyAV; load_video with num_frames=4: 4 frames, without: 40 frames
#   mov : 40 frames in the header, 40 decoded by PyAV; load_video with num_frames=4: 4 frames, without: 40 frames
#   avi : 40 frames in the header, 40 decoded by PyAV; load_video with num_frames=4: 4 frames, without: 40 frames
#   mkv :  0 frames in the header, 40 decoded by PyAV; load_video with num_frames=4: ValueError, without: IndexError
#   webm:  0 frames in the header, 40 decoded by PyAV; load_video with num_frames=4: ValueError, without: IndexError
#   ts  :  0 frames in the header, 40 decoded by PyAV; load_video with num_frames=4: ValueError, without: IndexError
#   mpg :  0 frames in the header, 40 decoded by PyAV; load_video with num_frames=4: ValueError, without: IndexError
#   flv :  0 frames in the header, 40 decoded by PyAV; load_video with num_frames=4: ValueError, without: IndexError
#   as described

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 av==18.1.0 numpy==2.4.6 pillow==12.3.0

cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import av
import numpy as np
import transformers
from transformers.video_utils import load_video

FRAMES = 40
WITH_COUNT, WITHOUT_COUNT = ("mp4", "mov", "avi"), ("mkv", "webm", "ts", "mpg", "flv")


def write(extension):
    """Forty grey frames with a bar that moves."""
    codec = "libvpx" if extension == "webm" else "mpeg2video" if extension == "mpg" else "libx264"
    file = f"clip.{extension}"
    with av.open(file, "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(FRAMES):
            rgb = np.full((48, 64, 3), 90, dtype=np.uint8)
            rgb[:, number : number + 8] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    return file


def outcome(file, **options):
    try:
        return f"{len(load_video(file, backend='pyav', **options)[0])} frames"
    except (ValueError, IndexError) as error:
        return type(error).__name__


print("transformers", transformers.__version__, "PyAV", av.__version__)
found = {}
for extension in (*WITH_COUNT, *WITHOUT_COUNT):
    file = write(extension)
    with av.open(file) as container:
        header, decoded = container.streams.video[0].frames, sum(1 for _ in container.decode(video=0))
    found[extension] = (header, decoded, outcome(file, num_frames=4), outcome(file))
    print(f"{extension:4}: {header:2} frames in the header, {decoded} decoded by PyAV; "
          f"load_video with num_frames=4: {found[extension][2]}, without: {found[extension][3]}")
expected = {
    **{extension: (FRAMES, FRAMES, "4 frames", f"{FRAMES} frames") for extension in WITH_COUNT},
    **{extension: (0, FRAMES, "ValueError", "IndexError") for extension in WITHOUT_COUNT},
}
print("as described" if found == expected else "the behaviour has changed")
sys.exit(found != expected)
PYTHON
