"""Measure what dropping vision tokens costs and saves, without any training.

    python train_free_eval.py                                             the shipped demo model
    python train_free_eval.py --model demo-video                          the shipped video model, every method
    python train_free_eval.py --methods all                               every method at equal budgets
    python train_free_eval.py --methods all --accounting official         every method with its published settings
    python train_free_eval.py --ablation metric,layers,steps,schedules    the paper's ablations
    python train_free_eval.py --claims                                    the paper's claims, each with a verdict
    python train_free_eval.py --model llava-1.5-7b --tasks pope,mme       official weights, from the Hugging Face Hub
    python train_free_eval.py --model llava-1.5-7b --weights DIR --data DIR   the same from local folders
    python train_free_eval.py --image photo.jpg --prompt "What is this?" --tokens 48
    python train_free_eval.py --model demo-video --video clip.mp4 --prompt "What moves?" --retain 0.25
    torchrun --nproc-per-node 8 train_free_eval.py                        the samples over 8 processes, a GPU each
    torchrun --nproc-per-node 8 train_free_eval.py --tensor-parallel 4    over two replicas, of four processes each

The last line of stdout is one JSON object; results/<run>/ gets report.html, a summary, and one JSON line an answer.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from .dropping import DROPPERS, NotANumber
from .evaluation.evaluate import (
    Record,
    evaluate,
    machine_name,
    read_records,
    run_summary,
    summarise,
    summarise_bias,
)
from .evaluation.plans import (
    ALL,
    DENSE,
    Plan,
    Shape,
    equal_budget_plans,
    first_seeds,
    official_plans,
    prompt_shape,
)
from .inference import MAX_NEW_TOKENS, generate
from .loading.checkpoint import CheckpointError
from .loading.zoo import DTYPES, MODELS, VisionLanguageModel, WeightsUnavailable, load
from .models.attention import BACKENDS
from .models.parallel import ALONE, Processes, join_processes, leave_processes
from .processing.images import ASPECT_RATIOS, DEFAULT_ASPECT_RATIO
from .processing.prompts import TEMPLATES, Request
from .processing.video import UniformSampling
from .report.gallery import GalleryRow, board_of, describe_gallery, draw_gallery
from .report.page import write_page
from .report.tables import print_findings, print_run
from .research.ablations import ABLATIONS, ablation_plans
from .research.claims import find_claims, not_the_demo
from .tasks import TASKS, DatasetUnavailable, Sample, Task, load_task

ACCOUNTINGS = ("equal", "official")
RETAIN = (1 / 3, 2 / 9, 1 / 9)  # 192, 128 and 64 of 576 tokens, the paper's three budgets
RETAIN_OF_VIDEO = (0.25, 0.15)  # the largest and the smallest of the paper's for LLaVA-OneVision on video
REPORTED = (WeightsUnavailable, DatasetUnavailable, CheckpointError, NotANumber, ValueError, OSError, ImportError)
IGNORED = {  # option -> what would have no effect beside it
    "accounting": ("tokens", "retain"),
    "ablation": ("methods", "accounting", "tokens", "retain", "seed", "seeds"),
    "claims": ("prompt", "image", "video", "methods", "accounting", "ablation", "tasks", "tokens", "retain", "seed", "seeds"),
    "prompt": ("tasks", "data", "limit", "batch_size", "resume"),
}
PICTURES = 4  # samples whose kept tokens are drawn


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo", help=f"one of {', '.join(MODELS)}, or a folder with an official checkpoint")
    add("--weights", type=Path, help="folder with the official checkpoint of --model, instead of the Hub")
    add("--data", type=Path, help="folder with the benchmarks' parquet files, instead of the Hub")
    methods = f"from {', '.join([DENSE, *DROPPERS])}; {ALL}; or your own as FILE.py:CLASS"
    add("--methods", type=names, help=f"{methods}; default dense,v2drop,random, and {ALL} for demo-video")
    add("--accounting", choices=ACCOUNTINGS, default=ACCOUNTINGS[0], help="equal budgets, or each method's published settings")
    add("--ablation", type=names, help=f"the paper's ablations instead of methods, from {', '.join(ABLATIONS)}")
    add("--tasks", type=names, help=f"from {', '.join(TASKS)}; default demo for the demo model, else pope,mme")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--tokens", type=numbers, help="budgets: mean vision tokens a layer, e.g. 192,128,64")
    shares = "budgets as shares of the prompt's vision tokens; default 1/3, 2/9, 1/9, and 0.25, 0.15 for video"
    budget.add_argument("--retain", type=numbers, help=shares)
    add("--limit", type=int, help="samples of each task")
    add("--batch-size", type=int, default=1, help="samples that go through one packed prefill")
    add("--claims", action="store_true", help="put the paper's claims to the test on the demo; takes some minutes")
    add("--seed", type=int, default=0, help="the first seed of methods that draw at random")
    add("--seeds", type=int, default=3, help="how many seeds, whose answers share a row")
    add("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--tensor-parallel", type=int, default=1, help="processes that share a decoder, of those that torchrun starts")
    add("--dtype", choices=DTYPES, help="default float32 on a CPU, bfloat16 on a GPU")
    add("--attention", choices=("auto", *BACKENDS), default="auto")
    add("--compile", action="store_true", help="compile the decoder's layers with torch.compile; takes a minute at first")
    add("--image-aspect-ratio", choices=ASPECT_RATIOS, default=DEFAULT_ASPECT_RATIO, help="pad as the papers, crop as llava-hf")
    add("--template", choices=TEMPLATES, help="prompt template; default the model's own")
    add("--output", type=Path, help="default results/<model>-<time>")
    add("--resume", action="store_true", help="go on with the answers that --output already holds")
    add("--image", help="answer --prompt about this picture, with and without dropping, and draw what was kept")
    add("--video", help="the same about a video file")
    add("--prompt", help="the question about --image or --video")
    add("--max-pixels", type=int, help="the most that Qwen2-VL leaves of a picture or frame; default the checkpoint's own")
    add("--frames", type=int, help="frames of a video, evenly spaced; default as the model was released with")
    arguments = parser.parse_args(argv)
    check_conflicts(parser, arguments)
    arguments.methods = arguments.methods or default_methods(arguments.model)
    if (arguments.image is None and arguments.video is None) != (arguments.prompt is None):
        parser.error("--image or --video belongs together with --prompt")
    if arguments.resume and arguments.output is None:
        parser.error("--resume needs the --output of the run to go on with")
    for name in ("limit", "batch_size", "seeds", "frames", "tensor_parallel"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    return arguments


def check_conflicts(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with an error where an option would be ignored beside another."""
    given = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
    for name, others in IGNORED.items():
        ignored = [f"--{other.replace('_', '-')}" for other in others if other in given]
        if name in given and ignored:
            parser.error(f"beside --{name} {', '.join(ignored)} would be ignored; leave one of them out")


