"""A checkpoint of noise has the released files, sizes and ids; here with small layers, so that nothing large is written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanovlm_v2drop import DropSchedule, Request, V2Drop, generate, load
from nanovlm_v2drop.benchmark import checkpoint
from nanovlm_v2drop.benchmark.workload import SHAPES
from nanovlm_v2drop.models.config import SiglipVisionConfig


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tower = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16
    )
    text = replace(
        SHAPES["smolvlm-256m"], hidden_size=24, head_dim=8, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=16, num_hidden_layers=3,
    )  # fmt: skip
    monkeypatch.setitem(checkpoint.MODELS, "smolvlm-256m", checkpoint.Sizes(tower, 4))
    monkeypatch.setitem(SHAPES, "smolvlm-256m", text)
    checkpoint.write_checkpoint("smolvlm-256m", tmp_path / "noise")
    return tmp_path / "noise"


def test_it_answers_a_photo_with_and_without_dropping(folder: Path) -> None:
    vlm = load(folder, dtype="bfloat16")
    request = Request("What?", images=[Image.new("RGB", (2048, 1536), (200, 90, 10))])
    ids = {"<global-img>": 49152, "<image>": 49190, "<end_of_utterance>": 49279}
    assert {token: vlm.tokenizer.token_to_id(token) for token in ids} == ids
    assert vlm.prepare([request]).vision_grids == (((1, 1, 1),) * 13,)
    for dropper in (None, V2Drop(DropSchedule({1: 0.4}))):
        (answer,) = generate(vlm, [request], dropper, max_new_tokens=2)
        assert len(answer.token_ids) <= 2


def test_transformers_reads_the_same_files(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    official = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ours = load(folder).model.language_model
    assert torch.equal(official.lm_head.weight, ours.lm_head.weight)
    assert type(official).__name__ == "Idefics3ForConditionalGeneration"


def test_a_folder_with_files_and_an_unknown_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="noise is not empty; give a new folder"):
        checkpoint.write_checkpoint("smolvlm-256m", folder)
    with pytest.raises(ValueError, match="unknown model 'smol'; choose one of: smolvlm-256m"):
        checkpoint.write_checkpoint("smol", tmp_path / "new")
