"""Pages of mapped files are let go, and only those; freed memory goes back to the system."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanovlm_v2drop.benchmark.memory import resident
from nanovlm_v2drop.loading.zoo import load
from nanovlm_v2drop.models import memory
from nanovlm_v2drop.models.memory import let_go, mapped_files, trim, whole_pages

MEGABYTES = 64
needs_linux = pytest.mark.skipif(not memory.MAPS.is_file(), reason="only Linux lists a process's mappings")


def resident_file_megabytes() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) / 1024


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.arange(MEGABYTES * 2**18, dtype=torch.int32), "b": torch.ones(5)}, path)
    return path


@needs_linux
def test_read_weights_of_a_file_are_resident_until_they_are_let_go_and_keep_their_values(stored: Path) -> None:
    before = resident_file_megabytes()
    with safe_open(stored, framework="pt") as file:
        weight, small = file.get_tensor("a"), file.get_tensor("b")
    expected = weight.sum().item()
    assert resident_file_megabytes() > before + MEGABYTES - 4
    let_go(weight, small, weight[:3], torch.zeros(2, 2, device="meta"))
    assert resident_file_megabytes() < before + 8
    assert weight.sum().item() == expected
    assert small.tolist() == [1] * 5


@needs_linux
def test_other_memory_keeps_its_values() -> None:
    weight = torch.ones(2**20)
    let_go(weight, weight.view(1024, -1).T)
    assert weight.sum().item() == 2**20


@needs_linux
def test_mappings_of_files_are_known_and_other_memory_is_none_of_them(stored: Path) -> None:
    with safe_open(stored, framework="pt") as file:
        spans, inside = list(mapped_files()), file.get_tensor("a").data_ptr()
        own = torch.ones(2**20).data_ptr()
        assert any(start <= inside < stop for start, stop in spans)
        assert not any(start <= own < stop for start, stop in spans)


def test_a_page_that_other_tensors_share_is_not_counted() -> None:
    weight = torch.zeros(3 * 4096, dtype=torch.uint8)[1:]
    first, end = whole_pages(weight)
    assert weight.data_ptr() <= first
    assert end <= weight.data_ptr() + weight.nbytes
    assert first % 4096 == end % 4096 == 0


def test_nothing_happens_where_mappings_are_not_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(memory, "c_library", lambda: pytest.fail("asked the kernel"))
    let_go(torch.ones(2**20))


@needs_linux
def test_a_loaded_model_has_let_go_of_what_was_read_to_check_it(
    tiny_llava_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("nanovlm_v2drop.loading.checkpoint.let_go", lambda *weights: asked.append(len(weights)))
    vlm = load(tiny_llava_folder)
    assert asked == [len(list(vlm.model.parameters()))]


def test_freed_memory_between_values_that_are_kept_goes_back_to_the_system() -> None:
    if not hasattr(memory.c_library(), "malloc_trim"):
        pytest.skip("this C library cannot be told to give memory back")
    kept, freed = [], []
    for _ in range(2000):
        kept.append(torch.ones(1024))
        freed.append(torch.ones(16 * 1024))  # 64 KB each: the C library takes them out of one heap
    freed.clear()
    before = resident("self")["anonymous_mb"]
    trim()
    assert resident("self")["anonymous_mb"] < before - 80
    assert all(values.sum() == 1024 for values in kept)
