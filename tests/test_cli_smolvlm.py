"""A small real model's folder, asked about a photo from the command line."""

import json
from pathlib import Path

import pytest
from nanovlm import config, random_tensors, write_nanovlm_folder
from PIL import Image
from qwen2vl import qwen2vl_reference, qwen2vl_tokenizer, write_qwen2vl_folder
from smolvlm import picture, smollm2_tokenizer, smolvlm_reference, write_smolvlm_folder

from nanovlm_v2drop import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = smollm2_tokenizer()
    return write_smolvlm_folder(tmp_path_factory.mktemp("weights"), smolvlm_reference(tokenizer, "Idefics3"), tokenizer)


def test_a_photo_is_asked_about_by_the_models_name_with_weights_from_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(60, 45).save(tmp_path / "photo.jpg")
    options = ["--model", "smolvlm-256m", "--weights", folder, "--image", tmp_path / "photo.jpg", "--prompt", "What is it?"]
    assert cli.main([str(option) for option in [*options, "--retain", "0.333", "--output", tmp_path / "run"]]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    dense, *others = result["results"]
    assert (result["model"], dense["method"], dense["vision_tokens"]) == ("smolvlm-256m", "dense", 13 * 16)
    assert others
    assert all(row["mean_vision_tokens"] < dense["mean_vision_tokens"] for row in others)
    assert Image.open(result["picture"]).size[0] > 200


def test_nanovlm_answers_by_its_name_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = smollm2_tokenizer(())
    settings = config(tokenizer)
    folder = write_nanovlm_folder(tmp_path / "weights", settings, random_tensors(settings), tokenizer)
    picture(60, 45).save(tmp_path / "photo.jpg")
    options = ["--model", "nanovlm-450m", "--weights", folder, "--image", tmp_path / "photo.jpg", "--prompt", "What is it?"]
    assert cli.main([str(option) for option in [*options, "--retain", "0.333", "--output", tmp_path / "run"]]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["model"], result["results"][0]["vision_tokens"]) == ("nanovlm-450m", 5 * 16)


def test_pictures_that_the_drawing_leaves_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2-VL cuts a picture by its shape, and the pictures of a drawing are cut alike."""
    folder = write_qwen2vl_folder(tmp_path / "weights", qwen2vl_reference(qwen2vl_tokenizer()), qwen2vl_tokenizer())
    photos = [tmp_path / f"{number}.png" for number in range(3)]
    for photo, size in zip(photos, ((60, 45), (60, 45), (200, 45)), strict=True):
        picture(*size).save(photo)
    options = ["--model", folder, "--image", *photos, "--prompt", "What is it?", "--methods", "dense"]
    assert cli.main([str(option) for option in [*options, "--output", tmp_path / "run"]]) == 0
    kept = tmp_path / "run" / "kept.png"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"kept tokens: {kept}; not drawn, because of another shape than the first picture: 1"
