"""What the demo model is trained on: its tokenizer, labelled patches, and pictures with many questions each.

Shapes: N pictures, P patches of one picture, L tokens of one row.
"""

import json
from collections.abc import Iterator
from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from ..config import VisionConfig, VLMConfig
from ..images import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from ..prompts import DEFAULT_TEMPLATE, LLAMA_DECODER, TEMPLATES
from . import scenes

BACKGROUND = "background"  # the word that a patch without a thing answers
PATCH_WORDS = (
    (*scenes.COLORS, BACKGROUND),
    (*scenes.SHAPES, BACKGROUND),
    (*(str(digit) for digit in range(10)), BACKGROUND),
)
TURN_WEIGHTS = {"existence": 1.5, "color": 1.5, "shape": 1.5, "count": 0.7, "position": 2.5, "digit": 2.0}
VISION = VisionConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=144, patch_size=12
)


def llama_tokenizer(lines: list[str]) -> Tokenizer:
    """A byte-fallback BPE in the exact form of LLaMA's tokenizer.json, learned from `lines`: words that are frequent there
    become one token."""
    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # while training only: no merge may cross a space
    trainer = BpeTrainer(vocab_size=2000, special_tokens=[*specials, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(BPE(learned["vocab"], merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = LLAMA_DECODER
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*specials, "<image>", "<pad>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def corpus() -> list[str]:
    """Every word that a prompt or an answer can hold, often enough to become one token."""
    rng = Random(0)
    lines = [BACKGROUND, *(template("") for template in TEMPLATES.values())]
    for _ in range(3000):
        scene = scenes.any_scene(rng)
        asked = [scenes.ask(scene, kind, rng) for kind in scenes.KINDS]
        lines += [f"\n{question.text} {question.answer}" for question in (*asked, scenes.describe(scene)) if question]
    return lines * 2


def normalised(pictures: Tensor) -> Tensor:
    """(N, 144, 144, 3) uint8 -> (N, 3, 144, 144) float32, as the official preprocessing of a picture of this size."""
    scaled = pictures.permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(CLIP_IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_IMAGE_STD).view(3, 1, 1)


def patch_labels(scene: scenes.Scene) -> np.ndarray:
    """(P, 3) what each patch shows: indices into PATCH_WORDS; a patch counts as covered from a fifth of its area on."""
    grid, patch = VISION.grid_size, VISION.patch_size
    labels = np.tile([len(words) - 1 for words in PATCH_WORDS], (grid * grid, 1))
    for thing in scene.things:
        shape_map, digit_map = (Image.new("L", (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)) for _ in range(2))
        scenes.draw_shape(ImageDraw.Draw(shape_map), thing, 1)
        ImageDraw.Draw(digit_map).rectangle(thing.digit_box, fill=1)
        body, digit = (
            np.asarray(image).reshape(grid, patch, grid, patch).mean((1, 3)).ravel() for image in (shape_map, digit_map)
        )
        labels[body > 0.2, 0] = PATCH_WORDS[0].index(thing.color)
        labels[body > 0.2, 1] = PATCH_WORDS[1].index(thing.shape)
        labels[digit > 0.2, 2] = thing.digit
    return labels


def draw_batch(rng: Random, batch: int) -> tuple[list[scenes.Scene], Tensor]:
    """Scenes and their pictures (N, 144, 144, 3) uint8."""
    drawn = [scenes.any_scene(rng) for _ in range(batch)]
    return drawn, torch.from_numpy(np.stack([np.asarray(scenes.draw_scene(scene)) for scene in drawn]))


class TowerBatches(torch.utils.data.IterableDataset):
    """Batches of (pictures, patch labels), drawn in a second process."""

    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = Random(self.seed)
        while True:
            drawn, pictures = draw_batch(rng, self.batch)
            yield pictures, torch.from_numpy(np.stack([patch_labels(scene) for scene in drawn]))


class InstructBatches(torch.utils.data.IterableDataset):
    """Batches of (pictures, token ids, turn numbers, position ids, labels), one row a picture with several questions.

    Turn 0 is the system sentence and the picture; turn t > 0 is one question with its answer; -1 is padding.
    """

    def __init__(self, tokenizer: Tokenizer, config: VLMConfig, batch: int, text_tokens: int, seed: int) -> None:
        self.tokenizer, self.config, self.batch, self.text_tokens, self.seed = tokenizer, config, batch, text_tokens, seed
        self.prefix = tokenizer.encode(TEMPLATES[DEFAULT_TEMPLATE]("<image>\n")).ids
        self.prefix = self.prefix[: self.prefix.index(config.image_token_id)]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        rng = Random(self.seed)
        while True:
            drawn, pictures = draw_batch(rng, self.batch)
            rows = np.stack([self.row(scene, rng) for scene in drawn])  # (N, 4, L)
            yield pictures, *torch.from_numpy(rows).unbind(1)

    def row(self, scene: scenes.Scene, rng: Random) -> np.ndarray:
        """(4, L): token ids, turn numbers, position ids, labels (-100 where nothing is asked)."""
        image = [self.config.image_token_id] * VISION.num_patches
        start = len(self.prefix) + len(image)
        ids, turns, positions = [*self.prefix, *image], [0] * start, list(range(start))
        labels = [-100] * start
        length = start + self.text_tokens
        for turn, question in enumerate(self.questions(scene, rng), 1):
            prompt, answer = self.turn_ids(question)
            if len(ids) + len(prompt) + len(answer) > length:
                break
            ids += prompt + answer
            turns += [turn] * (len(prompt) + len(answer))
            positions += range(start, start + len(prompt) + len(answer))
            labels += [-100] * len(prompt) + answer
        padding = length - len(ids)
        return np.array([ids + [0] * padding, turns + [-1] * padding, positions + [0] * padding, labels + [-100] * padding])

    def questions(self, scene: scenes.Scene, rng: Random) -> Iterator[scenes.Question]:
        """A third of the pictures are described, the rest of the room is for questions in random order."""
        if rng.random() < 1 / 3:
            yield scenes.describe(scene)
        while True:
            kind = rng.choices(list(TURN_WEIGHTS), list(TURN_WEIGHTS.values()))[0]
            question = scenes.ask(scene, kind, rng)
            if question is not None:
                yield question

    def turn_ids(self, question: scenes.Question) -> tuple[list[int], list[int]]:
        """The tokens behind the picture, and the answer with its end-of-sequence token."""
        prompt = self.tokenizer.encode(TEMPLATES[DEFAULT_TEMPLATE](f"<image>\n{question.text}")).ids
        answer = self.tokenizer.encode(question.answer, add_special_tokens=False).ids
        return prompt[prompt.index(self.config.image_token_id) + 1 :], [*answer, self.config.eos_token_ids[0]]


def word_tokens(tokenizer: Tokenizer, words: tuple[str, ...]) -> Tensor:
    """The token of each word as it stands after a space; every word of the demo has one of its own."""
    encoded = [tokenizer.encode(word, add_special_tokens=False).ids for word in words]
    if any(len(ids) != 1 for ids in encoded):
        raise ValueError(f"words that are not one token each: {dict(zip(words, encoded, strict=True))}")
    return torch.tensor([ids[0] for ids in encoded])
