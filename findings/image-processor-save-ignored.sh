#!/usr/bin/env bash
#
# Library: transformers 5.23.0 (with tokenizers 0.23.3 and pillow 13.0.0, without torch), on Linux and Python 3.11. Seen on
# 2026-11-28. Version 5.24.0 does the same.
#
# One expects: the settings that an image processor saves into a folder are the settings that are loaded from it.
#
# What happens: `LlavaProcessor.save_pretrained` writes the settings of the image processor into `processor_config.json`,
# under "image_processor". Then the image processor is loaded from the folder, changed and saved to the same folder. This
# writes `preprocessor_config.json`. The next load ignores that file without a warning and gives the old settings, and its
# log says that `preprocessor_config.json` was loaded. The two files are not merged either: if the nested settings name only
# `image_mean`, the size comes from the default of the class and not from `preprocessor_config.json`.
#
# Why it matters: a folder has both files if version 5 saves into a folder that version 4 wrote, or after the steps above.
# An edit of the resolution or of the mean in `preprocessor_config.json` then changes nothing, and the log hides it.
#
# Output seen:
#
#   transformers 5.23.0
#   files that the processor wrote:                 ['processor_config.json']
#   size in preprocessor_config.json after the save: {'shortest_edge': 448}
#   files that the log of the next load names:      ['preprocessor_config.json']
#   pixels after the next load:                     [336, 336]
#   pixels with only a mean in the nested settings: [224, 224]
#   as described

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 tokenizers==0.23.3 pillow==13.0.0 numpy==2.4.6 jinja2==3.1.6

HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import io
import json
import logging
import sys
from pathlib import Path

import tokenizers
import transformers
from PIL import Image
from transformers import AutoImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

folder = Path(sys.argv[1])
picture = Image.new("RGB", (600, 400), "orange")


def size_of(processor):
    return list(processor(picture, return_tensors="np")["pixel_values"].shape[-2:])


def nested():
    return json.loads((folder / "processor_config.json").read_text())


# The folder of a LLaVA checkpoint, written by the library. The words do not matter here.
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<image>": 1}, unk_token="<unk>"))
image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
LlavaProcessor(image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default").save_pretrained(folder)
files_before = sorted(path.name for path in folder.glob("*processor*"))

# Change the resolution and save.
changed = AutoImageProcessor.from_pretrained(folder)
changed.size, changed.crop_size = {"shortest_edge": 448}, {"height": 448, "width": 448}
changed.save_pretrained(folder)
saved = json.loads((folder / "preprocessor_config.json").read_text())["size"]

# Load again, with the log.
log = io.StringIO()
transformers.logging.set_verbosity_info()
handler = logging.StreamHandler(log)
transformers.logging.disable_default_handler()
transformers.logging.add_handler(handler)
loaded = AutoImageProcessor.from_pretrained(folder)
transformers.logging.remove_handler(handler)
transformers.logging.set_verbosity_error()
transformers.logging.enable_default_handler()
lines = [line for line in log.getvalue().splitlines() if line.startswith("loading configuration file")]
named = sorted({Path(line).name for line in lines})

# Leave only the mean in the nested settings.
settings = nested()
settings["image_processor"] = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5, 0.5, 0.5]}
(folder / "processor_config.json").write_text(json.dumps(settings))
partial = AutoImageProcessor.from_pretrained(folder)

print("transformers", transformers.__version__)
print("files that the processor wrote:                ", files_before)
print("size in preprocessor_config.json after the save:", saved)
print("files that the log of the next load names:     ", named)
print("pixels after the next load:                    ", size_of(loaded))
print("pixels with only a mean in the nested settings:", size_of(partial))
as_described = (
    saved == {"shortest_edge": 448}
    and named == ["preprocessor_config.json"]
    and size_of(loaded) == [336, 336]
    and size_of(partial) == [224, 224]
)
print("as described" if as_described else "the behaviour has changed")
sys.exit(not as_described)
PYTHON
