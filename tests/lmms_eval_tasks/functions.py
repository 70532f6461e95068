"""What lmms-eval calls for the local tasks beside this file; scored as the tasks `demo` and `demo-video` score."""

from statistics import mean


def images(doc):
    return [picture.convert("RGB") for picture in doc["images"]]


def video(doc):
    return [doc["video"]]


def nothing(doc):
    return []


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def interleaved(doc):
    """A message in which the pictures stand between the words, as some tasks of lmms-eval write it."""
    first, *others = images(doc)
    content = [{"type": "text", "text": "Here: "}, {"type": "image", "url": first}, {"type": "text", "text": "\n"}]
    content += [{"type": "image", "url": other} for other in others]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]


def scored(doc, results):
    """A task with repeats hands over all answers of a document, or one."""
    answers = results[0] if isinstance(results[0], list) else results
    return {"accuracy": mean(float(answer.strip().lower() == doc["answer"]) for answer in answers)}


def average(scores):
    return mean(scores)
