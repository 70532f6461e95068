"""Fingerprints change with every content that answers depend on, and with nothing else."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nanovlm_v2drop.dropping import DROPPERS, TokenDropper
from nanovlm_v2drop.evaluation import fingerprints
from nanovlm_v2drop.evaluation.fingerprints import data_fingerprint, method_fingerprint, model_fingerprint, sampled
from nanovlm_v2drop.evaluation.methods import find_methods

FILE = "model.safetensors"


@pytest.fixture
def folder(tiny_llava_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llava_folder, tmp_path / "model"))


def test_a_copied_folder_has_the_same_fingerprint_whatever_its_path_and_times(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "elsewhere")
    os.utime(copied / FILE, (1, 1))
    (copied / "README.md").write_text("a note")
    assert model_fingerprint(copied) == model_fingerprint(folder)


@pytest.mark.parametrize("whole_file", [2**28, 0])  # read whole, and sampled
def test_a_change_in_any_single_tensor_is_seen(whole_file: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "WHOLE_FILE", whole_file)
    before, tensors = model_fingerprint(folder), load_file(folder / FILE)
    size, times = (folder / FILE).stat().st_size, (folder / FILE).stat()
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor + 1e-3}, folder / FILE, metadata={"format": "pt"})
        assert (folder / FILE).stat().st_size == size
        os.utime(folder / FILE, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert model_fingerprint(folder) != before, name
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    assert model_fingerprint(folder) == before


def test_two_tensors_that_change_places_are_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "WHOLE_FILE", 0)
    before, tensors = model_fingerprint(folder), load_file(folder / FILE)
    first, second = (f"language_model.model.layers.1.self_attn.{part}_proj.weight" for part in "kv")
    save_file({**tensors, first: tensors[second], second: tensors[first]}, folder / FILE, metadata={"format": "pt"})
    assert model_fingerprint(folder) != before


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_changed_setting_is_seen(name: str, folder: Path) -> None:
    before = model_fingerprint(folder)
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), "more": 1}))
    assert model_fingerprint(folder) != before


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**20), st.integers(0, 2**20))
def test_blocks_of_a_large_tensor_begin_at_its_first_byte_and_end_at_its_last(start: int, size: int) -> None:
    class Noted:
        """Notes what is read."""

        def __init__(self) -> None:
            self.place, self.read_at = 0, list[tuple[int, int]]()

        def seek(self, place: int) -> None:
            self.place = place

        def read(self, size: int) -> bytes:
            self.read_at.append((self.place, self.place + size))
            return b""

    noted = Noted()
    list(sampled(noted, start, start + size))
    assert noted.read_at[0][0] == start
    assert noted.read_at[-1][1] == start + size
    assert len(noted.read_at) in (1, fingerprints.BLOCKS)
    gaps = [later[0] - earlier[1] for earlier, later in zip(noted.read_at, noted.read_at[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_data_of_the_same_size_with_other_rows_and_files_in_another_order_are_seen(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_bytes(file.name.encode() * 5000)
    before = data_fingerprint(files)
    assert data_fingerprint(files[::-1]) != before
    files[1].rename(tmp_path / "c")
    assert data_fingerprint([files[0], tmp_path / "c"]) == before
    (tmp_path / "c").write_bytes(b"b" * 2500 + b"x" + b"b" * 2499)
    assert data_fingerprint([files[0], tmp_path / "c"]) != before


METHOD = """from nanovlm_v2drop import TokenDropper
class Own(TokenDropper):
    name = "own"
    def score(self, state): return {}state.hidden_states.norm(dim=-1)
"""


def own(path: Path, source: str) -> type[TokenDropper]:
    path.write_text(source)
    (method,) = find_methods([f"{path}:Own"])
    assert method is not None
    return method


def test_an_edited_method_is_seen_and_a_moved_one_is_not(tmp_path: Path) -> None:
    first = method_fingerprint(own(tmp_path / "first.py", METHOD.format("")))
    assert method_fingerprint(own(tmp_path / "moved.py", METHOD.format(""))) == first
    assert method_fingerprint(own(tmp_path / "edited.py", METHOD.format("-"))) != first


def test_an_edited_class_that_a_method_is_made_of_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    base, method = tmp_path / "base_of_own.py", "from base_of_own import Base\nclass Own(Base):\n    name = 'own'\n"
    source = METHOD.replace("Own", "Base").replace('    name = "own"\n', "")
    base.write_text(source.format(""))
    before = method_fingerprint(own(tmp_path / "own.py", method))
    base.write_text(source.format("-"))
    assert method_fingerprint(own(tmp_path / "own.py", method)) != before


def test_every_method_of_the_package_has_a_fingerprint_of_its_own_file() -> None:
    prints = {name: method_fingerprint(method) for name, method in DROPPERS.items()}
    assert len({prints[name] for name in ("v2drop", "fastv", "dart", "dycoke", "tome", "visionzip")}) == 6
    assert all(value.startswith("sha256:") for value in prints.values())