def names(text: str) -> list[str]:
    """Separated by commas; one at least."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("nothing is named")
    return found


def device_name(text: str) -> str:
    try:
        return str(torch.device(text))
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"unknown device {text!r}; cpu, cuda or cuda:N") from error


def numbers(text: str) -> list[float]:
    return [float(number) for number in names(text)]


def main(argv: Sequence[str] | None = None) -> int:
    arguments, processes = parse_arguments(argv), ALONE
    try:
        processes = join_processes(torch.device(arguments.device).type, arguments.tensor_parallel)
        arguments.device = processes.device(arguments.device)
        run = run_mode(arguments, processes)
    except REPORTED as error:
        print(f"nanovlm-v2drop: {rank_of(processes)}{error}", file=sys.stderr)
        return 2
    if processes.is_first:
        print(json.dumps(run))
    leave_processes()
    return 0


def rank_of(processes: Processes) -> str:
    return "" if processes.world_size == 1 else f"process {processes.rank}: "


def run_mode(arguments: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """What the last line of stdout says, of which the first process alone knows the results."""
    asks = arguments.prompt is not None
    if not asks and not arguments.claims:
        return evaluate_tasks(arguments, processes)
    if arguments.claims and processes.world_size > 1:
        raise ValueError("--claims is for one process; start train_free_eval.py without torchrun")
    if processes.replicas > 1:
        raise ValueError(
            f"one question keeps one decoder busy, not {processes.replicas}: start train_free_eval.py without torchrun, "
            f"or share the decoder with --tensor-parallel {processes.world_size}"
        )
    return answer_one(arguments, processes) if asks else ledger(arguments)


def load_model(arguments: argparse.Namespace) -> VisionLanguageModel:
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    vlm = load(
        arguments.model,
        device=arguments.device,
        dtype=DTYPES[dtype],
        image_aspect_ratio=arguments.image_aspect_ratio,
        template=arguments.template,
        attention=arguments.attention,
        weights=arguments.weights,
        max_pixels=arguments.max_pixels,
        sampling=UniformSampling(arguments.frames) if arguments.frames else None,
        tensor_parallel=arguments.tensor_parallel,
    )
    if arguments.compile:
        vlm.model.language_model.compile_layers()
    return vlm


def plans_for(shape: Shape, arguments: argparse.Namespace) -> list[Plan]:
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    if arguments.ablation:
        return ablation_plans(arguments.ablation, shape)
    if arguments.accounting == "official":
        return official_plans(arguments.methods, shape, seeds)
    shares = arguments.retain or (RETAIN_OF_VIDEO if shape.frames > 1 else RETAIN)
    budgets = arguments.tokens or [round(share * shape.num_vision_tokens, 2) for share in shares]
    return equal_budget_plans(arguments.methods, budgets, shape, seeds)


def output_folder(arguments: argparse.Namespace) -> Path:
    name = Path(arguments.model).name
    return arguments.output or Path("results") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def evaluate_tasks(arguments: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Run every task; the first process prints the tables, leaves results behind, and returns the last line of stdout."""
    tasks = [load_task(name, arguments.data) for name in arguments.tasks or default_tasks(arguments.model)]
    vlm = load_model(arguments)
    output, plans = processes.agreed(output_folder(arguments)), {}  # its default name holds the time
    about = run_summary(vlm, [])
    if processes.is_first:
        print(", ".join(f"{name} {about[name]}" for name in ("model", "device", "dtype", "attention", "decode_attention")))
    shown, sample_ids = dict[str, list[Sample]](), dict[str, list[str]]()
    for task in tasks:
        plans[task.name] = plans_for(prompt_shape(vlm, task.first_sample().request), arguments)
        shown[task.name], sample_ids[task.name] = run_task(vlm, task, plans[task.name], output, arguments, processes)
    if not processes.is_first:
        return about
    records = read_records(output, sample_ids)
    galleries = [row for task in tasks for row in describe_galleries(vlm, task, shown[task.name], plans[task.name], records)]
    rows = [row for task in tasks for row in summarise(vlm, task, plans[task.name], records)]
    bias = [entry for task in tasks for entry in summarise_bias(task, plans[task.name], records)]
    print_run(rows, bias, Console(width=None if sys.stdout.isatty() else 140))
    run = {
        **run_summary(vlm, rows),
        **provenance(vlm, arguments),
        "processes": processes.world_size,
        "tensor_parallel": processes.tensor_parallel,
        "position_bias": bias,
        "output": str(output),
    }
    for name, content in (("summary.json", run), ("galleries.json", galleries)):
        (output / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"report: {write_page(output)}")
    return run


