"""How weights/demo was made: a small LLaVA trained from nothing on the scenes of scenes.py, on two CPU cores.

    python -m nanovlm_v2drop.demo.train --output weights/demo --work runs/demo

Three steps, in the order of LLaVA's own recipe:
1. tower: every patch names the colour, shape and digit that it shows, in the decoder's own word embeddings. This trains
   tower, projector and embeddings together and stands for CLIP's pre-training: without it, end-to-end training sits on a
   text-only plateau for very long.
2. instruct: the tower is frozen, as in LLaVA-1.5; projector and decoder learn to answer. All questions about a picture share
   one pass over it and cannot see each other, so that each is trained exactly as it will be asked: alone.
3. export: safetensors in the official LLaVA layout.

Both training steps write checkpoints into --work and go on from them.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn

from ..config import TextConfig, VisionConfig, VLMConfig
from ..decoder import DecoderLayer, Rotary, rotary_table
from ..prompts import TEMPLATES
from ..vlm import LlavaModel
from . import scenes

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
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


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of one training run."""

    tower_steps: int = 2500
    tower_batch: int = 64
    tower_rate: float = 1.5e-3
    instruct_steps: int = 6000
    instruct_batch: int = 32
    muon_rate: float = 4e-3
    adam_rate: float = 1.5e-3
    text_tokens: int = 136  # room for the questions of one picture
    seed: int = 0


