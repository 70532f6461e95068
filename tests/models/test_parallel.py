"""Two gloo processes give the results of one: with a shared decoder, and with samples taken in turn."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_worker import outcomes
from safetensors.torch import load_file, save_file

from nanovlm_v2drop.dropping import DROPPERS
from nanovlm_v2drop.loading.tensor_parallel import SPLIT, check_divisible, own_part
from nanovlm_v2drop.loading.zoo import load
from nanovlm_v2drop.models.config import TextConfig
from nanovlm_v2drop.models.parallel import ALONE, Processes, join_processes

ROOT = Path(__file__).parents[2]
PICTURE = str(ROOT / "weights" / "demo" / "report.png")
TOLERANCE = 1e-4  # share of the largest logit in float32; only the order of sums differs
INT8_TOLERANCE = 2e-3  # a sum in another order can be rounded to the next int8 number
OPTIONS = ("--methods", "dense,v2drop,random", "--tokens", "32", "--seeds", "2", "--limit", "5", "--batch-size", "1")


def torchrun(*command: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *map(str, command)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


# A shared decoder


@pytest.fixture(scope="session")
def tiny_qwen_folder(tiny_llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA with a decoder like Qwen2's: biases, the head tied to the embeddings, and an odd vocabulary."""
    folder = tmp_path_factory.mktemp("tiny-qwen")
    for file in tiny_llava_folder.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | {"model_type": "qwen2", "tie_word_embeddings": True}
    text["vocab_size"] += 1
    (folder / "config.json").write_text(json.dumps(config | {"text_config": text, "tie_word_embeddings": True}))
    tensors, generator = load_file(tiny_llava_folder / "model.safetensors"), torch.Generator().manual_seed(7)
    del tensors["language_model.lm_head.weight"]
    embeddings = "language_model.model.embed_tokens.weight"
    tensors[embeddings] = torch.cat([tensors[embeddings], torch.randn(1, text["hidden_size"], generator=generator)])
    for name in [name for name in tensors if re.search(r"language_model.*[qkv]_proj\.weight", name)]:
        tensors[name.replace("weight", "bias")] = torch.randn(len(tensors[name]), generator=generator)
    save_file(tensors, folder / "model.safetensors")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content[0].text }}")  # no paper asks such a decoder
    return folder


@pytest.fixture(scope="session")
def folders(tiny_llava_folder: Path, tiny_qwen_folder: Path) -> dict[str, Path]:
    return {"llava": tiny_llava_folder, "qwen": tiny_qwen_folder}


