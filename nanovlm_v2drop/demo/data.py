"""The training data of the demo models: tokenizers, labelled patches, and pictures or clips with many questions each.

Shapes: N pictures or clips, F frames of a clip, P patches of one picture, L tokens of one row.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from ..models.config import VisionConfig
from ..processing.prompts import DEFAULT_TEMPLATE, TEMPLATES
from ..processing.tokenizer import LLAMA_DECODER
from . import clips, scenes

BACKGROUND = "background"  # the word of a patch that shows no thing
PATCH_WORDS = (
    (*scenes.COLORS, BACKGROUND),
    (*scenes.SHAPES, BACKGROUND),
    (*(str(digit) for digit in range(10)), BACKGROUND),
)
VISION = VisionConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=144, patch_size=12
)


# How Qwen2's tokenizer.json splits text before it merges bytes: words with the space before them, single digits, other signs.
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")


@dataclass(frozen=True)
class World:
    """The subjects (scenes or clips) of a demo, and how they are sampled, drawn, asked about and described.

    `draw` gives uint8 (144, 144, 3) for a scene and (F, 144, 144, 3) for a clip. `turn_weights` are the relative frequencies
    of the kinds of questions in training. `media_token` marks the place of the picture or clip in the chat template.
    """

    sample: Callable[[Random], Any]
    draw: Callable[[Any], np.ndarray]
    ask: Callable[[Any, str, Random], scenes.Question | None]
    describe: Callable[[Any], scenes.Question]
    turn_weights: dict[str, float]
    media_token: str
    template: str

    def prompt(self, text: str) -> str:
        """The prompt that the model will be asked: the picture or clip, then the question."""
        return TEMPLATES[self.template](f"{self.media_token}\n{text}")


SCENES = World(
    scenes.any_scene,
    lambda scene: np.asarray(scenes.draw_scene(scene)),
    scenes.ask,
    scenes.describe,
    {"existence": 1.5, "color": 1.5, "shape": 1.5, "count": 0.7, "position": 2.5, "digit": 2.0},
    "<image>",
    DEFAULT_TEMPLATE,
)
CLIPS = World(
    clips.any_clip,
    lambda clip: np.stack([np.asarray(frame) for frame in clips.draw_clip(clip)]),
    clips.ask,
    clips.describe,
    {"existence": 1, "color": 1.5, "digit": 1.5, "direction": 1.5, "order": 2.5, "half": 1.5, "count": 1, "action": 1.5},
    "<video>",
    "qwen_1_5",
)


def llama_tokenizer(lines: list[str]) -> Tokenizer:
    """A byte-fallback BPE in the exact form of LLaMA's tokenizer.json, learned from `lines`.

    Words that are frequent in `lines` become one token.
    """
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
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def qwen2_tokenizer(lines: list[str]) -> Tokenizer:
    """A byte-level BPE in the exact form of Qwen2's tokenizer.json, learned from `lines`; the specials' ids come last."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(lines, BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in QWEN2_SPECIALS])
    return tokenizer


def corpus() -> list[str]:
    """Text with every word of the demo's prompts and answers, each often enough to become one token."""
    rng = Random(0)
    lines = [BACKGROUND, *(TEMPLATES[name]("") for name in ("vicuna_v1", "hub"))]
    for _ in range(3000):
        scene = scenes.any_scene(rng)
        asked = [scenes.ask(scene, kind, rng) for kind in scenes.KINDS]
        lines += [f"\n{question.text} {question.answer}" for question in (*asked, scenes.describe(scene)) if question]
    return lines * 2


def video_corpus() -> list[str]:
    """The same for demo-video. Its tokenizer distinguishes words with and without a space before them, so both are included."""
    rng = Random(0)
    lines = []
    for _ in range(3000):
        clip = clips.any_clip(rng)
        asked = [clips.ask(clip, kind, rng) for kind in clips.KINDS]
        turns = [f"{CLIPS.prompt(question.text)}{question.answer}" for question in (*asked, clips.describe(clip)) if question]
        lines += [text for turn in turns for text in re.split("|".join(map(re.escape, QWEN2_SPECIALS)), turn) if text]
    words = [word for words in (*PATCH_WORDS, *clips.ANSWERS.values()) for word in words]
    return lines + [f"{word}\n {word}" for word in words for _ in range(20)]


