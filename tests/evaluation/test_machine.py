"""The free memory that batches go by."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovlm_v2drop.evaluation import machine

CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the system's files stand."""
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return tmp_path


def test_free_memory_is_what_the_system_can_give_within_the_containers_limit(system):
    assert machine.free_memory(CPU) == machine.UNKNOWN_FREE
    (system / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   2000 kB\n")
    assert machine.free_memory(CPU) == 2_048_000
    (system / "memory.max").write_text("1000\n")
    (system / "memory.current").write_text("400\n")
    assert machine.free_memory(CPU) == 600
    (system / "memory.current").write_text("1400\n")
    assert machine.free_memory(CPU) == 1
    (system / "memory.max").write_text("max\n")
    assert machine.free_memory(CPU) == 2_048_000


@pytest.mark.slow
def test_the_peak_of_a_program_is_not_that_of_the_program_that_started_it():
    held = bytearray(b"1") * 2**30
    script = "import torch; from nanovlm_v2drop.evaluation.machine import *; print(peak_memory_mb(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 50 < float(done.stdout) < len(held) / 1e6 < machine.peak_memory_mb(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_free_memory_of_a_gpu_counts_what_torch_holds_unused():
    device = torch.device("cuda")
    before = machine.free_memory(device)
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert machine.free_memory(device) <= before - 2**27
    del held
    assert machine.free_memory(device) >= before - 2**27
