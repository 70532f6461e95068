"""The options, their types and limits. Nothing here imports torch, so that `--help` and errors appear at once."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..evaluation.method_names import ALL, DENSE, parse_methods, parse_number
from ..evaluation.paper import PAPER_TASKS, expanded
from ..loading.specs import AUTO, MODELS, TEXT_MODEL, find_spec
from . import choices

DESCRIPTION = """Measure what dropping vision tokens costs and saves, without any training.

  nanovlm-v2drop                            the shipped demo model
  nanovlm-v2drop --model demo-video         shipped video model, every method
  nanovlm-v2drop --methods all              every method at equal budgets
  nanovlm-v2drop --methods all --accounting official
                                            every method as it was published
  nanovlm-v2drop --ablation metric,layers   the paper's ablations
  nanovlm-v2drop --claims                   the paper's claims with verdicts
  nanovlm-v2drop --claims --model llava-1.5-7b
                                            those on the paper's benchmarks
  nanovlm-v2drop --calibrate                drop layers for a model, measured
  nanovlm-v2drop --text                     the tokens of texts are dropped
  nanovlm-v2drop --model llava-1.5-7b --tasks pope,mme
                                            official weights, from the Hub
  nanovlm-v2drop --model llava-1.5-7b --tasks paper-image
                                            the paper's benchmarks and table
  nanovlm-v2drop --model llava-1.5-7b --weights DIR --data DIR
                                            the same from local folders
  nanovlm-v2drop --image photo.jpg --prompt "What is this?" --tokens 48
  nanovlm-v2drop --image photo.jpg --chat   one question after the other
  nanovlm-v2drop --conversations 120        what later questions still see
  nanovlm-v2drop --model demo-video --video clip.mp4 --prompt "What moves?"
  nanovlm-v2drop compare results/A results/B
                                            finished runs, paired by question
  torchrun --nproc-per-node 8 train_free_eval.py
                                            8 processes, one GPU each
  torchrun --nproc-per-node 8 train_free_eval.py --tensor-parallel 4
                                            two replicas of four processes each