def provenance(vlm: VisionLanguageModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is needed to make these numbers again."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "accounting": arguments.accounting,
        "ablation": arguments.ablation,
        "machine": machine_name(vlm.device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("nanovlm-v2drop", "torch")}},
    }


def default_methods(model: str) -> list[str]:
    return [ALL] if Path(model).name == "demo-video" else [DENSE, "v2drop", "random"]


def default_tasks(model: str) -> list[str]:
    name = Path(model).name
    return [name] if name in ("demo", "demo-video") else ["pope", "mme"]


def run_task(
    vlm: VisionLanguageModel,
    task: Task,
    plans: list[Plan],
    output: Path,
    arguments: argparse.Namespace,
    processes: Processes,
) -> tuple[list[Sample], list[str]]:
    """Answer one task with a progress bar on stderr; the first samples, of which is drawn what was kept, and the ids of all."""
    options = {"limit": arguments.limit, "batch_size": arguments.batch_size, "resume": arguments.resume}
    samples = evaluate(vlm, task, plans, output, **options, processes=processes)
    total, description = arguments.limit or task.default_samples, f"{vlm.name} on {task.name}"
    shown, sample_ids = list[Sample](), list[str]()
    console = Console(stderr=True)
    for sample in track(samples, description=description, total=total, console=console, disable=not processes.is_first):
        shown += [sample] if len(shown) < PICTURES else []
        sample_ids.append(sample.sample_id)
    return shown, sample_ids


