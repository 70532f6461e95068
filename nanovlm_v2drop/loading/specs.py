"""The models by name: where their weights are, how large they are, and what they take. Nothing here imports torch.

A new model of a known family is one entry in MODELS.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

INSTALLED_WEIGHTS = Path(__file__).parents[1] / "weights"  # where a wheel holds the demo models
WEIGHTS_FOLDER = INSTALLED_WEIGHTS if INSTALLED_WEIGHTS.is_dir() else Path(__file__).parents[2] / "weights"
OWN_TEMPLATE = "checkpoint"  # in place of a template's name: the chat template of the folder
AUTO = "auto"  # the default of every `dtype`: see precision.chosen_precision
DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64", "int8", "int4")
PICTURE, SEVERAL, VIDEO = "one picture", "several pictures", "video"
TEXT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what --text asks by default
STILLS, ALL_MEDIA = (PICTURE, SEVERAL), (PICTURE, SEVERAL, VIDEO)


class WeightsUnavailable(RuntimeError):
    """The weights of a model cannot be had; the message says what was tried and what to do."""


@dataclass(frozen=True)
class ModelSpec:
    """What is known about a model before any of its files is read.

    Args:
        summary: one line for a reader who chooses a model.
        repository: its id on the Hugging Face Hub; None for a model that ships with this project.
        revision: branch, tag or commit of the repository; None is its main branch.
        parameters: number of weights, in billions.
        licence: of the weights, as the Hub names it; None where it is not known.
        takes: what a request may hold besides text. Several pictures work with every model, but LLaVA-1.5 and LLaVA-1.6
            were trained with one.
        template: name of the conversation in prompts.TEMPLATES with which the papers ask this model; None is its family's.
        frames: how many frames of a video it was released with, evenly spaced; None is its family's choice.
        bits: of each stored weight.
    """

    name: str
    summary: str
    repository: str | None = None
    revision: str | None = None
    parameters: float | None = None
    licence: str | None = None
    takes: tuple[str, ...] = STILLS
    template: str | None = None
    frames: int | None = None
    bits: int = 16

    @property
    def folder(self) -> Path:
        """Where a local copy is looked for before the Hub is asked."""
        return WEIGHTS_FOLDER / self.name

    @property
    def has_local_copy(self) -> bool:
        """Whether `folder` holds this model: one of the table, at no special revision."""
        listed = MODELS.get(self.name)
        is_listed = listed is not None and listed.repository == self.repository and self.revision is None
        return is_listed and (self.folder / "config.json").is_file()

    @property
    def download_size(self) -> float | None:
        """Size of the weights in GB (10^9 bytes); None where nothing is downloaded."""
        return None if self.repository is None or self.parameters is None else self.bits / 8 * self.parameters


LLAMA2, APACHE, TONGYI, MIT = "llama2", "apache-2.0", "tongyi-qianwen", "mit"
QWEN, QWEN_RESEARCH = "qwen", "qwen-research"
MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "demo",
            "small LLaVA, trained on synthetic scenes and shipped with this project",
            parameters=0.0065,
            licence=APACHE,
        ),
        ModelSpec(
            "demo-video",
            "small LLaVA-OneVision, trained on synthetic clips and shipped with this project",
            parameters=0.0065,
            licence=APACHE,
            takes=ALL_MEDIA,
            frames=8,
        ),
        ModelSpec(
            "llava-1.5-7b",
            "LLaVA-1.5 on Vicuna 7B, 576 vision tokens a picture",
            "llava-hf/llava-1.5-7b-hf",
            parameters=7.06,
            licence=LLAMA2,
        ),
        ModelSpec(
            "llava-1.5-13b",
            "LLaVA-1.5 on Vicuna 13B, 576 vision tokens a picture",
            "llava-hf/llava-1.5-13b-hf",
            parameters=13.35,
            licence=LLAMA2,
        ),
        ModelSpec(
            "llava-v1.6-vicuna-7b",
            "LLaVA-1.6 on Vicuna 7B, up to 2,880 vision tokens a picture",
            "llava-hf/llava-v1.6-vicuna-7b-hf",
            parameters=7.06,
            licence=LLAMA2,
        ),
        ModelSpec(
            "llava-v1.6-vicuna-13b",
            "LLaVA-1.6 on Vicuna 13B, up to 2,880 vision tokens a picture",
            "llava-hf/llava-v1.6-vicuna-13b-hf",
            parameters=13.35,
            licence=LLAMA2,
        ),
        ModelSpec(
            "llava-v1.6-mistral-7b",
            "LLaVA-1.6 on Mistral 7B, up to 2,880 vision tokens a picture",
            "llava-hf/llava-v1.6-mistral-7b-hf",
            parameters=7.57,
            licence=APACHE,
        ),
        ModelSpec(
            "llava-onevision-qwen2-0.5b-ov",
            "LLaVA-OneVision on Qwen2 0.5B",
            "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
            parameters=0.89,
            licence=APACHE,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "llava-onevision-qwen2-7b-ov",
            "LLaVA-OneVision on Qwen2 7B",
            "llava-hf/llava-onevision-qwen2-7b-ov-hf",
            parameters=8.03,
            licence=APACHE,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "llava-onevision-qwen2-72b-ov",
            "LLaVA-OneVision on Qwen2 72B",
            "llava-hf/llava-onevision-qwen2-72b-ov-hf",
            parameters=73.2,
            licence=APACHE,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "llava-video-7b-qwen2",
            "LLaVA-Video on Qwen2 7B",
            "lmms-lab/LLaVA-Video-7B-Qwen2",
            parameters=8.03,
            licence=APACHE,
            takes=ALL_MEDIA,
            frames=64,
        ),
        ModelSpec(
            "llava-video-72b-qwen2",
            "LLaVA-Video on Qwen2 72B",
            "lmms-lab/LLaVA-Video-72B-Qwen2",
            parameters=73.2,
            licence=APACHE,
            takes=ALL_MEDIA,
            frames=64,
        ),
        ModelSpec(
            "qwen2-vl-2b",
            "Qwen2-VL 2B, pictures of any size",
            "Qwen/Qwen2-VL-2B-Instruct",
            parameters=2.21,
            licence=APACHE,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "qwen2-vl-7b",
            "Qwen2-VL 7B, pictures of any size",
            "Qwen/Qwen2-VL-7B-Instruct",
            parameters=8.29,
            licence=APACHE,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "qwen2-vl-72b",
            "Qwen2-VL 72B, pictures of any size",
            "Qwen/Qwen2-VL-72B-Instruct",
            parameters=73.4,
            licence=TONGYI,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "qwen2.5-vl-3b",
            "Qwen2.5-VL 3B, pictures of any size",
            "Qwen/Qwen2.5-VL-3B-Instruct",
            parameters=3.75,
            licence=QWEN_RESEARCH,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "qwen2.5-vl-7b",
            "Qwen2.5-VL 7B, pictures of any size",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            parameters=8.29,
            licence=APACHE,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "qwen2.5-vl-72b",
            "Qwen2.5-VL 72B, pictures of any size",
            "Qwen/Qwen2.5-VL-72B-Instruct",
            parameters=73.4,
            licence=QWEN,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "qwen3-vl-2b",
            "Qwen3-VL 2B, pictures of any size",
            "Qwen/Qwen3-VL-2B-Instruct",
            parameters=2.13,
            licence=APACHE,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "qwen3-vl-4b",
            "Qwen3-VL 4B, pictures of any size",
            "Qwen/Qwen3-VL-4B-Instruct",
            parameters=4.44,
            licence=APACHE,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "qwen3-vl-8b",
            "Qwen3-VL 8B, pictures of any size",
            "Qwen/Qwen3-VL-8B-Instruct",
            parameters=8.77,
            licence=APACHE,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "qwen3-vl-32b",
            "Qwen3-VL 32B, pictures of any size",
            "Qwen/Qwen3-VL-32B-Instruct",
            parameters=33.36,
            licence=APACHE,
            takes=ALL_MEDIA,
        ),
        ModelSpec(
            "smolvlm-256m",
            "SmolVLM 256M, runs on a laptop, 64 vision tokens a tile",
            "HuggingFaceTB/SmolVLM-256M-Instruct",
            parameters=0.2565,
            licence=APACHE,
        ),
        ModelSpec(
            "smolvlm-500m",
            "SmolVLM 500M, runs on a laptop, 64 vision tokens a tile",
            "HuggingFaceTB/SmolVLM-500M-Instruct",
            parameters=0.5075,
            licence=APACHE,
        ),
        ModelSpec(
            "smolvlm-2.2b",
            "SmolVLM 2.2B, 81 vision tokens a tile",
            "HuggingFaceTB/SmolVLM-Instruct",
            parameters=2.247,
            licence=APACHE,
        ),
        ModelSpec(
            "smolvlm2-256m",
            "SmolVLM2 256M, pictures and videos on a laptop",
            "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
            parameters=0.2565,
            licence=APACHE,
            takes=ALL_MEDIA,
            bits=32,
        ),
        ModelSpec(
            "smolvlm2-500m",
            "SmolVLM2 500M, pictures and videos on a laptop",
            "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
            parameters=0.5075,
            licence=APACHE,
            takes=ALL_MEDIA,
            bits=32,
        ),
        ModelSpec(
            "smolvlm2-2.2b",
            "SmolVLM2 2.2B, pictures and videos",
            "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
            parameters=2.247,
            licence=APACHE,
            takes=ALL_MEDIA,
            bits=32,
        ),
        ModelSpec(
            "nanovlm-222m",
            "nanoVLM 222M, 49 vision tokens a picture, runs on a laptop",
            "lusxvr/nanoVLM-222M",
            parameters=0.2221,
            licence=MIT,
            takes=(PICTURE,),
            bits=32,
        ),
        ModelSpec(
            "nanovlm-230m-8k",
            "nanoVLM 230M, 64 vision tokens a tile, runs on a laptop",
            "lusxvr/nanoVLM-230M-8k",
            parameters=0.2281,
            licence=MIT,
            bits=32,
        ),
        ModelSpec(
            "nanovlm-450m",
            "nanoVLM 450M, 64 vision tokens a tile, runs on a laptop",
            "lusxvr/nanoVLM-450M",
            parameters=0.4601,
            licence=MIT,
            bits=32,
        ),
    )
}


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")


def find_spec(model: str) -> ModelSpec:
    """What is known about a model by its name in MODELS or by its id on the Hugging Face Hub, each perhaps with @REVISION.

    Raises ValueError for anything else. An id of the Hub that is not in the table is not looked up.
    """
    name, at, revision = model.partition("@")
    by_repository = {spec.repository: spec for spec in MODELS.values() if spec.repository is not None}
    spec = MODELS.get(name) or by_repository.get(name)
    if spec is None and HUB_ID.fullmatch(name):
        spec = ModelSpec(name.rpartition("/")[2], "from the Hugging Face Hub", name)
    if spec is None:
        raise ValueError(
            f"unknown model {name!r}; choose one of: {', '.join(MODELS)}; or give the folder of a checkpoint, or an id "
            "of the Hugging Face Hub as OWNER/NAME"
        )
    if at and (spec.repository is None or ".." in revision or not REVISION.fullmatch(revision)):
        raise ValueError(f"{model!r} has no usable revision behind the @; give a branch, tag or commit of a model on the Hub")
    return replace(spec, revision=revision) if at else spec
