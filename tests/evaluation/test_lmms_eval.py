"""The real lmms-eval, in an environment of its own, on local tasks: its results files hold our own answers and scores.

`bash .ci/lmms-eval` makes the environment and runs these tests in it. lmms-eval leaves with exit status 0 after an error too.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lmms_eval_data import CLIPS, IMAGES, several_rows, write_tasks
from numbered_clips import write_numbered

from nanovlm_v2drop import Request, V2Drop, generate, load
from nanovlm_v2drop.dropping.budget import Budget
from nanovlm_v2drop.evaluation.evaluate import evaluate
from nanovlm_v2drop.evaluation.plans import Plan, equal_budget_plans, prompt_shape
from nanovlm_v2drop.evaluation.records import Record, read_records
from nanovlm_v2drop.tasks import load_task

pytestmark = pytest.mark.slow
PYTHON = os.environ.get("LMMS_EVAL_PYTHON", "")
ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds
IMAGE_TASKS, ALL_TASKS = "demo_images,demo_several,demo_marked,demo_words", "demo_images,demo_marked,demo_words,demo_choices"
V2DROP, RANDOM = "method=v2drop,retain=1/3", "method=random,tokens=60.5,seed=3"
RUNS: dict[str, dict[str, Any]] = {  # all of them in one process: lmms-eval takes long to start
    "dense": {"model_args": "pretrained=demo,dtype=float32,attention=sdpa", "tasks": IMAGE_TASKS},
    "v2drop": {"model_args": f"pretrained=demo,{V2DROP}", "tasks": IMAGE_TASKS, "batch_size": "8"},
    "random": {"model_args": f"pretrained=demo,{RANDOM}", "tasks": "demo_images", "batch_size": "8"},
    "chain": {"model_args": "pretrained=demo,method=divprune+v2drop:share=0.5,retain=1/3", "tasks": "demo_images"},
    "simple": {"model_args": f"pretrained=demo,{V2DROP}", "tasks": ALL_TASKS, "batch_size": "8", "force_simple": True},
    "simple one by one": {"model_args": f"pretrained=demo,{V2DROP}", "tasks": ALL_TASKS, "force_simple": True},
    "video": {"model_args": "pretrained=demo-video", "tasks": "demo_video"},
    "video dycoke": {"model_args": "pretrained=demo-video,method=dycoke,retain=0.3", "tasks": "demo_video", "batch_size": "8"},
    "simple video": {"model_args": "pretrained=demo-video", "tasks": "demo_video", "batch_size": "8", "force_simple": True},
    "limit": {"model_args": "pretrained=demo", "tasks": "demo_images", "limit": 5, "repeats": 2, "predict_only": True},
    "cached": {"model_args": "pretrained=demo", "tasks": "demo_images", "limit": 5, "use_cache": "CACHE"},
    "cached again": {"model_args": "pretrained=demo", "tasks": "demo_images", "limit": 5, "use_cache": "CACHE"},
    "stopped": {"model_args": "pretrained=demo", "tasks": "demo_images", "gen_kwargs": "until=e,max_new_tokens=4"},
    "misspelt": {"model_args": "pretrained=demo,retian=1/3", "tasks": "demo_images"},
}  # fmt: skip
Samples = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PYTHON:
        pytest.skip("lmms-eval has an environment of its own: bash .ci/lmms-eval makes it and runs these tests")
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def output(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of all RUNS, and what lmms-eval printed."""
    folder = tmp_path_factory.mktemp("output")
    runs = [
        {
            **{"model": "nanovlm_v2drop", "device": "cpu", "log_samples": True, "output_path": str(folder / name)},
            **{key: str(folder / "cache") if value == "CACHE" else value for key, value in run.items()},
        }
        for name, run in RUNS.items()
    ]
    (folder / "runs.yaml").write_text(json.dumps(runs))  # JSON is YAML
    run_lmms_eval(["-m", "lmms_eval", "--config", folder / "runs.yaml", "--include_path", tasks], folder)
    return folder


