"""One picture beside transformers, at a tiny size. Nothing here looks at a time."""

import json
from pathlib import Path

import pytest
from test_checkpoint_of_noise import folder as folder

from nanovlm_v2drop import load
from nanovlm_v2drop.benchmark import picture

PARTS = ("vision_ms", "prefill_ms", "first_token_ms", "decode_ms_per_token", "peak_mb")
NAMES = ["dense float32", "v2drop@50% float32", "transformers sdpa float32"]

pytest.importorskip("transformers")


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, float]]:
    picture.main([str(folder), "--dtypes", "float32", "--retain", "0.5", "--repeats", "1", "--threads", "1"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_every_program_has_a_row_with_all_its_parts(folder, capsys, monkeypatch):
    monkeypatch.setattr(picture, "peak_apart", lambda *_: 1.0)
    rows = run(folder, capsys)
    assert [row["program"] for row in rows] == NAMES
    assert all(row[part] > 0 for row in rows for part in PARTS)


def test_programs_that_compute_different_logits_are_refused(folder, tmp_path, monkeypatch):
    picture.noise_picture(256, 192).save(tmp_path / "noise.png")
    ids, pixels = picture.prompt_of(load(folder), tmp_path / "noise.png").tensors()
    monkeypatch.setattr(picture.Prompt, "tensors", lambda self: (ids, 1 - pixels))
    with pytest.raises(RuntimeError, match="our dense logits differ from those of transformers"):
        picture.programs_of(folder, "float32", tmp_path / "noise.png", [0.5])


def test_a_checkpoint_of_another_family_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        run(Path(__file__).parents[2] / "weights" / "demo", capsys)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("weights/demo is no checkpoint of the SmolVLM family; only their pixels are compared here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--retain", "half"], "--retain 'half' must be numbers with commas between them"),
    ],
)
def test_options_that_cannot_be_are_told_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        picture.main(["folder", *options])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"python -m nanovlm_v2drop.benchmark.picture: error: {message}\n"


@pytest.mark.slow
def test_memory_is_that_of_a_process_for_each_program(folder, capsys):
    rows = run(folder, capsys)
    assert all(100 < row["peak_mb"] < 5000 for row in rows)
