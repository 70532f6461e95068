"""A conversation about pictures or a video: one question after the other, with streamed answers and a KV cache that is kept."""

import argparse
from contextlib import suppress

from ..evaluation.loading import load_model
from ..evaluation.methods import find_methods
from ..evaluation.plans import Plan, prompt_shape
from ..inference import Chat
from ..processing.prompts import Request
from ..report.tables import printable
from .ask import beyond_demo, question_about
from .planning import plans_for

PROMPT = "> "
FORGET = "/forget"
FIRST_QUESTION = "What is in the picture?"  # its prompt is as long as any: budgets are solved for its vision tokens


def chat(arguments: argparse.Namespace) -> None:
    """Read questions from stdin until an empty line, the end of the input or Ctrl-C; stream the answers to stdout.

    Ctrl-C during an answer ends that answer only. The line `/forget`, or --forget before every question, makes the model forget
    what was said and keep the pictures.
    """
    find_methods(arguments.methods)
    media = question_about(arguments, FIRST_QUESTION)
    vlm = load_model(arguments)
    plan = plans_for(prompt_shape(vlm, media), arguments)[0]
    conversation = Chat(vlm, plan.dropper, history=arguments.history)
    end = f"an empty line or Ctrl-D ends the conversation, {FORGET} begins another"
    print(f"{vlm.name} in {vlm.precision} answers with {plan.row}; {end}")
    if note := beyond_demo(vlm, media, arguments):
        print(note)
    with suppress(EOFError, KeyboardInterrupt):
        while question := input(PROMPT).strip():
            if question == FORGET or arguments.forget:
                conversation.forget()
            if question != FORGET:
                answer(conversation, plan, media, question)
        return
    print()


def answer(conversation: Chat, plan: Plan, media: Request, question: str) -> None:
    """Stream one answer. A question that cannot be asked is told and changes nothing; the first one shows the pictures."""
    shown = conversation.has_media
    try:
        with plan.answering():
            pieces = conversation.stream(question, () if shown else media.images, None if shown else media.video)
            for piece in pieces:
                print(printable(piece), end="", flush=True)
    except ValueError as error:
        print(f"{error}\nthe conversation is as it was; {FORGET} keeps the pictures and forgets what was said")
        return
    except KeyboardInterrupt:
        conversation.end_stream()
        print(" (interrupted)", end="")
    print()
    if conversation.turns and (note := conversation.turns[-1].note):
        print(f"(the whole conversation was prefilled again: {note})")