def run_lmms_eval(options: Sequence[object], folder: Path) -> None:
    """Run it away from the sources, so that the installed package is found; what it prints goes to `folder`/log."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    with (folder / "log").open("w") as log:
        subprocess.run(
            [PYTHON, *map(str, options)], cwd=folder, env=environment, stdout=log, stderr=log, timeout=PATIENCE, check=True
        )


def results_of(output: Path, name: str) -> dict[str, Any]:
    """The results file of a run; a test without one fails with the end of what lmms-eval printed."""
    found = sorted((output / name).glob("*/*_results.json"))
    assert found, (output / "log").read_text()[-4000:]
    results: dict[str, Any] = json.loads(found[0].read_text())
    return results


def samples_of(output: Path, name: str, task: str) -> list[dict[str, Any]]:
    """The log of a task, in the order of the documents."""
    (path,) = (output / name).glob(f"*/*_samples_{task}.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def own_records(model: str, method: str, budget: Budget | None, batch_size: int, folder: Path, seed: int = 0) -> list[Record]:
    """What our own evaluation answers to the same samples, in their order; it answers prompts of similar length together."""
    vlm, task = load(model), load_task(model)
    shape = prompt_shape(vlm, task.first_sample().request)
    (plan,) = equal_budget_plans([method], [budget], shape, [seed]) if budget else [Plan("dense", shape=shape)]
    limit = IMAGES if model == "demo" else CLIPS
    assert len(list(evaluate(vlm, task, [plan], folder, limit=limit, batch_size=batch_size))) == limit
    order = [sample.sample_id for sample in task.samples(limit)]
    return sorted(read_records(folder), key=lambda record: order.index(record.sample_id))


SAME = [
    ("dense", "demo_images", "demo", "dense", None, 1),
    ("v2drop", "demo_images", "demo", "v2drop", Budget(retain=1 / 3), 8),
    ("simple", "demo_images", "demo", "v2drop", Budget(retain=1 / 3), 8),
    ("simple one by one", "demo_images", "demo", "v2drop", Budget(retain=1 / 3), 1),
    ("random", "demo_images", "demo", "random", Budget(tokens=60.5), 8),
    ("chain", "demo_images", "demo", "divprune+v2drop:share=0.5", Budget(retain=1 / 3), 1),
    ("video", "demo_video", "demo-video", "dense", None, 1),
    ("video dycoke", "demo_video", "demo-video", "dycoke", Budget(retain=0.3), 8),
    ("simple video", "demo_video", "demo-video", "dense", None, 8),
]


@pytest.mark.parametrize(("run", "name", "model", "method", "budget", "batch_size"), SAME, ids=[each[0] for each in SAME])
def test_answers_and_accuracy_are_our_own_to_the_last_digit(
    run: str, name: str, model: str, method: str, budget: Budget | None, batch_size: int, output: Path, tmp_path: Path
) -> None:
    records = own_records(model, method, budget, batch_size, tmp_path, seed=3 if method == "random" else 0)
    results, samples = results_of(output, run), samples_of(output, run, name)
    assert [sample["filtered_resps"] for sample in samples] == [record.text for record in records]
    score = load_task(model).summary([vars(record) for record in records])["score"]
    assert 100 * results["results"][name]["accuracy,none"] == score
    (counts,) = {tuple(sample["token_counts"][0][key] for key in ("vision_tokens", "mean_vision_tokens")) for sample in samples}
    assert counts[0] == records[0].vision_tokens
    wanted = counts[0] if budget is None else budget.mean_tokens(counts[0])
    assert counts[1] == pytest.approx(wanted, abs=1)


def test_the_mean_vision_tokens_stand_in_the_results(output: Path) -> None:
    throughput = results_of(output, "random")["throughput"]
    assert throughput["avg_vision_tokens"] == 144
    assert throughput["avg_mean_vision_tokens"] == pytest.approx(60.5, abs=0.5)


def several_requests(form: str) -> Iterator[Request]:
    for row, sample in zip(several_rows(list(load_task("demo").samples(IMAGES)), form), several_samples(), strict=True):
        yield Request(text=row["question"], images=sample)


def several_samples() -> Iterator[list[Any]]:
    samples = list(load_task("demo").samples(IMAGES + 2))[:IMAGES]
    for number, sample in enumerate(samples):
        yield [sample.images[0], *(other.images[0] for other in samples[number + 1 : number + 1 + number % 3])]


@pytest.mark.parametrize(
    ("run", "name", "form"),
    [
        ("dense", "demo_several", "Here: <image>\n{marks}{question}"),
        ("v2drop", "demo_several", "Here: <image>\n{marks}{question}"),
        ("v2drop", "demo_marked", "The first: <image>\nThe others: {marks}{question}"),
        ("simple", "demo_marked", "The first: <image>\nThe others: {marks}{question}"),
    ],
)
def test_several_pictures_stand_where_the_document_puts_them(run: str, name: str, form: str, output: Path) -> None:
    vlm, requests = load("demo"), list(several_requests(form))
    size = int(RUNS[run].get("batch_size", "1"))
    options: dict[str, Any] = {} if run == "dense" else {"dropper": V2Drop, "retain": 1 / 3}
    batches = [requests[start : start + size] for start in range(0, len(requests), size)]
    answers = [each.text for batch in batches for each in generate(vlm, batch, max_new_tokens=8, **options)]
    assert [sample["filtered_resps"] for sample in samples_of(output, run, name)] == answers


@pytest.mark.parametrize("run", ["dense", "v2drop", "simple", "simple one by one"])
def test_a_document_without_pictures_is_answered(run: str, output: Path) -> None:
    samples = samples_of(output, run, "demo_words")
    assert len(samples) == IMAGES
    assert {sample["token_counts"][0]["vision_tokens"] for sample in samples} == {0}


def test_multiple_choice_takes_the_option_that_the_model_would_write(output: Path) -> None:
    for run in ("simple", "simple one by one"):
        written = [sample["filtered_resps"] for sample in samples_of(output, run, "demo_images")]
        for sample, answer in zip(samples_of(output, run, "demo_choices"), written, strict=True):
            losses = [float(loss) for loss, _ in sample["filtered_resps"]]
            greedy = [is_greedy == "True" for _, is_greedy in sample["filtered_resps"]]
            assert min(losses) >= 0
            assert sum(greedy) == 1
            assert losses.index(min(losses)) == greedy.index(True)
            assert sample["acc"] == float(answer == sample["target"])
    one, other = (results_of(output, run)["results"]["demo_choices"]["acc,none"] for run in ("simple", "simple one by one"))
    assert one == other > 0.5


def test_limit_repeats_and_predict_only_give_an_answer_each(output: Path) -> None:
    assert results_of(output, "limit")
    assert [sample["doc_id"] for sample in samples_of(output, "limit", "demo_images")] == list(range(5))


def test_a_run_from_the_cache_has_the_same_answers(output: Path) -> None:
    first, again = (samples_of(output, run, "demo_images") for run in ("cached", "cached again"))
    assert [sample["filtered_resps"] for sample in first] == [sample["filtered_resps"] for sample in again]
    assert first[0]["token_counts"][0] is not None
    assert again[0]["token_counts"][0] is None  # nothing was computed


def test_answers_end_before_a_stop_string(output: Path) -> None:
    runs = [samples_of(output, run, "demo_images") for run in ("dense", "stopped")]
    dense, stopped = ([sample["filtered_resps"] for sample in samples] for samples in runs)
    assert any("e" in answer for answer in dense)
    assert stopped == [answer.partition("e")[0] for answer in dense]
    counts = [sum(sample["token_counts"][0]["output_tokens"] for sample in samples) for samples in runs]
    assert counts[1] < counts[0]  # they are not decoded to their ends


def test_an_unknown_argument_ends_the_run_with_its_name(output: Path) -> None:
    assert not list((output / "misspelt").glob("**/*"))
    assert "unknown model_args 'retian'; choose from: pretrained, method, tokens, retain" in (output / "log").read_text()


def test_two_processes_share_the_documents_and_give_the_answers_of_one(output: Path, tasks: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "lmms_eval"]
    options = ["--model", "nanovlm_v2drop", "--model_args", f"pretrained=demo,{V2DROP}", "--tasks", "demo_images,demo_choices"]
    rest = ["--force_simple", "--include_path", tasks, "--output_path", tmp_path / "shared", "--log_samples", "--limit", 7]
    run_lmms_eval([*launcher, *options, "--device", "cpu", *rest], tmp_path)
    for name in ("demo_images", "demo_choices"):
        shared, alone = samples_of(tmp_path, "shared", name), samples_of(output, "simple one by one", name)[:7]
        assert [sample["filtered_resps"] for sample in shared] == [sample["filtered_resps"] for sample in alone]
    throughput = results_of(tmp_path, "shared")["throughput"]
    assert throughput["total_gen_tokens"] == sum(
        sample["token_counts"][0]["output_tokens"] for sample in samples_of(tmp_path, "shared", "demo_images")
    )


READ = """
import json, sys, zlib
from dataclasses import asdict
from pathlib import Path
from nanovlm_v2drop.processing.video import FpsSampling, UniformSampling, read_frames
from nanovlm_v2drop.processing.video_file import inspect_video
import av
read = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    frames = [zlib.crc32(frame.tobytes()) for way in (UniformSampling(5), FpsSampling()) for frame in read_frames(path, way)]
    read[path.name] = [str(asdict(inspect_video(path))), frames]
print(json.dumps([av.__version__, read]))
"""


def test_videos_are_read_alike_with_both_versions_of_pyav(tasks: Path, tmp_path: Path) -> None:
    write_numbered(tmp_path / "plain.mp4", 30)
    write_numbered(tmp_path / "plain.webm", 30, codec="libvpx")
    write_numbered(tmp_path / "plain.mkv", 30, codec="ffv1", pix_fmt="bgr0")
    for degrees in (90, 180):
        write_numbered(tmp_path / f"turned-{degrees}.mp4", 12, rotation=degrees)
    whole = (tmp_path / "plain.webm").read_bytes()
    (tmp_path / "unfinished.webm").write_bytes(whole[: 2 * len(whole) // 3])
    (here, read), (there, read_there) = (
        json.loads(subprocess.run([python, "-c", READ, tmp_path], check=True, capture_output=True, cwd=ROOT).stdout)
        for python in (sys.executable, PYTHON)
    )
    assert here.partition(".")[0] != there.partition(".")[0]
    assert read == read_there
