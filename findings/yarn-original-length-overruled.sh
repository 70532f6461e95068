#!/usr/bin/env bash
#
# Library: transformers 5.23.0 (with torch 2.13.0), on Linux and Python 3.11. Seen on 2026-11-29.
#
# One expects: the settings of a scaled rotary embedding stand in `rope_parameters`. If `original_max_position_embeddings` is given
# there, its value counts.
#
# What happens: a field of that name at the top level of the config overrules the one in `rope_parameters`, which is rewritten
# when the rotary embedding is made. The frequencies are those of the other length. The log warns of an implicit factor, not of the two values.
#
# Why it matters: Phi-3 and its relatives have the field at the top level. A config that was edited in one place, or a long-context
# override that is passed as `rope_parameters`, then runs with other frequencies than it says.
#
# Output seen:
#
#   transformers 5.23.0
#   original length inside rope_parameters 128, at the top level 64
#   frequencies equal those of 128: False, those of 64: True
#   original length inside rope_parameters afterwards: 64
#   as described

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 numpy==2.4.6

TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

INSIDE, TOP = 128, 64
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 512}


def config(inside, **top):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": inside}
    return LlamaConfig(**SIZES, rope_parameters=yarn, **top)


def frequencies(given):
    return LlamaRotaryEmbedding(given).inv_freq


both = config(INSIDE, original_max_position_embeddings=TOP)
made = frequencies(both)
equals = [torch.equal(made, frequencies(config(length))) for length in (INSIDE, TOP)]
kept = both.rope_parameters["original_max_position_embeddings"]
print("transformers", transformers.__version__)
print(f"original length inside rope_parameters {INSIDE}, at the top level {TOP}")
print(f"frequencies equal those of {INSIDE}: {equals[0]}, those of {TOP}: {equals[1]}")
print("original length inside rope_parameters afterwards:", kept)
as_described = kept == TOP and equals == [False, True]
print("as described" if as_described else "the behaviour has changed")
sys.exit(not as_described)
PYTHON
