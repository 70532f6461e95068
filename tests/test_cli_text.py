"""`--text`: the whole command on a tiny random text model."""

import json
from pathlib import Path

import pytest
from text_models import text_reference, write_text_folder

from nanovlm_v2drop import DROPPERS, cli
from nanovlm_v2drop.cli import choices
from nanovlm_v2drop.dropping.before_decoder import BeforeDecoder
from nanovlm_v2drop.report import tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("text") / "tiny", text_reference("llama", max_position_embeddings=16384))


def test_the_methods_are_all_that_need_no_picture() -> None:
    of_pictures = {name for name, method in DROPPERS.items() if issubclass(method, BeforeDecoder)} | {"dycoke"}
    own = {"dense", "none", "oracle", "question-words", "v2drop-once"}
    assert set(choices.text_methods()) == (set(DROPPERS) - of_pictures) | own


METHODS = {"dense", "none", "oracle", "question-words", "v2drop"}


def test_a_run_answers_every_question_with_every_method_and_can_be_continued(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "PIPED_WIDTH", 80)
    output = tmp_path / "out"
    command = ["--text", ",".join(METHODS), "--model", str(folder), "--texts", "paraphrased,prose", "--output", str(output)]
    assert cli.main([*command, "--limit", "1", "--json"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in shown if not line.startswith(("output:", "tables:")))
    assert sum(line.startswith("question-words") for line in shown) == 5  # two parts a kind of text, and the times
    run = json.loads(last)
    rows = {(row["texts"], row["method"]): row for row in run["results"]}
    assert set(rows) == {("paraphrased", method) for method in METHODS} | {("prose", method) for method in METHODS - {"oracle"}}
    shares = {method: row["share"] for (_, method), row in rows.items()}
    assert (shares.pop("dense"), shares.pop("none")) == (1.0, 0.0)
    assert all(abs(share - 1 / 3) < 0.01 for share in shares.values())
    assert "| question-words | 0.33" in (output / "text.md").read_text()
    answers = (output / "text.jsonl").read_text()
    (output / "text.jsonl").write_text(answers + '{"texts": "retr')  # an interrupted run
    assert cli.main([*command, "--limit", "1"]) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert cli.main([*command, "--limit", "2", "--resume"]) == 0
    continued = (output / "text.jsonl").read_text()
    assert continued.startswith(answers)
    assert len(continued.splitlines()) == 2 * len(answers.splitlines())
    assert cli.main([*command, "--limit", "2", "--resume", "--dtype", "bfloat16"]) == 2
    assert "holds answers made with dtype torch.float32, not " in capsys.readouterr().err


def test_what_a_text_has_no_use_for_is_refused_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (["--text", "--methods", "v2drop"], "beside --text --methods would be ignored"),
        (["--text", "fastvid"], "unknown name 'fastvid'"),
        (["--texts", "prose"], "--texts names kinds of text for --text; give both"),
        (["--text", "--model", "demo-video"], "demo-video is a vision-language model, not a decoder alone"),
    ):
        try:
            status: object = cli.main(options)
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        assert said in capsys.readouterr().err