The output folder gets samples.jsonl (one JSON line per answer), summary.json,
results.csv and report.html. If stdout is not a terminal, or with --json, the
last line of stdout is one JSON object with all numbers.
"""
ACCOUNTINGS, FORMATS = ("equal", "official"), ("table", "markdown", "latex", "csv")  # formats of a comparison
DEMOS = ("demo", "demo-video")
TOGETHER = 8  # prompts of --text, --calibrate and --conversations, whose prompts are much alike
SEEDS_OF_DEMOS, SEEDS = 3, 1  # a real model takes hours, so it draws once
IGNORED = {  # option -> options that would have no effect beside it
    "accounting": ("tokens", "retain"),
    "ablation": ("methods", "accounting", "tokens", "retain", "seed", "seeds"),
    "claims": ("prompt", "chat", "image", "video", "methods", "accounting", "ablation", "tokens", "retain", "seed", "seeds",
               "calibrate"),
    "text": ("claims", "calibrate", "prompt", "chat", "image", "video", "methods", "accounting", "ablation", "tasks", "tokens",
             "data", "seed", "seeds", "template", "max_pixels", "sampling", "frames", "image_aspect_ratio", "verbose",
             "compile", "tensor_parallel"),
    "conversations": ("prompt", "chat", "image", "video", "accounting", "ablation", "claims", "calibrate", "text", "tasks",
                      "data", "limit", "seed", "seeds", "output", "resume", "history"),
    "calibrate": ("chat", "methods", "accounting", "ablation", "seed", "seeds", "output", "resume", "verbose"),
    "prompt": ("chat", "tasks", "data", "limit", "batch_size", "resume"),
    "chat": ("tasks", "data", "limit", "batch_size", "resume", "accounting", "ablation", "json"),
}  # fmt: skip
LIMITS = {  # option -> smallest and largest value
    "limit": (1, 10_000_000),
    "batch_size": (1, 4096),
    "conversations": (2, 100_000),
    "seed": (0, 2**62),
    "seeds": (1, 1000),
    "frames": (1, 4096),
    "max_pixels": (1, 10**9),
    "tensor_parallel": (1, 1024),
}


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with the defaults that depend on the model; exits with status 2 and one line on stderr for wrong ones."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if not arguments.list_models and not arguments.paper:
        check_conflicts(parser, arguments)
        check_values(parser, arguments)
    if arguments.text and arguments.model == parser.get_default("model"):
        arguments.model = TEXT_MODEL
    demo = Path(arguments.model).name in DEMOS
    if arguments.claims and arguments.tasks and is_demo(arguments.model):
        parser.error("beside --claims --tasks would be ignored for the demo; leave it out, or name another --model")
    arguments.methods = arguments.methods or default_methods(arguments)
    usual = [Path(arguments.model).name] if demo else ["paper-image"] if arguments.claims else ["pope", "mme"]
    arguments.tasks = expanded(arguments.tasks or usual, arguments.model)
    arguments.seeds = arguments.seeds or (SEEDS_OF_DEMOS if demo else SEEDS)
    if arguments.text or arguments.calibrate or arguments.conversations:
        arguments.batch_size = arguments.batch_size or TOGETHER
    return arguments


def is_demo(model: str) -> bool:
    """Whether a model is the demo, whose claims have questions of their own."""
    return Path(model).name == "demo"


def parse_comparison(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `compare`; exits as `parse_arguments`."""
    about = "Scores of finished runs side by side, with differences that are paired by question."
    parser = OneLineParser(prog="nanovlm-v2drop compare", description=about)
    runs = "output folders of finished runs; the others are compared with the first"
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help=runs)
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    parser.add_argument("--report", type=path, metavar="FILE", help="write one page with the comparison and all runs")
    arguments = parser.parse_args(argv)
    # results/* also names the script that the reports of a folder share.
    arguments.runs = [run for run in arguments.runs if not run.match("plotly-*.min.js")]
    if len(arguments.runs) < 2:
        parser.error("give two runs or more")
    return arguments


def default_methods(arguments: argparse.Namespace) -> list[str]:
    if arguments.chat:
        return ["v2drop"]
    return [ALL] if Path(arguments.model).name == "demo-video" else [DENSE, "v2drop", "random"]


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser("nanovlm-v2drop", "%(prog)s [options]", DESCRIPTION)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_options(parser.add_argument_group("model"))
    add_comparison_options(parser.add_argument_group("what is compared"))
    add_question_options(parser.add_argument_group("one question, or a conversation"))
    add_output_options(parser.add_argument_group("output"))
    return parser


def add_model_options(group: argparse._ArgumentGroup) -> None:
    add, known = group.add_argument, choices.templates()
    add("--model", default="demo", type=model, help=f"one of {', '.join(MODELS)}; a Hub id; or a checkpoint's folder")
    add("--list-models", action="store_true", help="list the models: size, licence, and what they take")
    add("--weights", type=path, help="folder with the official checkpoint of --model, instead of the Hub")
    add("--device", type=device, help="cpu, cuda, cuda:N or mps; default cuda where there is a GPU, else cpu")
    add("--dtype", choices=choices.dtypes(), default=AUTO, help="default auto: by processor, memory and model size")
    add("--attention", choices=choices.attention_backends(), default="auto", help="attention back end; default auto")
    add("--kv-cache-dtype", choices=choices.kv_cache_dtypes(), default="auto", help="int8 halves the cache; default auto")
    add("--compile", action="store_true", help="compile the decoder's layers with torch.compile; takes a minute at first")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="processes, started by torchrun, that share a decoder")
    add("--image-aspect-ratio", choices=choices.aspect_ratios(), help="LLaVA-1.5: pad as the papers, or crop as llava-hf")
    add("--template", choices=known, metavar="NAME", help=f"prompt: {', '.join(known)}; default the model's own")
    add("--max-pixels", type=int, metavar="N", help="Qwen-VL: largest picture or frame; default the checkpoint's own")
    add("--sampling", choices=choices.samplings(), help="rule that chooses a video's frames; default the model's own")
    add("--frames", type=int, metavar="N", help="frames of a video: evenly spaced, or with --sampling the most that it takes")


