"""nanoVLM's tokenizer comes from the repository that its config names, once, and from the cache afterwards."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, serve
from nanovlm import CONFIG, config, random_tensors, write_nanovlm_folder
from smolvlm import smollm2_tokenizer
from test_hub import environment

MODEL, TOKENIZER = "lusxvr/nanoVLM-450M", CONFIG["lm_tokenizer"]
SCRIPT = """
import json, sys
from nanovlm_v2drop import Request, load
from nanovlm_v2drop.loading.specs import WeightsUnavailable
try:
    print(json.dumps(load(sys.argv[1]).token_ids(Request("What?"))))
except WeightsUnavailable as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    tokenizer = smollm2_tokenizer(())
    settings = config(tokenizer)
    model = write_nanovlm_folder(tmp_path / "model", settings, random_tensors(settings), None)
    other = tmp_path / "tokenizer"
    other.mkdir()
    tokenizer.save(str(other / "tokenizer.json"))
    (other / "model.safetensors").write_bytes(b"the whole language model, which nobody needs")
    with serve({MODEL: model, TOKENIZER: other}) as running:
        yield running


def load_in_a_process(endpoint: str, cache: Path, **settings: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, MODEL],
        env=environment(endpoint, cache, settings), cwd=cache, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_without_a_tokenizer_gets_that_of_another_repository_and_keeps_it(hub: FakeHub, tmp_path: Path) -> None:
    ids = load_in_a_process(hub.endpoint, tmp_path / "cache")
    assert ids == smollm2_tokenizer(()).encode("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n").ids
    kept = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(kept) == 1, "the language model's weights were fetched with its tokenizer"
    assert load_in_a_process(hub.endpoint, tmp_path / "cache", HF_HUB_OFFLINE="1") == ids


def test_a_tokenizer_that_cannot_be_had_is_told_with_what_to_do(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories.pop(TOKENIZER)
    message = load_in_a_process(hub.endpoint, tmp_path / "cache")
    assert f"cannot get {TOKENIZER}" in message
    assert message.endswith(f"copy tokenizer.json of {TOKENIZER} into the folder of the model")
