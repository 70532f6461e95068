"""Which numbers a model computes with, by processor, memory and size."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_decoder
from torch import nn

from nanovlm_v2drop import DropSchedule, Request, V2Drop, generate, load
from nanovlm_v2drop.loading import precision as precision_module
from nanovlm_v2drop.loading.precision import (
    Precision,
    check_not_split,
    chosen_precision,
    computing_dtype,
    memory_bytes,
    named_precision,
    pack,
)
from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.models.linear import PrepackedLinear, can_prepack, has_bfloat16_instructions
from nanovlm_v2drop.models.linear_int8 import Int8Linear, int8_obstacle, quantise_weight
from nanovlm_v2drop.models.linear_widened import WidenedLinear

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_bfloat16 = pytest.mark.skipif(not can_prepack(CPU), reason="no prepacked bfloat16 here")
needs_int8 = pytest.mark.skipif(int8_obstacle(CPU) is not None, reason=f"int8: {int8_obstacle(CPU)}")
SEVEN_BILLION = 7_063_000_000


def tokens_of(vlm: VisionLanguageModel) -> list[int]:
    """An answer with half of the vision tokens dropped."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (42, 42, 3), dtype=np.uint8))
    dropper = V2Drop(DropSchedule({1: 0.5}))
    (answer,) = generate(vlm, [Request(text="What?", images=[picture])], dropper, max_new_tokens=3)
    return answer.token_ids


def set_machine(monkeypatch: pytest.MonkeyPatch, bfloat16: bool, int8: bool, memory_gb: float) -> None:
    monkeypatch.setattr(precision_module, "has_bfloat16_instructions", lambda: bfloat16)
    obstacles = dict.fromkeys(("int8", "int4"), lambda device: None if int8 else "no VNNI")
    monkeypatch.setattr(precision_module, "OBSTACLES", obstacles)
    monkeypatch.setattr(precision_module, "memory_bytes", lambda: int(memory_gb * 1e9))


@pytest.mark.parametrize(
    ("weights", "bfloat16", "int8", "memory_gb", "name", "dtype"),
    [
        (1_600_000, True, True, 16, "float32", torch.float32),  # the shipped demos
        (SEVEN_BILLION, True, True, 24, "bfloat16", torch.bfloat16),
        (SEVEN_BILLION, True, True, 16, "bfloat16", torch.bfloat16),  # does not fit, but int8 has to be asked for
        (SEVEN_BILLION, False, True, 64, "float32", torch.float32),
        (SEVEN_BILLION, False, True, 24, "bfloat16", torch.float32),
        (SEVEN_BILLION, False, True, 16, "bfloat16", torch.float32),
        (SEVEN_BILLION, False, False, 16, "bfloat16", torch.float32),
        (SEVEN_BILLION, True, True, 4, "bfloat16", torch.bfloat16),
    ],
)
def test_auto_keeps_the_most_digits_that_are_fast_and_fit(
    weights: int, bfloat16: bool, int8: bool, memory_gb: float, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_machine(monkeypatch, bfloat16, int8, memory_gb)
    chosen = chosen_precision(CPU, weights)
    assert (chosen.name, chosen.dtype) == (name, dtype)


@pytest.mark.parametrize(("limit", "emulates"), [("AVX512_CORE_VNNI", True), ("avx2", True), ("AVX512_CORE_AMX", False)])
def test_a_limit_of_onednn_counts_as_a_processor_without_the_instructions(
    limit: str, emulates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert has_bfloat16_instructions() is not emulates
    assert computing_dtype("bfloat16", CPU) == (torch.float32 if emulates else torch.bfloat16)
    assert computing_dtype("bfloat16", CUDA) == torch.bfloat16


EMULATED = """
import torch
from nanovlm_v2drop import load
from nanovlm_v2drop.inference import prefill
from nanovlm_v2drop.tasks import load_task
request, logits = load_task("demo").first_sample().request, {}
for name in ("float32", "bfloat16", "int8"):
    vlm = load("demo", dtype=name)
    assert vlm.dtype == torch.float32, vlm.dtype
    with torch.no_grad():
        logits[name] = prefill(vlm.model.language_model, vlm.prepare([request])).logits
wanted = logits.pop("float32")
print(*(((found - wanted).norm() / wanted.norm()).item() for found in logits.values()))
"""


@needs_int8
@pytest.mark.slow  # it starts another process, because oneDNN reads its limit once
def test_a_processor_without_bfloat16_instructions_answers_from_bfloat16_and_int8_weights() -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}
    run = subprocess.run([sys.executable, "-c", EMULATED], capture_output=True, text=True, env=environment, check=True)
    of_bfloat16, of_int8 = map(float, run.stdout.split())
    assert 0 < of_bfloat16 < 0.01
    assert 0 < of_int8 < 0.05


def test_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, bfloat16=False, int8=True, memory_gb=24)
    reason = "7.1 B weights, 24 GB of memory, and the processor has no bfloat16 instructions"
    assert str(chosen_precision(CPU, SEVEN_BILLION)) == f"bfloat16 (auto: {reason})"
    assert str(chosen_precision(CPU, 1_640_000)) == "float32 (auto: only 1.6 M weights)"
    assert str(chosen_precision(CUDA, 1)) == "bfloat16 (auto: the weights are on cuda)"
    assert str(Precision("int8", torch.bfloat16)) == "int8"


