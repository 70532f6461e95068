"""The models by name: where their weights are, how large they are, and what they take. Nothing here imports torch.

A new model of a known family is one entry in MODELS.
"""

from dataclasses import dataclass
from pathlib import Path

INSTALLED_WEIGHTS = Path(__file__).parents[1] / "weights"  # where a wheel holds the demo models
WEIGHTS_FOLDER = INSTALLED_WEIGHTS if INSTALLED_WEIGHTS.is_dir() else Path(__file__).parents[2] / "weights"
DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
PICTURE, SEVERAL, VIDEO = "one picture", "several pictures", "video"
STILLS, ALL_MEDIA = (PICTURE, SEVERAL), (PICTURE, SEVERAL, VIDEO)


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

    @property
    def folder(self) -> Path:
        """Where a local copy is looked for before the Hub is asked."""
        return WEIGHTS_FOLDER / self.name

    @property
    def download_size(self) -> float | None:
        """Size in GB (10^9 bytes), since all these repositories store 16-bit weights; None where nothing is downloaded."""
        return None if self.repository is None or self.parameters is None else 2 * self.parameters


LLAMA2, APACHE, TONGYI = "llama2", "apache-2.0", "tongyi-qianwen"
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
    )
}
