"""What the loading benchmark writes and returns, at a size that no clock is asked about."""

import json

import pytest
import torch

from nanovlm_v2drop.benchmark.loading import import_row, load_ours, loading_rows, write_checkpoint
from nanovlm_v2drop.models.config import TextConfig

SHAPE = TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
)
QWEN = TextConfig(**{**vars(SHAPE), "qkv_bias": True, "tie_word_embeddings": True})
FIELDS = {"stored", "dtype", "cache", "file_mb", "load_seconds", "ready_seconds", "cpu_seconds", "peak_mb", "rounds_seconds"}


@pytest.mark.parametrize("shape", [SHAPE, QWEN], ids=["llama", "qwen2"])
def test_what_is_written_loads_strictly_with_as_many_layers_as_fit(shape, tmp_path):
    size = write_checkpoint(tmp_path, shape, 1000, torch.float16)
    assert size == (tmp_path / "model.safetensors").stat().st_size
    model = load_ours(tmp_path, torch.float32)
    assert len(model.language_model.layers) == 3
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    write_checkpoint(smaller, shape, (size - 20_000) / 1e6, torch.float16)  # a layer has 16 kB, the header some
    assert len(load_ours(smaller, torch.float32).language_model.layers) == 2
    with pytest.raises(ValueError, match=r"one layer is larger than 0\.1 MB; give more"):
        write_checkpoint(tmp_path, shape, 0.1, torch.float16)


@pytest.mark.parametrize("shape", [SHAPE, QWEN], ids=["llama", "qwen2"])
def test_transformers_finds_every_tensor_of_its_own_model_in_the_file(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_checkpoint(tmp_path, shape, 1000, torch.float16)
    _, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_there_is_a_row_for_each_dtype_and_cache():
    rows = loading_rows(SHAPE, dtypes={"bfloat16": ("bfloat16",)}, loaders=("ours",), repeats=1)
    assert [(row["stored"], row["dtype"], row["cache"]) for row in rows] == [
        ("bfloat16", "bfloat16", cache) for cache in ("warm", "cold")
    ]
    for row in rows:
        assert set(row) == FIELDS | {"loading"}
        assert 0 < row["load_seconds"] <= row["ready_seconds"]
        assert row["rounds_seconds"] == [row["load_seconds"]]
    assert json.loads(json.dumps(rows)) == rows


def test_importing_is_timed_apart_from_torch():
    row = import_row(1)
    assert row["torch_seconds"] > 0
    assert row["beyond_torch_seconds"] > 0