def add_comparison_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    known = ", ".join(choices.methods())
    forms = "FILE.py:CLASS; NAME:OPTION=VALUE; FIRST+SECOND:share=0.5 for both in one run"
    add("--methods", type=methods, help=f"from {known}; {ALL}; {forms}; default dense,v2drop,random")
    add("--accounting", choices=ACCOUNTINGS, default=ACCOUNTINGS[0], help="equal budgets, or each method's published settings")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--tokens", type=budgets, help="budgets: mean vision tokens a layer, e.g. 192,128,64")
    shares = "budgets as shares of the prompt's vision tokens; default 1/3, 2/9, 1/9, and 0.25, 0.15 for video"
    budget.add_argument("--retain", type=retained_shares, help=shares)
    add("--ablation", type=some_of(choices.ablations()), help=f"the paper's ablations, from {', '.join(choices.ablations())}")
    add("--claims", action="store_true", help="put the paper's claims to the test: the demo in minutes, others on --tasks")
    add("--calibrate", action="store_true", help="propose drop layers from a few prompts: of --tasks, or --image and --prompt")
    add("--paper", action="store_true", help="print the paper's result tables (of --model, if given), and nothing else")
    known = ", ".join(choices.text_methods())
    add("--text", nargs="?", const=list(choices.text_methods()), type=some_of(choices.text_methods()), metavar="METHODS",
        help=f"drop tokens of texts instead: retrieval and prose on a text model ({TEXT_MODEL} by default); from {known}")
    known = ", ".join(choices.texts())
    add("--texts", type=some_of(choices.texts()), default=list(choices.texts()), help=f"kinds of text for --text, from {known}")
    add("--conversations", type=int, metavar="N", help="of three questions on a demo: what later questions can still see")
    tasks, lists = (*choices.tasks(), *PAPER_TASKS), f"{' and '.join(PAPER_TASKS)} are the paper's lists for the model"
    add("--tasks", type=some_of(tasks), help=f"from {', '.join(tasks)}; {lists}; default the demo's own, else pope,mme")
    add("--data", type=path, help="folder with the benchmarks' parquet files, instead of the Hub")
    add("--limit", type=int, metavar="N", help="samples of each task")
    sizes = "prompts that are answered together; default auto: what the free memory allows"
    add("--batch-size", type=batch_size, metavar="N", help=sizes)
    add("--seed", type=int, default=0, metavar="N", help="first seed of methods that draw at random; default 0")
    add("--seeds", type=int, metavar="N", help=f"number of seeds that share a row; default {SEEDS}, {SEEDS_OF_DEMOS} for demos")


def add_question_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--image", nargs="+", type=file, metavar="FILE", help="pictures, or a folder of pictures, that --prompt is about")
    add("--video", type=file, metavar="FILE", help="the video that --prompt is about")
    add("--prompt", type=readable, help="the question; answered with and without dropping, with a picture of what was kept")
    add("--chat", action="store_true", help="ask one question after the other about --image or --video; answers are streamed")
    known = choices.histories()
    add("--history", choices=known, default=known[0], help=f"what later questions of --chat see; default {known[0]}")
    add("--forget", action="store_true", help="each question sees the pictures and no earlier question")


def add_output_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output", type=path, metavar="DIR", help="default results/<model>-<time>")
    add("--resume", action="store_true", help="continue the run in --output; its answers are kept")
    add("--verbose", action="store_true", help="print every table, not only the scores")
    add("--json", action="store_true", help="end with the JSON object on a terminal too")


