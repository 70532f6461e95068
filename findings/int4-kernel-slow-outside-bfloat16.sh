#!/usr/bin/env bash
#
# Library: torch 2.13.0, CPU, on Linux (x86-64 with AVX-512) and Python 3.11. Seen on 2026-11-29.
#
# One expects: torch's 4-bit matrix product on a CPU, `torch._weight_int4pack_mm_for_cpu`, takes about as long with float32 or
# float16 activations as with bfloat16 ones. It accepts all three, and the weights, which are most of what it reads, are the same.
#
# What happens: only the bfloat16 path is fast. With one row, float32 and float16 activations take more than fifty times as
# long. There is no warning.
#
# Why it matters: decoding multiplies one row at a time. A model whose activations are float32 or float16 becomes slower with
# 4-bit weights than without them; the activations and the scales must be cast to bfloat16 around the call.
#
# Output seen (one thread of an AMD EPYC):
#
#   torch 2.13.0+cpu
#   one row, 4096 x 4096, groups of 64, milliseconds: bfloat16 0.46, float32 25.93, float16 25.00
#   slower than bfloat16: float32 56 times, float16 54 times
#   as described

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import torch

SIDE, GROUP = 4096, 64
torch.set_num_threads(1)
torch.manual_seed(0)
packed = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (SIDE, SIDE), dtype=torch.int32), 2)


def milliseconds(dtype):
    row, scales = torch.rand(1, SIDE).to(dtype), torch.rand(SIDE // GROUP, SIDE, 2).to(dtype)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        torch._weight_int4pack_mm_for_cpu(row, packed, GROUP, scales)
        times.append(1000 * (time.perf_counter() - started))
    return min(times)


names = ("bfloat16", "float32", "float16")
taken = {name: milliseconds(getattr(torch, name)) for name in names}
slower = {name: taken[name] / taken["bfloat16"] for name in names[1:]}
print("torch", torch.__version__)
shown = ", ".join(f"{name} {value:.2f}" for name, value in taken.items())
print(f"one row, {SIDE} x {SIDE}, groups of {GROUP}, milliseconds: {shown}")
print("slower than bfloat16: " + ", ".join(f"{name} {value:.0f} times" for name, value in slower.items()))
as_described = min(slower.values()) > 20
print("as described" if as_described else "the behaviour has changed")
sys.exit(not as_described)
PYTHON
