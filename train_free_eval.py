"""Measure what dropping vision tokens costs and saves, without any training.

    python train_free_eval.py                                             the shipped demo model
    python train_free_eval.py --model llava-1.5-7b --tasks pope,mme       official weights, from the Hugging Face Hub
    python train_free_eval.py --model llava-1.5-7b --weights DIR --data DIR   the same from local folders
    python train_free_eval.py --image photo.jpg --prompt "What is this?" --tokens 48

The last line of stdout is one JSON object; results/<run>/ gets one JSON line an answer, a summary and pictures.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from nanovlm_v2drop.attention import BACKENDS
from nanovlm_v2drop.checkpoint import CheckpointError
from nanovlm_v2drop.dropping import DROPPERS
from nanovlm_v2drop.evaluate import DENSE, Plan, evaluate, make_plans, read_records, run_summary, summarise
from nanovlm_v2drop.images import ASPECT_RATIOS, DEFAULT_ASPECT_RATIO, open_image
from nanovlm_v2drop.inference import MAX_NEW_TOKENS, generate
from nanovlm_v2drop.prompts import TEMPLATES, Request
from nanovlm_v2drop.report.gallery import GalleryRow, draw_gallery
from nanovlm_v2drop.report.tables import print_table
from nanovlm_v2drop.tasks import TASKS, DatasetUnavailable, Sample, Task, load_task
from nanovlm_v2drop.zoo import DTYPES, MODELS, VisionLanguageModel, WeightsUnavailable, load

RETAIN = (1 / 3, 2 / 9, 1 / 9)  # 192, 128 and 64 of 576 tokens, the paper's three budgets
PICTURES = 4  # samples whose kept tokens are drawn


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo", help=f"one of {', '.join(MODELS)}, or a folder with an official checkpoint")
    add("--weights", type=Path, help="folder with the official checkpoint of --model, instead of the Hub")
    add("--data", type=Path, help="folder with the benchmarks' parquet files, instead of the Hub")
    add("--methods", type=names, default=[DENSE, "v2drop", "random"], help=f"from {', '.join([DENSE, *DROPPERS])}")
    add("--tasks", type=names, help=f"from {', '.join(TASKS)}; default demo for the demo model, else pope,mme")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--tokens", type=numbers, help="budgets: mean vision tokens a layer, e.g. 192,128,64")
    budget.add_argument("--retain", type=numbers, help="budgets as shares of the picture's tokens; default 1/3, 2/9, 1/9")
    add("--limit", type=int, help="samples of each task")
    add("--batch-size", type=int, default=1, help="samples that go through one packed prefill")
    add("--seed", type=int, default=0, help="of random dropping")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="default float32 on a CPU, bfloat16 on a GPU")
    add("--attention", choices=("auto", *BACKENDS), default="auto")
    add("--image-aspect-ratio", choices=ASPECT_RATIOS, default=DEFAULT_ASPECT_RATIO, help="pad as the papers, crop as llava-hf")
    add("--template", choices=TEMPLATES, help="prompt template; default the model's own")
    add("--output", type=Path, help="default results/<model>-<time>")
    add("--resume", action="store_true", help="go on with the answers that --output already holds")
    add("--image", help="answer --prompt about this picture, with and without dropping, and draw what was kept")
    add("--prompt", help="the question about --image")
    arguments = parser.parse_args(argv)
    if (arguments.image is None) != (arguments.prompt is None):
        parser.error("--image and --prompt belong together")
    if arguments.resume and arguments.output is None:
        parser.error("--resume needs the --output of the run to go on with")
    for name in ("limit", "batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    return arguments


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str) -> list[float]:
    return [float(number) for number in names(text)]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        run = answer_one(arguments) if arguments.image else evaluate_tasks(arguments)
    except (WeightsUnavailable, DatasetUnavailable, CheckpointError, ValueError, FileNotFoundError, ImportError) as error:
        print(f"train_free_eval.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(run))
    return 0


def load_model(arguments: argparse.Namespace) -> VisionLanguageModel:
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    return load(
        arguments.model,
        device=arguments.device,
        dtype=DTYPES[dtype],
        image_aspect_ratio=arguments.image_aspect_ratio,
        template=arguments.template,
        attention=arguments.attention,
        weights=arguments.weights,
    )


def plans_for(vlm: VisionLanguageModel, arguments: argparse.Namespace) -> list[Plan]:
    per_picture = vlm.config.vision_config.num_patches
    budgets = arguments.tokens or [round(share * per_picture, 2) for share in arguments.retain or RETAIN]
    return make_plans(
        arguments.methods, budgets, per_picture, vlm.config.text_config.num_hidden_layers, arguments.seed
    )


def output_folder(arguments: argparse.Namespace) -> Path:
    name = Path(arguments.model).name
    return arguments.output or Path("results") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def evaluate_tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every task, print the tables, leave results behind; the returned object is the last line of stdout."""
    tasks = [load_task(name, arguments.data) for name in arguments.tasks or default_tasks(arguments.model)]
    vlm = load_model(arguments)
    plans, output = plans_for(vlm, arguments), output_folder(arguments)
    console = Console(stderr=True)
    about = run_summary(vlm, [])
    print(", ".join(f"{name} {about[name]}" for name in ("model", "device", "dtype", "attention", "decode_attention")))
    rows = []
    for task in tasks:
        rows += run_task(vlm, task, plans, output, arguments, console)
    print_table(rows, Console(width=None if sys.stdout.isatty() else 140))
    run = {**run_summary(vlm, rows), "command": " ".join(sys.argv), "output": str(output)}
    (output / "summary.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    return run


def default_tasks(model: str) -> list[str]:
    return ["demo"] if Path(model).name == "demo" else ["pope", "mme"]


def run_task(
    vlm: VisionLanguageModel, task: Task, plans: list[Plan], output: Path, arguments: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """Answer one task with a progress bar on stderr, draw the first samples, and return the table's rows."""
    samples = evaluate(
        vlm, task, plans, output, limit=arguments.limit, batch_size=arguments.batch_size, resume=arguments.resume
    )
    total = arguments.limit or task.default_samples
    shown: list[Sample] = []
    for sample in track(samples, description=f"{vlm.name} on {task.name}", total=total, console=console):
        shown += [sample] if len(shown) < PICTURES else []
    records = [record for record in read_records(output) if record.task == task.name]
    for sample in shown:
        answers = {record.plan: record for record in records if record.sample_id == sample.sample_id}
        rows = [
            GalleryRow(plan.key, answers[plan.key].text, list(zip(plan.schedule, answers[plan.key].kept, strict=True)))
            for plan in plans
        ]
        title = f"{sample.text.strip()} ({sample.answer})"
        save_gallery(vlm, sample.images[0], title, rows, output / f"{task.name}-{sample.sample_id.replace('/', '-')}.png")
    return summarise(vlm, task, plans, records)


def save_gallery(vlm: VisionLanguageModel, image: Any, question: str, rows: list[GalleryRow], path: Path) -> None:
    picture = vlm.image_processor.to_square(open_image(image))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_gallery(picture, question, rows, vlm.config.vision_config.grid_size).save(path)


def answer_one(arguments: argparse.Namespace) -> dict[str, Any]:
    """One question about one picture with every method and budget; prints the answers and draws what was kept."""
    vlm = load_model(arguments)
    request = Request(text=arguments.prompt, images=[arguments.image])
    drawn, results = [], []
    for plan in plans_for(vlm, arguments):
        (answer,) = generate(vlm, [request], plan.dropper, max_new_tokens=MAX_NEW_TOKENS)
        print(f"{plan.key:>16}  {answer.text}")
        drawn.append(GalleryRow(plan.key, answer.text, [(layer, kept.tolist()) for layer, kept in answer.kept]))
        results.append({"method": plan.method, "asked_tokens": plan.asked_tokens, "text": answer.text})
    path = output_folder(arguments) / "kept.png"
    save_gallery(vlm, arguments.image, arguments.prompt, drawn, path)
    print(f"kept tokens: {path}")
    return {**run_summary(vlm, results), "picture": str(path)}


if __name__ == "__main__":
    sys.exit(main())
