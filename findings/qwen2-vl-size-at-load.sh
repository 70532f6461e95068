#!/usr/bin/env bash
#
# Library: transformers 5.23.0 (with pillow 13.0.0, without torch), on Linux and Python 3.11. Seen on 2026-11-28. Version
# 5.24.0 does the same.
#
# One expects: an argument of `from_pretrained` wins over the file. `size` is the current name of the limits on the pixels of
# a picture, and the warning of the library about `min_pixels` and `max_pixels` tells users to pass `size`.
#
# What happens: a Qwen2-VL image processor is loaded from a `preprocessor_config.json` with `min_pixels` and `max_pixels`,
# the older names. The `size` that is passed to `from_pretrained` has no effect, and there is no warning: the values of
# the file replace it. They are even written into the dict of the caller. If the file has `size` instead, the same argument
# works. It also works in the call of the processor.
#
# Why it matters: `longest_edge` sets the number of vision tokens of a picture. A comparison "at a quarter of the tokens"
# runs with all of them. Pass `max_pixels` to `from_pretrained`, or `size` in the call.
#
# Output seen (tokens: rows times columns of the grid, over 4, as the model merges 2 x 2 patches):
#
#   transformers 5.23.0
#   file: max_pixels for 256 tokens; no argument:                    247 tokens
#   file: max_pixels for 256 tokens; size for 64 tokens at load:     247 tokens
#   file: max_pixels for 256 tokens; max_pixels for 64 at load:      54 tokens
#   file: max_pixels for 256 tokens; size for 64 tokens in the call: 54 tokens
#   file: size for 256 tokens; size for 64 tokens at load:           54 tokens
#   the dict that was passed to the second load: {'shortest_edge': 3136, 'longest_edge': 50176}
#   the same dict after it:                      {'shortest_edge': 3136, 'longest_edge': 200704}
#   as described

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 pillow==13.0.0 numpy==2.4.6

HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers
from PIL import Image

TOKEN = 28 * 28  # pixels of one vision token
OLDER_NAMES = {"min_pixels": 4 * TOKEN, "max_pixels": 256 * TOKEN}
CURRENT_NAME = {"size": {"shortest_edge": 4 * TOKEN, "longest_edge": 256 * TOKEN}}
LIMIT = 64 * TOKEN
picture = Image.new("RGB", (1500, 1000), "orange")


def small():
    return {"shortest_edge": 4 * TOKEN, "longest_edge": LIMIT}


def tokens(file_settings, at_load={}, at_call={}):
    """The number of vision tokens of the picture."""
    settings = {"image_processor_type": "Qwen2VLImageProcessor", **file_settings}
    Path(sys.argv[1], "preprocessor_config.json").write_text(json.dumps(settings))
    processor = transformers.AutoImageProcessor.from_pretrained(sys.argv[1], **at_load)
    _, rows, columns = processor(picture, return_tensors="np", **at_call)["image_grid_thw"][0].tolist()
    return rows * columns // 4


without = tokens(OLDER_NAMES)
passed = small()
ignored = tokens(OLDER_NAMES, at_load={"size": passed})
max_pixels = tokens(OLDER_NAMES, at_load={"max_pixels": LIMIT})
at_call = tokens(OLDER_NAMES, at_call={"size": small()})
current_name = tokens(CURRENT_NAME, at_load={"size": small()})
print("transformers", transformers.__version__)
print("file: max_pixels for 256 tokens; no argument:                   ", without, "tokens")
print("file: max_pixels for 256 tokens; size for 64 tokens at load:    ", ignored, "tokens")
print("file: max_pixels for 256 tokens; max_pixels for 64 at load:     ", max_pixels, "tokens")
print("file: max_pixels for 256 tokens; size for 64 tokens in the call:", at_call, "tokens")
print("file: size for 256 tokens; size for 64 tokens at load:          ", current_name, "tokens")
print("the dict that was passed to the second load:", small())
print("the same dict after it:                     ", passed)
as_described = ignored == without > 64 >= max_pixels == at_call == current_name and passed != small()
print("as described" if as_described else "the behaviour has changed")
sys.exit(not as_described)
PYTHON
