"""GGUF files that llama.cpp's own library reads, and llama.cpp on one of them where node and its packages are here."""

import gc
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nanovlm_v2drop.benchmark import llama_cpp
from nanovlm_v2drop.benchmark.gguf_file import write_gguf
from nanovlm_v2drop.benchmark.llama_cpp import PeerUnavailable, check_available, install
from nanovlm_v2drop.benchmark.memory import own_memory, resident
from nanovlm_v2drop.benchmark.run import build_parser, main
from nanovlm_v2drop.benchmark.workload import SHAPES, Workload, make_workloads
from nanovlm_v2drop.models.config import TextConfig
from nanovlm_v2drop.models.memory import trim

SHAPE = TextConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
ARGUMENTS = ["--model=small", "--layers=2", "--text-tokens=4", "--vision-tokens=9", "--dtype=float32", "--decode-steps=2"]
QWEN2 = replace(SHAPE, qkv_bias=True, tie_word_embeddings=True)
QWEN3 = replace(SHAPE, qk_norm=True, head_dim=48)


@pytest.fixture(autouse=True)
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SHAPE)


def workload() -> Workload:
    return make_workloads(build_parser().parse_args(ARGUMENTS))[0]


@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize(("shape", "kind"), [(SHAPE, "llama"), (QWEN2, "qwen2"), (QWEN3, "qwen3")])
def test_a_file_holds_the_decoders_tensors_in_its_quantisation(
    shape: TextConfig, kind: str, quantisation: str, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    read_bytes = write_gguf(tmp_path / "model.gguf", shape, quantisation)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    decoder = make_decoder(shape)
    assert reader.fields["general.architecture"].contents() == kind
    assert sorted(tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors) == decoder
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) == 2]
    assert {tensor.tensor_type.name for tensor in matrices} == {quantisation}
    embeddings = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    tied = 0 if shape.tie_word_embeddings else embeddings.n_bytes
    assert read_bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors) - tied
    values = gguf.quants.dequantize(matrices[-1].data, matrices[-1].tensor_type)
    assert np.std(values) == pytest.approx(values.shape[1] ** -0.5, rel=0.1)


def make_decoder(shape: TextConfig) -> list[tuple[int, ...]]:
    """The shapes of our decoder's own parameters."""
    from nanovlm_v2drop.models.decoder import Decoder

    with torch.device("meta"):
        return sorted(tuple(parameter.shape) for parameter in Decoder(shape).parameters())


def test_the_reason_is_told_where_node_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(PeerUnavailable, match="node is not installed"):
        check_available(workload())


def test_the_reason_is_told_for_a_machine_without_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp.platform, "machine", lambda: "riscv64")
    with pytest.raises(PeerUnavailable, match=r"node-llama-cpp has no build for .* riscv64"):
        install()


def test_the_reason_is_told_and_nothing_is_taken_for_complete_where_npm_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, "npm", stderr="npm error network unreachable\nmore")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", fail)
    for _ in range(2):
        with pytest.raises(PeerUnavailable, match=r"could not install node-llama-cpp .*: npm error network unreachable$"):
            install()


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_the_memory_of_a_process_grows_by_what_it_holds() -> None:
    gc.collect()
    trim()  # what earlier tests have freed would otherwise be given back while this one measures
    arguments = vars(build_parser().parse_args(ARGUMENTS))
    before = own_memory(arguments)
    held = np.ones(50_000_000, np.uint8)
    grown = resident(llama_cpp.os.getpid())["anonymous_mb"] - before["anonymous_mb"]
    assert 40 < grown < 60
    assert before["mapped_mb"] > 1
    assert held[-1] == 1


@pytest.mark.slow
def test_llama_cpp_answers_beside_us(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    try:
        check_available(workload())
        install()
    except PeerUnavailable as reason:
        pytest.skip(str(reason))
    main([*ARGUMENTS, "--model=smolvlm-256m", "--tokens=5", "--methods=v2drop", "--repeats=2", "--peers=llama.cpp", "--json"])
    report = json.loads(capsys.readouterr().out)
    names = ["dense", "v2drop@5", "llama.cpp Q8_0", "llama.cpp Q4_0"]
    assert [row["prefill"] for row in report["prefill"]] == [row["decode"] for row in report["decode"]] == names
    assert all(row["prefill_ms"] > 0 for row in report["prefill"])
    assert [row["memory"] for row in report["memory"]] == ["ours float32", "llama.cpp Q8_0", "llama.cpp Q4_0"]
    assert all(row["anonymous_mb"] > 10 for row in report["memory"])
    assert any("node-llama-cpp" in note for note in report["notes"])
