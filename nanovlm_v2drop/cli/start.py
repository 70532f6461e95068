"""Where torch is imported: joins the processes that torchrun started, runs what was asked for, tells errors in one line."""

import argparse
import errno
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ..dropping import NotANumber
from ..loading.files import CheckpointError
from ..loading.specs import WeightsUnavailable
from ..models.parallel import ALONE, Processes, join_processes, leave_processes
from ..tasks import DatasetUnavailable
from .ask import answer_one
from .calibrate import run_calibration
from .chat import chat
from .conversations import run_conversations
from .ledger import run_claims
from .runs import evaluate_tasks
from .text import run_text

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a used-up quota, a limit on files
REPORTED = (WeightsUnavailable, DatasetUnavailable, CheckpointError, NotANumber, ValueError, OSError, ImportError)


def start(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Carry out parsed options; `argv` is what was typed. Returns the exit status, 2 after an error told on stderr."""
    processes, arguments.typed = ALONE, list(argv)
    try:
        arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        processes = join_processes(torch.device(arguments.device).type, arguments.tensor_parallel)
        arguments.device = processes.device(arguments.device)
        run = run_mode(arguments, processes)
        if processes.is_first and run is not None and (arguments.json or not sys.stdout.isatty()):
            print(json.dumps(run), flush=True)
    except REPORTED as error:
        print(f"nanovlm-v2drop: {rank_of(processes)}{described(error)}", file=sys.stderr)
        return 2
    leave_processes()
    return 0


def described(error: BaseException) -> str:
    """The message of an error; those of a full disk and of a closed pipe say what to do."""
    if isinstance(error, BrokenPipeError):
        return f"nobody reads stdout any more ({error.strerror}); answers are kept, and --resume continues a run"
    if isinstance(error, OSError) and error.errno in FULL:
        place = error.filename or "the output folder, or the file that stdout goes to,"
        return f"{place} cannot be written to ({error.strerror}); make room, then continue a run with --resume"
    return str(error)


def rank_of(processes: Processes) -> str:
    return "" if processes.world_size == 1 else f"process {processes.rank}: "


def run_mode(arguments: argparse.Namespace, processes: Processes) -> dict[str, Any] | None:
    """The object that ends a run, of which the first process alone knows the results; None after a conversation."""
    alone = next((name for name in ("claims", "calibrate", "conversations", "text", "chat") if getattr(arguments, name)), None)
    if arguments.prompt is None and alone is None:
        return evaluate_tasks(arguments, processes)
    if processes.world_size > 1 and alone is not None:
        raise ValueError(f"--{alone} is for one process; start train_free_eval.py without torchrun")
    if processes.replicas > 1:
        raise ValueError(
            f"one question keeps one decoder busy, not {processes.replicas}: start train_free_eval.py without torchrun, "
            f"or share the decoder with --tensor-parallel {processes.world_size}"
        )
    if arguments.claims:
        return run_claims(arguments)
    if arguments.calibrate:
        return run_calibration(arguments)
    if arguments.text:
        return run_text(arguments)
    if arguments.conversations:
        return run_conversations(arguments)
    if arguments.chat:
        chat(arguments)
        return None
    return answer_one(arguments, processes)
