"""A checkpoint of noise has the released files, sizes and ids; here with small layers, so that nothing large is written."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from nanovlm_v2drop import DropSchedule, Request, V2Drop, generate, load
from nanovlm_v2drop.benchmark import answer, checkpoint, picture
from nanovlm_v2drop.benchmark.official_smolvlm import Sizes
from nanovlm_v2drop.benchmark.workload import SHAPES
from nanovlm_v2drop.inference import prefill
from nanovlm_v2drop.loading.specs import WeightsUnavailable
from nanovlm_v2drop.models.config import SiglipVisionConfig, VisionConfig


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tower = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16
    )
    text = replace(
        SHAPES["smolvlm-256m"], hidden_size=24, head_dim=8, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=16, num_hidden_layers=3,
    )  # fmt: skip
    monkeypatch.setitem(checkpoint.MODELS, "smolvlm-256m", Sizes(tower, 4))
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
    with pytest.raises(ValueError, match=r"llava-1\.5-7b has 32 layers; --layers 33 must be from 1 to that"):
        checkpoint.write_checkpoint("llava-1.5-7b", tmp_path / "new", layers=33)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def llava_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tower = VisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=56)
    text = replace(
        SHAPES["llava-1.5-7b"], hidden_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=128, num_hidden_layers=6,
    )  # fmt: skip
    monkeypatch.setitem(checkpoint.MODELS, "llava-1.5-7b", tower)
    monkeypatch.setitem(SHAPES, "llava-1.5-7b", text)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 2**20)
    checkpoint.main(["llava-1.5-7b", str(tmp_path / "llava"), "--layers", "5"])
    return tmp_path / "llava"


def test_a_llava_is_written_shard_by_shard_and_answers(llava_folder: Path) -> None:
    places = json.loads((llava_folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(places.values()) == {file.name for file in llava_folder.glob("*.safetensors")}
    assert len(set(places.values())) > 2  # the embeddings and the head are larger than a shard
    vlm = load(llava_folder)
    assert len(vlm.model.language_model.layers) == 5
    assert {token: vlm.tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<image>")} == {
        "<s>": 1, "</s>": 2, "<image>": 32000,
    }  # fmt: skip
    request = Request("What?", images=[Image.new("RGB", (90, 50), (200, 90, 10))])
    assert vlm.token_ids(request)[0] == 1
    assert vlm.token_ids(request).count(32000) == 16
    (found,) = generate(vlm, [request], V2Drop(DropSchedule({1: 0.4})), max_new_tokens=2)
    assert len(found.token_ids) <= 2


def test_transformers_reads_the_same_llava_and_gives_the_same_logits(llava_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    official = transformers.AutoModelForImageTextToText.from_pretrained(llava_folder, dtype=torch.float32).eval()
    vlm = load(llava_folder, dtype="float32")
    ids, media = vlm.tokens_and_media(Request("What?", images=[Image.new("RGB", (90, 50), (200, 90, 10))]))
    pixels = torch.cat([medium.pixel_values for medium in media])
    with torch.no_grad():
        wanted = official(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
        ours = prefill(vlm.model.language_model, vlm.model.pack([ids], [media], (0,))).logits[0]
    torch.testing.assert_close(ours, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("options", [(), ("--methods", "dense", "--kv-cache-dtype", "int8")])
def test_the_first_answer_is_timed_in_parts_beside_the_memory(
    options: tuple[str, ...], llava_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer.main([str(llava_folder), "--dtype", "float32", "--tokens", "10", "--new-tokens", "3", "--repeats", "2", *options])
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["program"] == f"{'dense' if options else 'v2drop'} float32"
    assert row["answer_s"] == pytest.approx(row["vision_s"] + row["prefill_s"] + row["decode_s"])
    assert row["first_answer_s"] >= row["answer_s"] > 0
    assert row["peak_anonymous_mb"] > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0.5"], "out of reach"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--new-tokens", "-1"], "--new-tokens -1 must be at least 1"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    options: list[str], message: str, llava_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        answer.main([str(llava_folder), *options])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("python -m nanovlm_v2drop.benchmark.answer: error: ")
    assert message in line


@pytest.mark.parametrize("program", [answer, picture])
def test_weights_that_cannot_be_had_are_told_in_one_line(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable(*_: object, **__: object) -> None:
        raise WeightsUnavailable("not here")

    monkeypatch.setattr(program, "load", unavailable)
    with pytest.raises(SystemExit) as stop:
        program.main(["smolvlm-256m"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(": error: not here")
