"""A conversation about pictures or a video: one question after the other, with streamed answers and a KV cache that is kept."""

import argparse
import math
import shutil
import sys
from contextlib import suppress

from rich.cells import cell_len

from ..evaluation.loading import load_model
from ..evaluation.methods import find_methods
from ..evaluation.plans import Plan, prompt_shape
from ..inference import Chat
from ..processing.prompts import Request
from ..report.tables import printable
from .ask import beyond_demo, question_about
from .planning import plans_for

PROMPT = "> "
COMMAND = "/"  # begins a line that is a command; a question that begins with it is written with two
FORGET = f"{COMMAND}forget"
FIRST_QUESTION = "What is in the picture?"  # its prompt is as long as any: budgets are solved for its vision tokens


def chat(arguments: argparse.Namespace) -> None:
    """Read questions from stdin until an empty line, the end of the input or Ctrl-C; stream the answers to stdout.

    Ctrl-C during an answer ends that answer only. The line `/forget`, or --forget before every question, makes the model forget
    what was said and keep the pictures. A line that begins with `//` asks a question that begins with `/`.
    """
    find_methods(arguments.methods)
    media = question_about(arguments, FIRST_QUESTION)
    vlm = load_model(arguments)
    plan = plans_for(prompt_shape(vlm, media), arguments)[0]
    conversation = Chat(vlm, plan.dropper, history=arguments.history)
    end = f"an empty line or Ctrl-D ends the conversation, {FORGET} begins another"
    show(f"{vlm.name} in {vlm.precision} answers with {plan.row}; {end}")
    if note := beyond_demo(vlm, media, arguments):
        show(note)
    edit_lines()
    with suppress(EOFError, KeyboardInterrupt):
        while line := input(PROMPT).strip():
            if line == FORGET:
                conversation.forget()
            elif line.startswith(COMMAND) and not line.startswith(2 * COMMAND):
                show(f"unknown command {printable(line)}; the only one is {FORGET}. Type /{line} to ask this as a question")
            else:
                if arguments.forget:
                    conversation.forget()
                answer(conversation, plan, media, line.removeprefix(COMMAND))
        return
    print()


def edit_lines() -> None:
    """On a terminal, let the arrow keys edit a line of `input` and bring earlier lines back, where Python has readline."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 (the import is all that `input` needs)


def answer(conversation: Chat, plan: Plan, media: Request, question: str) -> None:
    """Stream one answer. A question that cannot be asked is told and changes nothing; the first one shows the pictures."""
    shown, lines = conversation.has_media, WordWrap(screen_width())
    try:
        with plan.answering():
            pieces = conversation.stream(question, () if shown else media.images, None if shown else media.video)
            for piece in pieces:
                print(lines.add(printable(piece)), end="", flush=True)
        print(lines.rest())
    except ValueError as error:
        if lines.column or lines.word:
            print(lines.rest())
        show(f"{error}\nthe conversation is as it was; {FORGET} keeps the pictures and forgets what was said")
        return
    except KeyboardInterrupt:
        conversation.end_stream()
        print(f"{lines.rest()} (interrupted)")
    if conversation.turns and (note := conversation.turns[-1].note):
        show(f"(the whole conversation was prefilled again: {note})")


def show(text: str) -> None:
    """Print a text with its lines broken between words."""
    lines = WordWrap(screen_width())
    print(lines.add(text) + lines.rest())


def screen_width() -> float:
    """Columns of the terminal; no limit where stdout is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf


class WordWrap:
    """Breaks lines between words in a text that comes piece by piece. A word is held back until its end is known.

    Characters that take two columns, as in Chinese and Japanese, are words of their own. A word that is longer than a line is
    broken at the end of the line.
    """

    def __init__(self, width: float) -> None:
        self.width, self.column, self.gap, self.word = width, 0, "", ""

    def add(self, piece: str) -> str:
        """What can be printed now."""
        return "".join(map(self.next, piece))

    def next(self, character: str) -> str:
        if character == "\n":
            printed, self.column, self.gap = self.rest() + character, 0, ""
            return printed
        if character == " ":
            printed = self.rest()
            self.gap += character
            return printed
        is_wide = cell_len(character) > 1
        printed = self.rest() if is_wide else ""
        self.word += character
        return printed + (self.rest() if is_wide or cell_len(self.word) >= self.width else "")

    def rest(self) -> str:
        """The word that was held back, on a new line where it does not fit into this one."""
        if not self.word:
            return ""
        gap, length = self.gap, cell_len(self.word)
        if self.column + len(gap) + length > self.width:
            gap, self.column = "\n" if self.column else "", 0
        printed = gap + self.word
        self.column += len(gap.removeprefix("\n")) + length
        self.gap = self.word = ""
        return printed