@pytest.mark.parametrize(
    ("memory_gb", "int8", "advice"),
    [
        (16, True, "bfloat16 needs 14.1 GB and 12.0 GB are for weights: --dtype int8 needs 7.4 GB"),
        (8, True, "bfloat16 needs 14.1 GB and 6.0 GB are for weights: --dtype int4 needs 4.6 GB"),
        (4, True, "bfloat16 needs 14.1 GB and 3.0 GB are for weights: no dtype that runs here fits"),
        (16, False, "bfloat16 needs 14.1 GB and 12.0 GB are for weights: no dtype that runs here fits"),
    ],
)
def test_auto_names_the_quantised_dtype_that_fits_where_no_float_does(
    memory_gb: float, int8: bool, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_machine(monkeypatch, bfloat16=True, int8=int8, memory_gb=memory_gb)
    assert chosen_precision(CPU, SEVEN_BILLION).reason.endswith(f"bfloat16 instructions; {advice}")


@pytest.mark.parametrize("name", ["float32", "float16", "float64", "bfloat16"])
def test_a_dtype_and_its_name_mean_the_same(name: str) -> None:
    assert named_precision(getattr(torch, name), CUDA) == named_precision(name, CUDA) == Precision(name, getattr(torch, name))


def test_what_is_noted_beside_answers_tells_apart_what_computes_differently() -> None:
    assert Precision("float32", torch.float32, "only few weights").noted == "torch.float32"
    assert Precision("bfloat16", torch.float32).noted == "bfloat16 weights, torch.float32"
    assert Precision("int8", torch.bfloat16).noted == "int8 weights, torch.bfloat16"


def test_int8_on_a_gpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="dtype int8 cannot run: it is for CPUs, not cuda; use auto or bfloat16"):
        named_precision("int8", CUDA)


def test_quantised_weights_are_not_shared_by_processes() -> None:
    check_not_split(Precision("bfloat16", torch.bfloat16), True)
    check_not_split(Precision("int8", torch.bfloat16), False)
    with pytest.raises(ValueError, match="tensor_parallel with int8 weights is not possible; use bfloat16, or one process"):
        check_not_split(Precision("int8", torch.bfloat16), True)


@pytest.mark.parametrize(("limit", "smaller"), [("max\n", False), ("1000000\n", True), ("9" * 18, False)])
def test_the_limit_of_a_container_counts(limit: str, smaller: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(precision_module, "CGROUP_LIMIT", tmp_path / "nothing")
    physical = memory_bytes()
    monkeypatch.setattr(precision_module, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert memory_bytes() == (1_000_000 if smaller else physical)


@needs_bfloat16
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, PrepackedLinear), (torch.float32, WidenedLinear)])
def test_bfloat16_weights_are_packed_for_the_dtype_of_the_values(dtype: torch.dtype, kind: type[nn.Module]) -> None:
    decoder = tiny_decoder().requires_grad_(False)
    pack(decoder, Precision("bfloat16", dtype), CPU)
    assert {type(module) for module in decoder.modules() if hasattr(module, "in_features")} == {kind}


@pytest.mark.parametrize("name", ["float32", "float16", "float64"])
def test_other_floats_keep_plain_weights(name: str) -> None:
    decoder = tiny_decoder()
    pack(decoder, named_precision(name, CPU), CPU)
    linears = [module for module in decoder.modules() if hasattr(module, "in_features")]
    assert all(isinstance(linear, nn.Linear) and linear.weight.dtype == torch.float32 for linear in linears)


def test_small_models_resolve_to_float32_and_say_so() -> None:
    vlm = load("demo")
    assert vlm.dtype == torch.float32
    assert str(vlm.precision).startswith("float32 (auto: only 6")


@needs_bfloat16
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_ways_to_compute_with_bfloat16_weights_answer_a_request(
    dtype: torch.dtype, tiny_llava_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_module, "has_bfloat16_instructions", lambda: dtype == torch.bfloat16)
    vlm = load(tiny_llava_folder, dtype="bfloat16")
    assert (vlm.precision.name, vlm.dtype) == ("bfloat16", dtype)
    assert tokens_of(vlm)


@needs_int8
def test_an_official_checkpoint_loads_in_int8_and_answers(tiny_llava_folder: Path) -> None:
    vlm = load(tiny_llava_folder, dtype="int8")
    plain = load(tiny_llava_folder, dtype="float32").model
    layers = {name: module for name, module in vlm.model.named_modules() if hasattr(module, "in_features")}
    projector = {name for name in layers if name.startswith("multi_modal_projector.")}
    assert {name for name, module in layers.items() if type(module) is PrepackedLinear} == projector
    assert {type(layers[name]) for name in layers.keys() - projector} == {Int8Linear}
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight
        torch.testing.assert_close(layer.weight.float(), weight, rtol=0, atol=weight.abs().max().item() / 250)
        if isinstance(layer, Int8Linear):  # the numbers of the file are quantised, not those in the dtype of the layers
            assert torch.equal(layer.q, quantise_weight(weight)[0]), name
    assert tokens_of(vlm)


def test_the_dtype_of_caches_is_that_of_the_model_and_is_noted_beside_answers() -> None:
    quantised, float_ = load("demo", kv_cache_dtype="int8"), load("demo")
    assert quantised.model.language_model.kv_cache_dtype == "int8"
    assert float_.model.language_model.kv_cache_dtype == "auto"
    assert quantised.precision.noted == f"{float_.precision.noted} with an int8 cache"
    assert str(quantised.precision).startswith("float32 with an int8 cache (auto: only ")
    assert tokens_of(quantised)


def test_an_unknown_dtype_of_caches_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="unknown kv_cache_dtype 'fp8'; choose one of: auto, int8"):
        load("no-such-model", kv_cache_dtype="fp8")
