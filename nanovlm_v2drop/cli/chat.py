"""A conversation about pictures or a video: every question is asked with what was said before, and answers are streamed.

The whole conversation is prefilled anew for every question, pictures included; only the decoded pictures are kept.
"""

import argparse
from dataclasses import dataclass, replace

from ..evaluation.loading import load_model
from ..evaluation.methods import find_methods
from ..evaluation.plans import Plan, prompt_shape
from ..inference import stream
from ..loading.zoo import VisionLanguageModel
from ..processing.prompts import IMAGE_TOKEN, QWEN_SYSTEM, TEMPLATES, VICUNA_SYSTEM, VIDEO_TOKEN, Request, build_prompt
from ..report.tables import printable
from .ask import beyond_demo, question_about
from .planning import plans_for

SYSTEMS = (f"{VICUNA_SYSTEM} ", f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n")  # stand before the first turn only
VICUNA_ANSWER, QWEN_ANSWER = " {answer}</s>", "{answer}<|im_end|>\n"  # between two turns, as in training
PROMPT = "> "
FIRST_QUESTION = "What is in the picture?"  # its prompt is as long as any: budgets are solved for its vision tokens


@dataclass
class Conversation:
    """The prompt so far; empty before the first question."""

    media: Request
    template: str
    vision_tokens: tuple[str, ...] = (IMAGE_TOKEN, VIDEO_TOKEN)
    said: str = ""

    def request(self, question: str) -> Request:
        """What the model reads for the next question; raises ValueError as `build_prompt`."""
        first = build_prompt(replace(self.media, text=question), self.template, self.vision_tokens)
        return replace(self.media, text=None, prompt=self.said + self.turn(question) if self.said else first)

    def turn(self, question: str) -> str:
        """A question in the conversation's form, without system sentence and pictures."""
        prompt = TEMPLATES[self.template].wrap(question)
        for system in SYSTEMS:
            prompt = prompt.removeprefix(system)
        return prompt

    def remember(self, request: Request, answer: str) -> None:
        form = QWEN_ANSWER if "<|im_start|>" in (request.prompt or "") else VICUNA_ANSWER
        self.said = (request.prompt or "") + form.format(answer=answer)


def chat(arguments: argparse.Namespace) -> None:
    """Read questions from stdin until an empty line, the end of the input or Ctrl-C; stream the answers to stdout."""
    find_methods(arguments.methods)
    media = question_about(arguments, FIRST_QUESTION)
    vlm = load_model(arguments)
    plan = plans_for(prompt_shape(vlm, media), arguments)[0]
    print(f"{vlm.name} in {vlm.precision} answers with {plan.row}; an empty line or Ctrl-D ends the conversation")
    if note := beyond_demo(vlm, media, arguments):
        print(note)
    if vlm.template not in TEMPLATES:
        raise ValueError(
            f"{vlm.name} is asked by its own {vlm.template}, which cannot continue a conversation here; "
            f"give --template NAME, one of: {', '.join(sorted(TEMPLATES))}"
        )
    conversation = Conversation(media, vlm.template, tuple(vlm.config.vision_tokens))
    try:
        while question := input(PROMPT).strip():
            answer(vlm, plan, conversation, question)
    except (EOFError, KeyboardInterrupt):
        print()


def answer(vlm: VisionLanguageModel, plan: Plan, conversation: Conversation, question: str) -> None:
    """Stream one answer; a question that does not fit is told, and the conversation goes back to its beginning."""
    text = ""
    try:
        request = conversation.request(question)
        with plan.answering():
            for piece in stream(vlm, request, plan.dropper):
                print(printable(piece), end="", flush=True)
                text += piece
    except ValueError as error:
        print(f"{error}\nthe conversation starts anew; the picture stays")
        conversation.said = ""
        return
    print()
    conversation.remember(request, text)
