"""The command line as users run it, on the shipped demo."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_rows import rows_of, write_rows
from safetensors.torch import load_file, save_file
from tiny_tasks import OWN_METHOD, mme_rows, pope_rows, write_shards

from nanovlm_v2drop import cli
from nanovlm_v2drop.dropping import DROPPERS

ROOT = Path(__file__).parents[1]
FILE = "model.safetensors"


ROW_KEYS = {
    "method", "task", "schedule", "vision_tokens", "mean_vision_tokens", "score", "relative_score", "samples",
    "prefill_ms", "decode_ms_per_token", "prefill_tflops", "kv_cache_mb", "peak_memory_mb", "seed",
}  # fmt: skip


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; wrong options end in SystemExit, as argparse does it."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_script_ends_with_one_json_line_and_leaves_answers_summary_and_report(tmp_path):
    command = [sys.executable, ROOT / "train_free_eval.py", "--limit", "6", "--output", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"model", "device", "dtype", "attention", "results"} <= set(result)
    budgets = [(method, budget) for budget in (48.0, 32.0, 16.0) for method in ("v2drop", "random")]
    assert [(row["method"], row["asked_tokens"]) for row in result["results"]] == [("dense", None), *budgets]
    for row in result["results"]:
        assert set(row) >= ROW_KEYS
        assert row["asked_tokens"] is None or abs(row["mean_vision_tokens"] - row["asked_tokens"]) <= 0.5
    first, *_, report, _ = done.stdout.splitlines()
    assert first == f"output: {tmp_path / 'run'}"
    assert report == f"report: {tmp_path / 'run' / 'report.html'}"
    assert "demo: 6 questions x 13 runs = 78 answers; 3 seeds" in done.stdout
    assert "prefill  speed-" in done.stdout
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 6 * (1 + 3 + 3 * 3)  # three seeds of Random
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result
    assert [(entry["method"], entry["asked_tokens"]) for entry in result["position_bias"]] == budgets
    galleries = json.loads((tmp_path / "run" / "galleries.json").read_text())
    assert len(galleries) == 4
    stages = [(row["method"], len(row["stages"])) for row in galleries[0]["rows"]]
    assert stages == [("dense", 0), *[("v2drop", 3), ("random", 3)] * 3]
    assert all(stage["tokens"] == len(stage["kept"]) for row in galleries[0]["rows"] for stage in row["stages"])
    assert "What" in (tmp_path / "run" / "report.html").read_text()


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, capsys):
    options = ["--methods", "dense,v2drop", "--tokens", "32", "--limit", "4", "--output", tmp_path]
    assert run(capsys, *options)[0] == 0
    file = tmp_path / "samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5]) + lines[5][:20])  # killed in the middle of the sixth line
    code, _, error = run(capsys, *options)
    assert code == 2
    assert "already holds answers to demo; go on with --resume" in error
    assert run(capsys, *options, "--resume")[0] == 0
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["plan"], r["sample_id"]) for r in again] == [(r["plan"], r["sample_id"]) for r in map(json.loads, lines)]
    assert [json.loads(line) for line in lines[:5]] == again[:5]


def test_pope_and_mme_run_from_local_parquet_files(tmp_path, capsys):
    write_shards(tmp_path / "data" / "POPE", pope_rows())
    write_shards(tmp_path / "data" / "MME", mme_rows())
    options = ["--tasks", "pope,mme", "--data", tmp_path / "data", "--methods", "dense,v2drop", "--tokens", "48"]
    code, out, _ = run(capsys, *options, "--limit", 28, "--output", tmp_path / "run")
    assert code == 0
    rows = json.loads(out.splitlines()[-1])["results"]
    assert [(row["task"], row["method"], row["samples"]) for row in rows] == [
        (task, method, count) for task, count in (("pope", 24), ("mme", 28)) for method in ("dense", "v2drop")
    ]
    assert {"f1", "f1_mean_of_categories", "exact_accuracy"} <= set(rows[0]["metrics"])
    assert {"perception", "cognition"} <= set(rows[2]["metrics"])
    assert all(low <= row["score"] <= high for row in rows for low, high in [row["score_interval"]])
    galleries = json.loads((tmp_path / "run" / "galleries.json").read_text())
    assert [gallery["task"] for gallery in galleries] == ["pope"] * 4 + ["mme"] * 4


@pytest.mark.slow
def test_the_papers_benchmarks_run_from_local_files_and_end_with_their_average(tmp_path, capsys):
    tasks = {"gqa": "GQA", "scienceqa": "ScienceQA", "textvqa": "textvqa", "pope": "POPE", "mme": "MME", "mmbench": "MMBench"}
    for task, folder in tasks.items():
        write_rows(tmp_path / "data" / folder, task, rows_of(task, 8))
    options = ["--tasks", "paper-image", "--data", tmp_path / "data", "--methods", "dense,v2drop", "--retain", "0.333"]
    code, out, error = run(capsys, *options, "--limit", 4, "--batch-size", 4, "--output", tmp_path / "run")
    assert code == 0, error
    rows = json.loads(out.splitlines()[-1])["results"]
    assert list(dict.fromkeys(row["task"] for row in rows)) == ["gqa", "scienceqa", "textvqa-ocr", "pope", "mme", "mmbench"]
    assert set(rows[6]["metric_intervals"]) >= {"f1_mean_of_categories", "exact_accuracy"}
    table = out.partition("paper-image: 6 benchmarks; average of the percentages of dense")[2]
    assert [line.split()[0] for line in table.splitlines()[1:] if line[:6] in ("dense ", "v2drop")] == ["dense", "v2drop"]
    (averaged,) = json.loads(out.splitlines()[-1])["averages"]
    assert [(line["label"], line["interval"] is None) for line in averaged["rows"]] == [
        (line["label"], line["average"] is None) for line in averaged["rows"]
    ]
    assert f"{averaged['name']}: average of the percentages of dense" in (tmp_path / "run" / "report.html").read_text()
    assert "the paper has no line for demo with these methods and budgets (see --paper)" in table


@pytest.mark.slow
def test_the_papers_video_benchmarks_run_from_local_files_and_end_with_their_average(tmp_path, capsys):
    pytest.importorskip("av")
    clip = (ROOT / "weights" / "demo-video" / "clip.mp4").read_bytes()
    for task, folder in (("mvbench", "MVBench"), ("videomme", "Video-MME")):
        write_rows(tmp_path / "data" / folder, task, rows_of(task, 20), clip=clip)
    options = ["--model", "demo-video", "--tasks", "paper-video", "--data", tmp_path / "data", "--methods", "dense,v2drop"]
    code, out, error = run(capsys, *options, "--retain", "0.25", "--limit", 4, "--output", tmp_path / "run")
    assert code == 0, error
    rows = json.loads(out.splitlines()[-1])["results"]
    assert [(row["task"], row["method"], row["samples"]) for row in rows] == [
        (task, method, 4) for task in ("mvbench", "videomme") for method in ("dense", "v2drop")
    ]
    assert set(rows[2]["metric_intervals"]) == {"short", "medium", "long"}
    assert rows[0]["vision_tokens"] > rows[1]["mean_vision_tokens"] > 0
    table = out.partition("paper-video: 2 benchmarks; average of the percentages of dense")[2]
    assert [line.split()[0] for line in table.splitlines()[1:] if line[:6] in ("dense ", "v2drop")] == ["dense", "v2drop"]
    (averaged,) = json.loads(out.splitlines()[-1])["averages"]
    assert [(line["label"], line["interval"] is None) for line in averaged["rows"]] == [
        (line["label"], line["average"] is None) for line in averaged["rows"]
    ]
    assert f"{averaged['name']}: average of the percentages of dense" in (tmp_path / "run" / "report.html").read_text()


def test_the_papers_tables_fit_a_terminal_of_80_columns(capsys, monkeypatch):
    monkeypatch.setattr("nanovlm_v2drop.cli.paper.WIDTH", 80)
    assert "\N{HORIZONTAL ELLIPSIS}" not in run(capsys, "--paper")[1]


def test_the_papers_tables_are_printed_alone(capsys):
    assert run(capsys, "--paper", "--model", "qwen2-vl-7b")[1].count("Qwen2-VL-7B") == 2
    code, out, _ = run(capsys, "--paper")
    assert code == 0
    assert [table for table in range(1, 5) if f"table {table}" not in out] == []
    v2drop = next(line for line in out.splitlines() if line.startswith("192") and "V2Drop" in line)
    assert v2drop.split()[5:] == ["58.5", "69.3", "55.6", "85.1", "1826", "63.7", "97.6"]
    code, _, error = run(capsys, "--paper", "--model", "smolvlm-256m")
    assert code == 2
    assert error.startswith("nanovlm-v2drop: the paper has no results for smolvlm-256m; it has some for: llava-1.5-7b, ")


def test_a_run_with_other_settings_does_not_go_on_with_these_answers(tmp_path, capsys):
    options = ["--methods", "dense", "--limit", "1", "--output", tmp_path]
    run(capsys, *options)
    code, _, error = run(capsys, *options, "--resume", "--image-aspect-ratio", "crop")
    assert code == 2
    assert "image_aspect_ratio='pad'" in error
    assert "choose another --output" in error


def test_answers_made_with_other_frames_or_other_weights_are_not_gone_on_with(tmp_path, capsys):
    options = ["--methods", "dense", "--limit", "1", "--output", tmp_path / "run"]
    clips = [*options, "--model", "demo-video"]
    assert run(capsys, *clips, "--frames", 8)[0] == 0
    code, _, error = run(capsys, *clips, "--frames", 4, "--resume")
    assert code == 2
    assert "sampling UniformSampling(num_frames=8), not UniformSampling(num_frames=4); choose another --output" in error
    copy = tmp_path / "copies" / "demo-video"
    shutil.copytree(ROOT / "weights" / "demo-video", copy)
    resumed = [*options, "--model", copy, "--frames", 8, "--resume"]
    assert run(capsys, *resumed)[0] == 0  # the same weights in another folder are the same weights
    changed = {name: tensor + 0.5 if "layers.3.mlp" in name else tensor for name, tensor in load_file(copy / FILE).items()}
    save_file(changed, copy / FILE)
    code, _, error = run(capsys, *resumed)
    assert code == 2
    assert re.search(r"holds answers made with weights sha256:\w+, not sha256:\w+; choose another --output", error)


def test_answers_whose_settings_were_noted_before_sampling_was_are_not_gone_on_with(tmp_path, capsys):
    options = ["--methods", "dense", "--limit", "1", "--output", tmp_path]
    run(capsys, *options)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings.pop("sampling") == "UniformSampling(num_frames=32)"
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    code, _, error = run(capsys, *options, "--resume")
    assert code == 2
    assert "holds answers made with sampling not noted, not UniformSampling(num_frames=32); choose another --output" in error


@pytest.mark.parametrize(
    ("first", "then"),
    [(["--methods", "random", "--seeds", 1], ["--seeds", 2]), (["--methods", "dense"], ["--methods", "dense,v2drop"])],
)
def test_a_smaller_run_that_goes_on_with_a_larger_one_compares_its_own_samples_only(first, then, tmp_path, capsys):
    options = ["--tokens", "60", "--output", tmp_path, *first]
    assert run(capsys, *options, "--limit", 12)[0] == 0
    code, out, _ = run(capsys, *options, *then, "--limit", 6, "--resume")
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert {row["samples"] for row in result["results"]} == {6}
    assert len({row["relative_score"] is None for row in result["results"]}) == 1
    galleries = json.loads((tmp_path / "galleries.json").read_text())
    assert len({len(gallery["rows"]) for gallery in galleries}) == 1


def test_a_batch_gives_the_same_answers_as_one_by_one(tmp_path, capsys):
    texts = []
    for size in (1, 5):
        options = ("--retain", "0.25", "--seeds", 1, "--methods", "dense,v2drop,random")
        run(capsys, "--limit", 10, "--batch-size", size, *options, "--output", tmp_path / str(size))
        lines = (tmp_path / str(size) / "samples.jsonl").read_text().splitlines()
        texts.append({(r["plan"], r["sample_id"]): (r["text"], r["kept"]) for r in map(json.loads, lines)})
    assert texts[0] == texts[1]
    assert len(texts[0]) == 30


def test_all_methods_run_at_equal_budgets_or_say_their_floor(tmp_path, capsys):
    code, out, _ = run(capsys, "--methods", "all", "--limit", 2, "--seeds", 1, "--output", tmp_path)
    assert code == 0
    rows = json.loads(out.splitlines()[-1])["results"]
    assert {row["method"] for row in rows} == {"dense", *DROPPERS}
    for row in rows[1:]:
        assert abs(row["mean_vision_tokens"] - row["asked_tokens"]) <= 1 or row["note"].startswith("cannot go below")
    assert "dycoke 48: cannot go below 144.0 mean tokens" in out


def test_published_settings_run_with_what_they_really_cost(tmp_path, capsys):
    options = ["--methods", "fastv,v2drop", "--accounting", "official", "--limit", 2, "--output", tmp_path]
    code, out, _ = run(capsys, *options)
    assert code == 0
    rows = {row["label"]: row for row in json.loads(out.splitlines()[-1])["results"]}
    assert rows["fastv K=2 R=50%"]["mean_vision_tokens"] == round((144 + 11 * 72) / 12, 2)
    assert rows["v2drop paper-64"]["asked_tokens"] is None
    assert "mapped from 32 layers and 576 tokens" in out


def test_published_settings_of_dycoke_run_on_clips_and_leave_pictures_alone(tmp_path, capsys):
    options = ["--methods", "dense,dycoke", "--accounting", "official", "--limit", 1]
    for model, mean, note in (("demo-video", 159, "mapped from frames of 196 tokens"), ("demo", 144, "for videos: ")):
        code, out, _ = run(capsys, "--model", model, *options, "--output", tmp_path / model)
        assert code == 0
        rows = {row["label"]: row for row in json.loads(out.splitlines()[-1])["results"]}
        assert rows["dycoke K=0.7"]["mean_vision_tokens"] == mean
        assert note in rows["dycoke K=0.7"]["note"]


def test_an_ablation_stands_beside_the_papers_numbers(tmp_path, capsys):
    code, out, _ = run(capsys, "--ablation", "metric,steps", "--limit", 2, "--output", tmp_path)
    assert code == 0
    rows = json.loads(out.splitlines()[-1])["results"]
    assert [row["label"].removeprefix("v2drop ") for row in rows] == ["dense", "l2", "l1", "cosine", "progressive", "one-shot"]
    assert rows[3]["paper"] == {"MME": 1718, "GQA": 55.2, "MMB": 61.8, "SQA": 69.2}
    assert json.loads((tmp_path / "summary.json").read_text())["panels"] == {
        "metric": ["v2drop l2", "v2drop l1", "v2drop cosine"],
        "steps": ["v2drop progressive", "v2drop one-shot"],
    }
    assert "the paper's numbers" not in out


def test_a_method_of_ones_own_runs_from_its_file(tmp_path, capsys):
    file = tmp_path / "my_method.py"
    file.write_text(OWN_METHOD)
    code, out, _ = run(capsys, "--methods", f"dense,{file}:Own", "--tokens", 32, "--limit", 2, "--output", tmp_path / "run")
    assert code == 0
    assert [row["method"] for row in json.loads(out.splitlines()[-1])["results"]] == ["dense", "own"]


def test_a_method_that_scores_nan_ends_in_one_line_and_exit_code_2(tmp_path, capsys):
    file = tmp_path / "my_method.py"
    file.write_text(OWN_METHOD.replace("norm(dim=-1)", "norm(dim=-1) * float('nan')"))
    code, _, error = run(capsys, "--methods", f"{file}:Own", "--tokens", 32, "--limit", 1, "--output", tmp_path / "run")
    assert code == 2
    assert "nanovlm-v2drop: own scored a vision token NaN: it divides by zero, or activations overflow" in error
    assert "Traceback" not in error


def test_missing_weights_end_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, out, error = run(capsys, "--model", "llava-1.5-7b", "--tasks", "demo", "--output", tmp_path / "run")
    assert code == 2
    assert out == ""
    assert len(error.strip().splitlines()) == 1
    assert "llava-hf/llava-1.5-7b-hf" in error
    assert "--weights" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "5"], "a mean of 5 vision tokens is out of reach"),
        (["--tokens", "145"], "lies between 12.9 and 144"),
        (["--attention", "varlen"], "needs a CUDA device"),
        (["--max-pixels", "100"], "max_pixels 100 has no meaning for demo"),
        (["--frames", "3"], "demo takes pictures only"),
        (["--tasks", "videomme"], "--tasks videomme: demo takes pictures only; models that take a video: demo-video"),
        (["--image", str(ROOT / "weights/demo/report.png"), "--prompt", " "], "--prompt ' ' is blank"),
        (["--image", str(ROOT / "weights/demo/config.json"), "--prompt", "What?"], "cannot read"),
    ],
)
def test_what_a_model_cannot_use_is_one_line_with_exit_code_2(arguments, message, tmp_path, capsys):
    limit = [] if "--image" in arguments else ["--limit", 1]
    code, _, error = run(capsys, *arguments, *limit, "--output", tmp_path / "run")
    assert code == 2
    (line,) = error.splitlines()
    assert line.startswith("nanovlm-v2drop: ")
    assert message in line


@pytest.mark.slow
def test_the_demo_reaches_its_accuracies_and_is_sensitive_to_random_dropping(tmp_path, capsys):
    _, out, _ = run(capsys, "--batch-size", 8, "--output", tmp_path)
    rows = {(row["method"], row["asked_tokens"]): row for row in json.loads(out.splitlines()[-1])["results"]}
    dense = rows["dense", None]["metrics"]
    assert dense["existence"] >= 95
    assert dense["score"] >= 90
    assert rows["random", 16.0]["relative_interval"][1] < 90