@pytest.fixture(scope="session")
def shared(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The results of each of the two processes, by model."""
    output = tmp_path_factory.mktemp("shared")
    done = torchrun(ROOT / "tests" / "parallel_worker.py", output, *folders.values())
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(output / f"rank-{rank}.pt") for rank in range(2)]
    return {kind: [rank[str(folder)] for rank in ranks] for kind, folder in folders.items()}


@pytest.fixture(scope="session")
def alone(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    models = {kind: load(folder).model for kind, folder in folders.items()}
    return {kind: {"outcomes": outcomes(m.language_model), "state": m.state_dict()} for kind, m in models.items()}


@pytest.mark.parametrize("name", ["None", *DROPPERS])
@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_a_shared_decoder_keeps_the_tokens_of_a_whole_one_and_gives_its_logits(kind, name, shared, alone):
    (first, second), whole = (found["outcomes"][name] for found in shared[kind]), alone[kind]["outcomes"][name]
    assert first["kept"] == second["kept"] == whole["kept"]
    assert torch.equal(first["logits"], second["logits"])
    assert (first["logits"] - whole["logits"]).abs().max() < TOLERANCE * whole["logits"].abs().max()
    assert first["nbytes"] == second["nbytes"] == whole["nbytes"] // 2  # half of the key and value heads each


@pytest.mark.parametrize("name", ["None", "v2drop"])
@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_the_parts_of_an_int8_cache_give_the_logits_of_a_whole_one(kind, name, shared, alone):
    first, whole = (found["outcomes"][f"{name} with an int8 cache"] for found in (shared[kind][0], alone[kind]))
    assert first["kept"] == whole["kept"]
    assert first["nbytes"] == whole["nbytes"] // 2 < alone[kind]["outcomes"][name]["nbytes"] // 4
    assert (first["logits"] - whole["logits"]).abs().max() < INT8_TOLERANCE * whole["logits"].abs().max()


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_each_process_holds_its_part_of_the_split_matrices_and_a_copy_of_the_rest(kind, shared, alone):
    first, second = (found["state"] for found in shared[kind])
    for name, whole in alone[kind]["state"].items():
        module = name.split(".")[-2]
        if name.startswith("language_model.") and module in SPLIT:
            assert torch.equal(torch.cat([first[name], second[name]], SPLIT[module]), whole), name
        else:
            assert torch.equal(first[name], whole), name
            assert torch.equal(second[name], whole), name


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_no_process_reads_a_split_matrix_whole(kind, shared):
    for found in shared[kind]:
        assert found["read_whole"]
        split = [name for name in found["read_whole"] if "language_model" in name and name.split(".")[-2] in SPLIT]
        assert not split


def test_a_number_that_does_not_divide_the_decoder_is_refused_with_those_that_do():
    config = TextConfig(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2)
    check_divisible(config, 2)
    message = r"tensor_parallel 4 does not divide num_attention_heads 14, num_key_value_heads 2; 1, 2 would work"
    with pytest.raises(ValueError, match=message):
        check_divisible(config, 4)
    with pytest.raises(ValueError, match=r"tensor_parallel 3 does not divide .*intermediate_size 11008; 1, 2, 4, 8, 16, 32"):
        check_divisible(TextConfig(), 3)


@pytest.mark.parametrize(("length", "size"), [(61, 2), (8, 4), (5, 4), (2, 3)])
def test_the_parts_are_those_of_torch_chunk_and_together_the_whole(length, size):
    meshes = [SimpleNamespace(size=lambda: size, get_local_rank=lambda rank=rank: rank) for rank in range(size)]
    values = torch.arange(length)
    parts = [values[own_part(values.shape, 0, mesh)] for mesh in meshes]
    assert torch.equal(torch.cat(parts), values)
    for part, chunk in zip(parts, values.chunk(size), strict=False):
        assert torch.equal(part, chunk)


# Processes


def test_without_torchrun_there_is_one_process_and_no_process_group():
    assert join_processes("cpu") is ALONE
    assert (ALONE.replica, ALONE.replicas, ALONE.is_first, ALONE.is_first_of_replica) == (0, 1, True, True)
    assert ALONE.device("cuda") == "cuda"
    assert ALONE.agreed("value") == "value"
    ALONE.wait()
    assert not dist.is_initialized()


def test_sharing_a_decoder_without_torchrun_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"tensor_parallel 2 needs .* not 1; start them with torchrun --nproc-per-node 2"):
        load("demo", tensor_parallel=2)
    with pytest.raises(ValueError, match="tensor_parallel 0"):
        load("demo", tensor_parallel=0)


def test_neighbours_share_a_decoder_and_every_process_has_its_gpu():
    processes = [Processes(rank, world_size=6, tensor_parallel=2, local_rank=rank % 3) for rank in range(6)]
    assert [each.replica for each in processes] == [0, 0, 1, 1, 2, 2]
    assert [each.is_first_of_replica for each in processes] == [True, False] * 3
    assert [each.is_first for each in processes] == [True] + [False] * 5
    assert {each.replicas for each in processes} == {3}
    assert [each.device("cuda") for each in processes] == ["cuda:0", "cuda:1", "cuda:2"] * 2
    assert processes[4].device("cpu") == "cpu"


# The command line


def evaluation(output: Path, *options: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    return torchrun(ROOT / "train_free_eval.py", *OPTIONS, *options, "--output", output, processes=processes)


def answers(output: Path) -> list[tuple[Any, ...]]:
    """The fields that do not depend on a clock, in the order of the file."""
    lines = (output / "samples.jsonl").read_text().splitlines()
    names = ("plan", "sample_id", "text", "correct", "kept", "kv_cache_bytes")
    return [tuple(record[name] for name in names) for record in map(json.loads, lines)]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    output = tmp_path_factory.mktemp("plain")
    command = [sys.executable, ROOT / "train_free_eval.py", *OPTIONS, "--output", output]
    subprocess.run(command, check=True, capture_output=True)
    return output


@pytest.mark.parametrize("options", [(), ("--tensor-parallel", 2)], ids=["replicas", "shared decoder"])
def test_two_processes_write_the_answers_of_one_in_its_order(options, plain, tmp_path):
    done = evaluation(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path) == answers(plain)
    assert not list(tmp_path.glob("samples-*"))
    result, wanted = json.loads(done.stdout.splitlines()[-1]), json.loads((plain / "summary.json").read_text())
    assert [row["score"] for row in result["results"]] == [row["score"] for row in wanted["results"]]
    assert (result["processes"], wanted["processes"]) == (2, 1)
    assert json.loads((tmp_path / "summary.json").read_text()) == result
    assert (tmp_path / "galleries.json").read_text() == (plain / "galleries.json").read_text()
    assert done.stdout.count("vision tokens a prompt") == 1  # one table
    assert done.stdout.count("model demo, device cpu") == 1


FAILING = """
import os, signal
from nanovlm_v2drop import V2Drop

class Failing(V2Drop):
    name = "failing"
    calls = 0

    def __call__(self, state):
        Failing.calls += 1
        if os.environ.get("RANK") == "1" and Failing.calls > 5:
            {action}
        return super().__call__(state)
"""


@pytest.mark.slow
def test_a_run_of_which_one_process_was_killed_goes_on_with_another_number_of_processes(plain, tmp_path):
    method = tmp_path / "failing.py"
    method.write_text(FAILING.format(action="os.kill(os.getpid(), signal.SIGKILL)"))
    output = tmp_path / "run"
    options = ("--methods", f"dense,{method}:Failing,random")
    done = evaluation(output, *options)
    assert done.returncode != 0
    assert f"Signal {int(signal.SIGKILL)}" in done.stderr
    parts = {part.name: part.read_text() for part in output.glob("samples-*.jsonl")}
    assert "samples-1.jsonl" in parts
    (output / "samples-1.jsonl").write_text(parts["samples-1.jsonl"] + '{"task": "demo", "pl')  # cut in the middle of a line
    done = evaluation(output, *options, "--resume", processes=1)
    assert done.returncode == 0, done.stderr
    assert not list(output.glob("samples-*"))
    as_v2drop = [(plan.replace("failing", "v2drop"), *rest) for plan, *rest in answers(output)]
    assert sorted(as_v2drop) == sorted(answers(plain))


def test_an_error_in_one_process_ends_the_run_and_is_shown(tmp_path):
    method = tmp_path / "failing.py"
    method.write_text(FAILING.format(action='raise ValueError("these tokens cannot be dropped")'))
    done = evaluation(tmp_path / "run", "--tensor-parallel", 2, "--methods", f"dense,{method}:Failing")
    assert done.returncode != 0
    assert f"nanovlm-v2drop: process 1: {method}:12: ValueError: these tokens cannot be dropped" in done.stderr
    assert not done.stdout.strip().endswith("}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--claims",), "--claims is for one process"),
        (("--image", PICTURE, "--prompt", "What?"), "or share the decoder with --tensor-parallel 2"),
        (("--tensor-parallel", 4), "tensor_parallel 4 needs a number of processes that is a multiple of it, not 2"),
    ],
)
def test_what_several_processes_cannot_do_is_one_clear_error(options, message, tmp_path):
    done = torchrun(ROOT / "train_free_eval.py", *options, "--output", tmp_path / "run", processes=2)
    assert done.returncode != 0
    assert message in done.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "train_free_eval.py") not in done.stderr
