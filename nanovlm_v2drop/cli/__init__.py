"""The command line: `nanovlm-v2drop`, `python -m nanovlm_v2drop` and `python train_free_eval.py`.

    arguments   the options, their types and limits       choices   the names that options take
    checks      files, folders and packages               models    --list-models
                                                          paper     --paper
    start       processes, errors, the JSON object        runs      tasks, method beside method
    ask, chat   one question, and a conversation          ledger    --claims
    calibrate   --calibrate                               compare   two finished runs
    progress    the plan, the bar, the remaining time     text      --text
    conversations   what later questions of a conversation can still see

Everything above `start` works without torch, so `--help` and wrong options are answered in a fraction of a second.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType

STOPPED = 130  # exit status of a program that Ctrl-C ended
UNREAD = 141  # the same where the reader of its output went away, as `| head` does


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line; returns its exit status: 0, 2 for an error told on stderr, STOPPED or UNREAD."""
    given = sys.argv[1:] if argv is None else list(argv)
    prepare_streams()
    try:
        with sigterm_as_interrupt():
            return carry_out(given)
    except KeyboardInterrupt as stop:
        print(f"\nnanovlm-v2drop: {str(stop) or 'stopped'}", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is not tried again at the end
        return UNREAD
    except OSError as error:  # those of files are told where they arise
        print(f"nanovlm-v2drop: stdout cannot be written to ({error.strerror})", file=sys.stderr)
        return 2


def carry_out(argv: Sequence[str]) -> int:
    """One of: `compare RUN RUN2`, `--list-models`, `--paper`, and everything that needs a model."""
    from .arguments import parse_arguments, parse_comparison

    if argv[:1] == ["compare"]:
        given = parse_comparison(argv[1:])
        from .compare import print_comparison  # imports torch

        return print_comparison(given.runs, given.format, given.report)
    arguments = parse_arguments(argv)
    if arguments.list_models:
        from .models import print_models

        print_models()
        return 0
    if arguments.paper:
        from .paper import print_paper

        return print_paper(arguments.model)
    from .checks import check_files_and_packages

    try:
        check_files_and_packages(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"nanovlm-v2drop: {error}", file=sys.stderr)
        return 2
    from .start import start  # imports torch

    return start(arguments, argv)


def prepare_streams() -> None:
    """Have every standard stream work, whatever the program was started with.

    One that was closed has nothing to read, or leads nowhere. Where the locale has no box lines or plus-minus signs, question
    marks stand in their place.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for as long as the program runs)
        elif mode == "w" and isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM (a batch system's end of time, `kill`) stops the program as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
