#!/usr/bin/env bash
#
# Library: PyAV 18.1.0 with its FFmpeg (libavcodec 62.28.102), on Linux and Python 3.11. Seen on 2026-11-28.
#
# One expects: `thread_type` and `thread_count` change how fast a clip is decoded, but not its pixels.
#
# What happens: an H.264 clip in a transport stream loses one packet of 188 bytes, as can happen on any broadcast or UDP
# link. With `thread_type` SLICE, the default of PyAV, and two or more threads, the frames after the loss have other pixels
# than with one thread or with NONE. They are farther from the original in most clips. The cause is that FFmpeg conceals
# damage in H.264 only without slice threads: NONE gives the pixels of SLICE if the decoder's option `enable_er` is 0.
# `thread_count` is 0 by default, which means that FFmpeg chooses it from the number of cores. Thus a machine with one core
# and a machine with two cores decode the same file to different pixels. For the whole clip, all settings agree.
#
# Why it matters: scores on recorded broadcasts or streams depend on the number of cores and on a setting for speed.
# `stream.thread_type = "NONE"` gives the same pixels on every machine. FRAME is not a way out: it also conceals the damage,
# but with more than one thread its pixels differ from those of NONE in some clips.
#
# Output seen (difference: mean absolute difference of the luma values, 0 to 255, over all frames; from the whole clip if
# nothing else is said):
#
#   PyAV 18.1.0 libavcodec 62.28.102
#   default thread_type: SLICE  default thread_count: 0
#   whole clip: all settings give the same pixels: True
#   SLICE with 1 thread(s): difference 11.5, pixels as with NONE and 1 thread in 9 of 9 clips
#   SLICE with 2 thread(s): difference 13.0, pixels as with NONE and 1 thread in 0 of 9 clips
#   NONE  with 1 thread(s): difference 11.5, pixels as with NONE and 1 thread in 9 of 9 clips
#   NONE  with 2 thread(s): difference 11.5, pixels as with NONE and 1 thread in 9 of 9 clips
#   FRAME with 2 thread(s): difference 11.5, pixels as with NONE and 1 thread in 3 of 9 clips
#   SLICE with 2 threads: farther from the whole clip than NONE in 7 of 9 clips, pixels as with NONE and enable_er=0 in 9
#   mean difference between SLICE with 2 threads and NONE: 23.8 in the clip where it is largest
#   as described

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import av
import numpy as np

WIDTH, HEIGHT, FRAMES, PACKET = 320, 240, 120, 188
SETTINGS = [("SLICE", 1), ("SLICE", 2), ("NONE", 1), ("NONE", 2), ("FRAME", 2)]


def picture(number):
    """A gradient that moves, with a red square that moves faster."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rgb = np.stack([2 * x + 5 * number, y + 3 * number, (x + y) // 2 + number], -1) % 256
    left = 4 * number % (WIDTH - 60)
    rgb[80:140, left : left + 60] = 255, 40, 40
    return av.VideoFrame.from_ndarray(rgb.astype(np.uint8), format="rgb24")


def transport_stream():
    """A clip of four seconds with one key frame."""
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"g": "300", "qp": "28", "threads": "1"}
        for number in range(FRAMES):
            container.mux(stream.encode(picture(number)))
        container.mux(stream.encode())
    return file.getvalue()


def with_one_packet_lost(data):
    """Nine copies of the clip. Each lacks one video packet at another tenth. No lost packet starts a frame."""
    starts = range(0, len(data), PACKET)
    video = [at for at in starts if (data[at + 1] & 0x1F) << 8 | data[at + 2] == 0x100 and not data[at + 1] & 0x40]
    lost = [video[len(video) * tenth // 10] for tenth in range(1, 10)]
    return [data[:at] + data[at + PACKET :] for at in lost]


def decode(data, thread_type, thread_count, **options):
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = options
        stream.thread_type, stream.codec_context.thread_count = thread_type, thread_count
        return np.stack([frame.to_ndarray(format="gray").astype(int) for frame in container.decode(stream)])


av.logging.set_level(None)
data = transport_stream()
whole = {setting: decode(data, *setting) for setting in SETTINGS}
clean = whole["NONE", 1]
clips = with_one_packet_lost(data)
plain = [decode(clip, "NONE", 1) for clip in clips]
unconcealed = [decode(clip, "NONE", 1, enable_er="0") for clip in clips]

with av.open(io.BytesIO(data)) as container:
    stream = container.streams.video[0]
    print("PyAV", av.__version__, "libavcodec", ".".join(map(str, av.library_versions["libavcodec"])))
    print("default thread_type:", stream.thread_type.name, " default thread_count:", stream.codec_context.thread_count)
whole_agrees = all(np.array_equal(frames, clean) for frames in whole.values())
print("whole clip: all settings give the same pixels:", whole_agrees)

differences, equal = {}, {}
for setting in SETTINGS:
    decoded = [decode(clip, *setting) for clip in clips]
    differences[setting] = np.array([abs(frames - clean).mean() for frames in decoded])
    equal[setting] = sum(map(np.array_equal, decoded, plain))
    print(f"{setting[0]:5} with {setting[1]} thread(s): difference {differences[setting].mean():4.1f}, "
          f"pixels as with NONE and 1 thread in {equal[setting]} of {len(clips)} clips")
    if setting == ("SLICE", 2):
        as_unconcealed = sum(map(np.array_equal, decoded, unconcealed))
        from_none = max(abs(frames - of_none).mean() for frames, of_none in zip(decoded, plain))
farther = sum(differences["SLICE", 2] > differences["NONE", 1])
print(f"SLICE with 2 threads: farther from the whole clip than NONE in {farther} of {len(clips)} clips, "
      f"pixels as with NONE and enable_er=0 in {as_unconcealed}")
print(f"mean difference between SLICE with 2 threads and NONE: {from_none:.1f} in the clip where it is largest")
one_thread_agrees = equal["SLICE", 1] == equal["NONE", 2] == len(clips)
as_described = whole_agrees and one_thread_agrees and equal["SLICE", 2] == 0 and farther > len(clips) // 2
print("as described" if as_described else "the behaviour has changed")
sys.exit(not as_described)
PYTHON