def describe_galleries(
    vlm: VisionLanguageModel, task: Task, shown: Sequence[Sample], plans: list[Plan], records: Sequence[Record]
) -> list[dict[str, Any]]:
    """What each plan kept of the samples."""
    found = {(record.plan, record.sample_id): record for record in records if record.task == task.name}
    num_layers = vlm.config.text_config.num_hidden_layers
    return [
        describe_gallery(
            task.name,
            sample,
            board_of(vlm, sample.request),
            [(plan, found[plan.key, sample.sample_id]) for plan in first_seeds(plans)],
            num_layers,
        )
        for sample in shown
    ]


def ledger(arguments: argparse.Namespace) -> dict[str, Any]:
    """The ledger of the paper's claims on the demo, printed and as rows."""
    if arguments.model in MODELS and arguments.model != "demo":
        raise not_the_demo(arguments.model)  # before gigabytes are fetched
    vlm, output = load_model(arguments), output_folder(arguments)
    findings = list(find_claims(vlm, load_task("demo"), output, arguments.limit))
    print_findings(findings, Console(width=None if sys.stdout.isatty() else 180))
    run = {**run_summary(vlm, [asdict(finding) for finding in findings]), **provenance(vlm, arguments)}
    (output / "claims.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    return run


def answer_one(arguments: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """One question about one picture or video with every method and budget; prints the answers and draws what was kept."""
    vlm = load_model(arguments)
    images = [] if arguments.image is None else [arguments.image]
    request = Request(text=arguments.prompt, images=images, video=arguments.video)
    drawn, results = [], []
    for plan in first_seeds(plans_for(prompt_shape(vlm, request), arguments)):
        with plan.floor_allowed():
            (answer,) = generate(vlm, [request], plan.dropper, max_new_tokens=MAX_NEW_TOKENS)
        if processes.is_first:
            print(f"{plan.row:>20}  {answer.text}" + (f"   ({plan.note})" if plan.note else ""))
        drawn.append(GalleryRow(plan.row, answer.text, [(layer, kept.tolist()) for layer, kept in answer.kept]))
        results.append({"method": plan.method, "asked_tokens": plan.asked_tokens, "text": answer.text})
    if not processes.is_first:
        return run_summary(vlm, results)
    path = output_folder(arguments) / "kept.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_gallery(board_of(vlm, request), arguments.prompt, drawn).save(path)
    print(f"kept tokens: {path}")
    return {**run_summary(vlm, results), "picture": str(path)}


if __name__ == "__main__":
    sys.exit(main())
