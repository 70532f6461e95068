"""The plug-in for lmms-eval (PyPI lmms-eval 0.7): `lmms-eval --model nanovlm_v2drop --model_args pretrained=NAME,...`.

lmms-eval finds it by the entry point group `lmms_eval.models`. Nothing else in this package imports lmms-eval.

    arguments   `--model_args`: the model, and the method with its budget
    requests    documents to requests, and `--gen_kwargs` to ways of decoding
    answers     packed batches: generated answers, and the losses of given answers
    model       the two classes that lmms-eval runs, with its chat and its simple interface
"""

from typing import Any

NAME = "nanovlm_v2drop"


def manifest() -> Any:
    """What lmms-eval registers at its start: where the classes are. They are imported only when the model is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    model = f"{__name__}.model"
    return ModelManifest(NAME, simple_class_path=f"{model}.SimpleModel", chat_class_path=f"{model}.ChatModel")