def build_tokenizer() -> Tokenizer:
    """A byte-fallback BPE in the exact form of LLaMA's tokenizer.json, with one token for each word of the demo."""
    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # while training only: no merge may cross a space
    trainer = BpeTrainer(vocab_size=2000, special_tokens=[*specials, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(BPE(learned["vocab"], merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
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
        scene = scenes.sample_scene(rng, rng.randint(1, scenes.MAX_THINGS))
        asked = [scenes.ask(scene, kind, rng) for kind in scenes.KINDS]
        lines += [f"\n{question.text} {question.answer}" for question in (*asked, scenes.describe(scene)) if question]
    return lines * 2


def demo_config(tokenizer: Tokenizer) -> VLMConfig:
    """12 layers, so that the paper's drop depths (10 %, 50 %, 70 %) fall on different layers."""
    text = TextConfig(
        vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=6,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
    )
    return VLMConfig(VISION, text, image_token_id=tokenizer.token_to_id("<image>"))


def initialise(model: nn.Module) -> None:
    """Normal weights of standard deviation 1 / sqrt(fan_in); output projections start at zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight", "bias")):
            nn.init.zeros_(parameter)
        elif "embed" in name or name.endswith("lm_head.weight"):
            nn.init.normal_(parameter, std=0.2)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def normalised(pictures: Tensor) -> Tensor:
    """(N, 144, 144, 3) uint8 -> (N, 3, 144, 144) float32, as the official preprocessing of a picture of this size."""
    scaled = pictures.permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)


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


class TowerBatches(torch.utils.data.IterableDataset):
    """Batches of (pictures, patch labels), drawn in a second process."""

    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = Random(self.seed)
        while True:
            drawn = [scenes.sample_scene(rng, rng.randint(1, scenes.MAX_THINGS)) for _ in range(self.batch)]
            pictures = np.stack([np.asarray(scenes.draw_scene(scene)) for scene in drawn])
            yield torch.from_numpy(pictures), torch.from_numpy(np.stack([patch_labels(scene) for scene in drawn]))


class InstructBatches(torch.utils.data.IterableDataset):
    """Batches of (pictures, token ids, turn numbers, position ids, labels), one row a picture with several questions.

    Turn 0 is the system sentence and the picture; turn t > 0 is one question with its answer; -1 is padding.
    """

    def __init__(self, tokenizer: Tokenizer, config: VLMConfig, recipe: Recipe, seed: int) -> None:
        self.tokenizer, self.config, self.recipe, self.seed = tokenizer, config, recipe, seed
        self.prefix = tokenizer.encode(TEMPLATES["vicuna_v1"]("<image>\n")).ids
        self.prefix = self.prefix[: self.prefix.index(config.image_token_id)]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        rng = Random(self.seed)
        while True:
            drawn = [scenes.sample_scene(rng, rng.randint(1, scenes.MAX_THINGS)) for _ in range(self.recipe.instruct_batch)]
            pictures = np.stack([np.asarray(scenes.draw_scene(scene)) for scene in drawn])
            rows = np.stack([self.row(scene, rng) for scene in drawn])  # (N, 4, L)
            yield torch.from_numpy(pictures), *torch.from_numpy(rows).unbind(1)

    def row(self, scene: scenes.Scene, rng: Random) -> np.ndarray:
        """(4, L): token ids, turn numbers, position ids, labels (-100 where nothing is asked)."""
        image = [self.config.image_token_id] * VISION.num_patches
        start = len(self.prefix) + len(image)
        ids, turns, positions = [*self.prefix, *image], [0] * start, list(range(start))
        labels = [-100] * start
        length = start + self.recipe.text_tokens
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
        prompt = self.tokenizer.encode(TEMPLATES["vicuna_v1"](f"<image>\n{question.text}")).ids
        answer = self.tokenizer.encode(question.answer, add_special_tokens=False).ids
        return prompt[prompt.index(self.config.image_token_id) + 1 :], [*answer, self.config.eos_token_ids[0]]


def patch_losses(model: LlavaModel, coordinates: nn.Linear, word_ids: list[Tensor], batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Cross entropy of the patch words plus where the patch is; and the accuracies on patches that show something (3,)."""
    pictures, labels = batch
    features = model.encode_images(normalised(pictures))  # (N, P, D)
    embeddings = model.language_model.embed_tokens.weight
    loss, accuracies = features.new_zeros(()), []
    for group, ids in enumerate(word_ids):
        logits, wanted = features @ embeddings[ids].T, labels[..., group]
        loss = loss + F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())
        shown = wanted != len(ids) - 1
        accuracies.append((logits.argmax(-1) == wanted)[shown].float().mean())
    axis = torch.linspace(-1, 1, VISION.grid_size)
    wanted_place = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
    return loss + F.mse_loss(coordinates(features).float(), wanted_place.expand(len(pictures), -1, -1)), torch.stack(accuracies)


def train_tower(model: LlavaModel, tokenizer: Tokenizer, recipe: Recipe, work: Path) -> None:
    """Step 1; leaves `work`/tower.pt."""
    coordinates = nn.Linear(model.config.text_config.hidden_size, 2)
    word_ids = [word_tokens(tokenizer, words) for words in PATCH_WORDS]
    trained = [*model.vision_tower.parameters(), *model.multi_modal_projector.parameters(), *coordinates.parameters()]
    trained.append(model.language_model.embed_tokens.weight)
    optimizer = torch.optim.AdamW(trained, recipe.tower_rate, betas=(0.9, 0.98), weight_decay=0.01)
    batches = torch.utils.data.DataLoader(TowerBatches(recipe.tower_batch, recipe.seed), batch_size=None, num_workers=1)
    log = Log(work / "tower.jsonl")
    for step, batch in enumerate(islice(batches, recipe.tower_steps)):
        set_rate([optimizer], step, recipe.tower_steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracies = patch_losses(model, coordinates, word_ids, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.add(step, loss=loss.item(), color=accuracies[0].item(), shape=accuracies[1].item(), digit=accuracies[2].item())
    torch.save(model.state_dict(), work / "tower.pt")


def word_tokens(tokenizer: Tokenizer, words: tuple[str, ...]) -> Tensor:
    """The token of each word as it stands after a space; every word of the demo has one of its own."""
    encoded = [tokenizer.encode(word, add_special_tokens=False).ids for word in words]
    if any(len(ids) != 1 for ids in encoded):
        raise ValueError(f"words that are not one token each: {dict(zip(words, encoded, strict=True))}")
    return torch.tensor([ids[0] for ids in encoded])


def answer_loss(model: LlavaModel, features: Tensor, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Cross entropy over the answers' tokens, and the share of those tokens that is right. features: (N, P, D)."""
    _, ids, turns, positions, labels = batch
    decoder = model.language_model
    image_token = model.config.image_token_id
    hidden_states = decoder.embed_tokens(ids.masked_fill(ids == image_token, 0))
    start = int((ids[0] == image_token).nonzero()[0])
    hidden_states = torch.cat([hidden_states[:, :start], features, hidden_states[:, start + features.shape[1] :]], 1)
    rows, length = ids.shape
    bias = turn_bias(turns)
    rotary = rotary_table(model.config.text_config, positions.flatten(), torch.bfloat16)
    hidden_states = hidden_states.flatten(0, 1)
    for layer in decoder.layers:
        hidden_states = masked_layer(layer, hidden_states, rotary, bias)
    wanted = labels.view(rows, length)[:, 1:].flatten()  # a token is predicted from the one before it
    asked = wanted != -100
    logits = decoder.lm_head(decoder.norm(hidden_states.view(rows, length, -1)[:, :-1].flatten(0, 1)[asked])).float()
    return F.cross_entropy(logits, wanted[asked]), (logits.argmax(-1) == wanted[asked]).float().mean()


def turn_bias(turns: Tensor) -> Tensor:
    """(N, L) turn numbers -> (N, 1, L, L) to add to the attention scores: a question sees the picture and itself only."""
    rows, length = turns.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = causal & ((turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None]))
    return torch.zeros(rows, 1, length, length, dtype=torch.bfloat16).masked_fill_(~visible[:, None], -torch.inf)


@torch.compile
def masked_layer(layer: DecoderLayer, hidden_states: Tensor, rotary: Rotary, bias: Tensor) -> Tensor:
    """One decoder layer with an attention bias. hidden_states: (N * L, D), packed.

    Plain matrix products: on this CPU their backward pass is twice as fast as scaled_dot_product_attention's, and compiled
    the whole layer takes a third less.
    """
    rows, length = bias.shape[0], bias.shape[-1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (heads.unflatten(0, (rows, length)).transpose(1, 2) for heads in (q, k, v))
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + bias).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(0, 1)

    return layer(hidden_states, rotary, attend)


def train_instruct(model: LlavaModel, tokenizer: Tokenizer, recipe: Recipe, work: Path) -> None:
    """Step 2; writes `work`/instruct.pt every 250 steps and goes on from it."""
    model.vision_tower.requires_grad_(False)
    decoder = model.language_model
    matrices = [parameter for parameter in decoder.layers.parameters() if parameter.dim() == 2]
    taken = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, recipe.muon_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    start = resume(work / "instruct.pt", model, optimizers)
    data = InstructBatches(tokenizer, model.config, recipe, recipe.seed + 1000 + start)
    batches = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1)
    log = Log(work / "instruct.jsonl")
    for step, batch in enumerate(islice(batches, recipe.instruct_steps - start), start):
        set_rate(optimizers, step, recipe.instruct_steps)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                seen = model.vision_tower(normalised(batch[0]))
            loss, accuracy = answer_loss(model, model.multi_modal_projector(seen), batch)
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        log.add(step, loss=loss.item(), accuracy=accuracy.item())
        if (step + 1) % 250 == 0 or step + 1 == recipe.instruct_steps:
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizers": states}, work / "instruct.pt")


def resume(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Load a checkpoint where there is one; returns the step to go on from."""
    if not path.is_file():
        return 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return saved["step"]


def set_rate(optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    """Linear warm-up over 100 steps, constant to the middle, then a line down to zero."""
    factor = min((step + 1) / 100, 1.0, 2 * (steps - step) / steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * factor


class Log:
    """One JSON line every 25 steps: means since the last line, and steps a second."""

    def __init__(self, path: Path) -> None:
        self.path, self.since, self.sums = path, time.perf_counter(), dict[str, float]()

    def add(self, step: int, **values: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value / 25
        if (step + 1) % 25 == 0:
            now = time.perf_counter()
            line = {"step": step + 1, **{n: round(v, 4) for n, v in self.sums.items()}, "seconds": round(now - self.since, 1)}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
            self.since, self.sums = now, {}


def main() -> None:
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint in the official layout")
    parser.add_argument("--work", type=Path, required=True, help="folder for training checkpoints and logs")
    for name in ("tower_steps", "instruct_steps", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(recipe, name))
    arguments = vars(parser.parse_args())
    output, work = arguments.pop("output"), arguments.pop("work")
    work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(**{**asdict(recipe), **arguments})
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    model = LlavaModel(demo_config(tokenizer))
    initialise(model)
    if not (work / "tower.pt").is_file():
        train_tower(model, tokenizer, recipe, work)
    model.load_state_dict(torch.load(work / "tower.pt", weights_only=True))
    train_instruct(model, tokenizer, recipe, work)


if __name__ == "__main__":
    main()