def normalised(pictures: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(N, 144, 144, 3) uint8 -> (N, 3, 144, 144) float32, as the official preprocessing of a picture of this size."""
    scaled = pictures.permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def patch_labels(scene: scenes.Scene) -> np.ndarray:
    """(P, 3) indices into PATCH_WORDS of what each patch shows; a thing must cover more than a fifth of the patch."""
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


def draw_batch(world: World, rng: Random, batch: int) -> tuple[list[Any], Tensor]:
    """N subjects and their pictures (N, 144, 144, 3) or clips (N, F, 144, 144, 3), uint8."""
    drawn = [world.sample(rng) for _ in range(batch)]
    return drawn, torch.from_numpy(np.stack([world.draw(subject) for subject in drawn]))


class TowerBatches(torch.utils.data.IterableDataset):
    """Batches of (pictures, patch labels) of scenes, drawn in a second process."""

    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = Random(self.seed)
        while True:
            drawn, pictures = draw_batch(SCENES, rng, self.batch)
            yield pictures, torch.from_numpy(np.stack([patch_labels(scene) for scene in drawn]))


class InstructBatches(torch.utils.data.IterableDataset):
    """Batches of (pictures or clips, token ids, turn numbers, position ids, labels); one row is a subject with many questions.

    Turn 0 is the system sentence and the picture or clip, turn t > 0 is one question with its answer, and -1 is padding.
    The media token is repeated `vision_tokens` times, and every answer ends with `eos_token`.
    """

    def __init__(
        self, world: World, tokenizer: Tokenizer, *, eos_token: int, vision_tokens: int, batch: int, text_tokens: int, seed: int
    ) -> None:
        self.world, self.tokenizer, self.eos_token = world, tokenizer, eos_token
        self.vision_tokens, self.batch, self.text_tokens, self.seed = vision_tokens, batch, text_tokens, seed
        self.media_token = tokenizer.get_vocab()[world.media_token]
        prompt = tokenizer.encode(world.prompt("")).ids
        self.prefix = prompt[: prompt.index(self.media_token)]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        rng = Random(self.seed)
        while True:
            drawn, pictures = draw_batch(self.world, rng, self.batch)
            rows = np.stack([self.row(subject, rng) for subject in drawn])  # (N, 4, L)
            yield pictures, *torch.from_numpy(rows).unbind(1)

    def row(self, subject: Any, rng: Random) -> np.ndarray:
        """(4, L): token ids, turn numbers, position ids, and labels, which are -100 except at answers."""
        media = [self.media_token] * self.vision_tokens
        start = len(self.prefix) + len(media)
        ids, turns, positions = [*self.prefix, *media], [0] * start, list(range(start))
        labels = [-100] * start
        length = start + self.text_tokens
        for turn, question in enumerate(self.questions(subject, rng), 1):
            prompt, answer = self.turn_ids(question)
            if len(ids) + len(prompt) + len(answer) > length:
                break
            ids += prompt + answer
            turns += [turn] * (len(prompt) + len(answer))
            positions += range(start, start + len(prompt) + len(answer))
            labels += [-100] * len(prompt) + answer
        padding = length - len(ids)
        return np.array([ids + [0] * padding, turns + [-1] * padding, positions + [0] * padding, labels + [-100] * padding])

    def questions(self, subject: Any, rng: Random) -> Iterator[scenes.Question]:
        """An endless stream of questions in random order; a third of the subjects begin with a description."""
        if rng.random() < 1 / 3:
            yield self.world.describe(subject)
        weights = self.world.turn_weights
        while True:
            question = self.world.ask(subject, rng.choices(list(weights), list(weights.values()))[0], rng)
            if question is not None:
                yield question

    def turn_ids(self, question: scenes.Question) -> tuple[list[int], list[int]]:
        """The prompt's tokens behind the picture or clip, and the answer's tokens with the end-of-sequence token."""
        prompt = self.tokenizer.encode(self.world.prompt(question.text)).ids
        answer = self.tokenizer.encode(question.answer, add_special_tokens=False).ids
        return prompt[prompt.index(self.media_token) + 1 :], [*answer, self.eos_token]


def word_tokens(tokenizer: Tokenizer, words: tuple[str, ...]) -> Tensor:
    """The token of each word as the first word of an answer; raises ValueError for a word of several tokens."""
    encoded = [tokenizer.encode(word, add_special_tokens=False).ids for word in words]
    if any(len(ids) != 1 for ids in encoded):
        raise ValueError(f"words that are not one token each: {dict(zip(words, encoded, strict=True))}")
    return torch.tensor([ids[0] for ids in encoded])