def check_conflicts(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with an error where an option would be ignored beside another, or where one is missing."""
    given = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
    for name, others in IGNORED.items():
        ignored = [f"--{other.replace('_', '-')}" for other in others if other in given]
        if name in given and ignored:
            parser.error(f"beside --{name} {', '.join(ignored)} would be ignored; leave one of them out")
    asks = arguments.prompt is not None or arguments.chat
    if (arguments.image is None and arguments.video is None) == asks:
        missing = "--image FILE or --video FILE" if asks else "--prompt QUESTION or --chat"
        parser.error(f"--image or --video belongs together with --prompt or --chat; add {missing}")
    if arguments.text is None and "texts" in given:
        parser.error("--texts names kinds of text for --text; give both")
    if arguments.resume and arguments.output is None:
        parser.error("--resume needs the --output of the run to continue")
    if not arguments.chat and "history" in given:
        parser.error("--history belongs together with --chat")
    if not arguments.chat and arguments.conversations is None and arguments.forget:
        parser.error("--forget belongs together with --chat or --conversations")
    for name in ("methods", "tokens", "retain"):
        if arguments.chat and (len(values := getattr(arguments, name) or ()) > 1 or ALL in values):
            parser.error(f"--chat answers with one method and one budget; give --{name} a single value")


def check_values(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with an error for a number outside its limits."""
    for name, (smallest, largest) in LIMITS.items():
        value = getattr(arguments, name)
        if value is not None and not smallest <= value <= largest:
            parser.error(f"--{name.replace('_', '-')} {value} is out of range; it must be from {smallest:,} to {largest:,}")


def batch_size(text: str) -> int | None:
    """A number of prompts; None for auto."""
    return None if text == AUTO else int(text)


def names(text: str) -> list[str]:
    """Separated by commas; at least one."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("nothing is named")
    return found


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A type for names that must all be in `known`."""

    def check(text: str) -> list[str]:
        found = names(text)
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown name {unknown[0]!r}; choose from: {', '.join(known)}")
        return found

    return check


def methods(text: str) -> list[str]:
    """Methods with options and chains of them; one of a user's own is FILE.py:CLASS, whose file must be there."""
    known, found = choices.methods(), names(text)
    try:
        parts = [part.name for name in found for part in parse_methods(name).methods]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    for name in parts:
        source, colon, _ = name.rpartition(":")
        if colon and source.endswith(".py"):
            if not Path(source).is_file():
                raise argparse.ArgumentTypeError(f"there is no file {source}")
        elif name not in (*known, ALL):
            ways = f"{', '.join(known)}; or {ALL}; or give your own as FILE.py:CLASS"
            raise argparse.ArgumentTypeError(f"unknown method {name!r}; choose from: {ways}")
    return found


def model(text: str) -> str:
    """A name of MODELS or a repository of the Hub (OWNER/NAME), each perhaps with @REVISION, or a folder."""
    if not Path(os.path.expanduser(text)).is_dir():
        try:
            find_spec(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return text


def device(text: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"unknown device {text!r}; choose cpu, cuda, cuda:N or mps")
    return text


def path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty; give a folder")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"the path {text!r} has a null character in it")
    return Path(os.path.expanduser(readable(text)))


def readable(text: str) -> str:
    """Text that can be printed and given to a tokenizer; a shell may pass any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no valid UTF-8") from None
    return text


def file(text: str) -> Path:
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", text):
        raise argparse.ArgumentTypeError(f"{text} is a web address; only local files are read: download it first")
    return path(text)


def budgets(text: str) -> list[float]:
    return [bounded(name, math.inf) for name in names(text)]


def retained_shares(text: str) -> list[float]:
    return [bounded(name, 1.0) for name in names(text)]


def bounded(text: str, largest: float) -> float:
    try:
        value = parse_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not 0 < value <= largest or math.isinf(value):
        limit = "above 0" if math.isinf(largest) else f"above 0 and at most {largest:g}"
        raise argparse.ArgumentTypeError(f"{text} must be {limit}")
    return value


def typed_command(argv: Sequence[Any]) -> list[str]:
    """The words that start this program again with the options `argv`."""
    program = Path(sys.argv[0])
    words = {"__main__.py": ["python", "-m", "nanovlm_v2drop"], "train_free_eval.py": ["python", sys.argv[0]]}
    return [*words.get(program.name, ["nanovlm-v2drop"]), *map(str, argv)]
