"""How weights/demo and weights/demo-video were made: small models trained on the scenes of scenes.py and the clips of clips.py.

    python -m nanovlm_v2drop.demo.train --model demo --output weights/demo --work runs/demo
    python -m nanovlm_v2drop.demo.train --model demo-video --output weights/demo-video --work runs/demo-video

Three steps, in the order of LLaVA's own recipe, on two CPU cores:
1. tower: every patch names the colour, shape and digit that it shows, in the decoder's own word embeddings. This trains
   tower, projector and embeddings together and stands for CLIP's pre-training: without it, end-to-end training sits on a
   text-only plateau for very long.
2. instruct: the tower is frozen, as in LLaVA-1.5; projector and decoder learn to answer. All questions about a picture or
   clip share one pass over it and cannot see each other, so that each is trained exactly as it will be asked: alone. Late
   in the step weight decay is raised, as large models are trained with: without it the layers keep writing large updates
   into background tokens that nobody reads, and how much a token changes says nothing about what it is worth.
3. export: safetensors in the official layout (export.py).

demo is trained from nothing, demo-video from the weights of demo (warm_start.py). Both training steps write checkpoints into
--work and go on from them.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..models.arrange import arrange_video
from ..models.config import LlavaConfig, TextConfig, VLMConfig
from ..models.decoder import Rotary, rotary_table
from ..models.vlm import LlavaModel, LlavaOnevisionModel
from ..processing.images import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from ..processing.images_onevision import SIGLIP_IMAGE_MEAN, SIGLIP_IMAGE_STD
from . import clips
from .data import (
    CLIPS,
    PATCH_WORDS,
    SCENES,
    VISION,
    InstructBatches,
    TowerBatches,
    World,
    corpus,
    llama_tokenizer,
    normalised,
    qwen2_tokenizer,
    video_corpus,
    word_tokens,
)
from .export import export_llava, export_onevision, onevision_settings
from .warm_start import warm_start

Model = LlavaModel | LlavaOnevisionModel
QUERY_BLOCKS = 3  # parts that masked_layer takes its queries in


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of one training run."""

    tower_steps: int = 2500
    tower_batch: int = 64
    tower_rate: float = 1.5e-3
    instruct_steps: int = 2000
    instruct_batch: int = 32
    muon_rate: float = 4e-3
    adam_rate: float = 1.5e-3
    weight_decay: float = 0.02
    late_weight_decay: float = 1.5  # from late_step on: takes away what training left in the layers without a use
    late_step: int = 1250
    stop_step: int = 2000  # an earlier one exports what has been learnt by then
    text_tokens: int = 136  # room for the questions of one picture or clip
    seed: int = 0


def demo_config(tokenizer: Tokenizer) -> LlavaConfig:
    """12 layers, so that the paper's drop depths (10 %, 50 %, 70 %) fall on different layers."""
    text = TextConfig(
        vocab_size=padded_vocabulary(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=6,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
    )
    return LlavaConfig(text, tokenizer.get_vocab()["<image>"], vision_config=VISION)


def demo_video_config(tokenizer: Tokenizer) -> VLMConfig:
    """The decoder of the demo with Qwen2's biases; tower and projector as wide as the demo's, in SigLIP's layout."""
    settings = onevision_settings(tokenizer, padded_vocabulary(tokenizer))
    return VLMConfig.from_official(settings["config.json"], settings["generation_config.json"]["eos_token_id"])


def padded_vocabulary(tokenizer: Tokenizer) -> int:
    return -(-tokenizer.get_vocab_size() // 64) * 64


def picture_features(model: LlavaModel, seen: Tensor) -> Tensor:
    """What the tower saw in N pictures (N, P, V) -> vision tokens (N, P, D)."""
    return model.multi_modal_projector(seen)


def clip_features(model: LlavaOnevisionModel, seen: Tensor) -> Tensor:
    """What the tower saw in N clips (N * F, P, V) -> vision tokens (N, F * pooled patches + 1, D)."""
    frames = model.multi_modal_projector(seen).unflatten(0, (-1, clips.FRAMES))
    newline = model.image_newline.to(frames.dtype)
    return torch.stack([arrange_video(clip, newline, *model.config.video_layout) for clip in frames])


@dataclass(frozen=True)
class Demo:
    """What differs between the two demos.

    `media_features` makes a batch's vision tokens, in the decoder's order, of what the frozen tower saw in its pictures;
    `warm` says whether training starts from the weights of demo.
    """

    world: World
    make_tokenizer: Callable[[], Tokenizer]
    make_config: Callable[[Tokenizer], VLMConfig]
    make_model: Callable[[Any], Any]
    media_features: Callable[[Any, Tensor], Tensor]
    export: Callable[[Any, Tokenizer, Path], None]
    vision_tokens: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    recipe: Recipe
    warm: bool = False

    def pixel_values(self, pictures: Tensor) -> Tensor:
        """(N, 144, 144, 3) or (N, F, 144, 144, 3) uint8 -> (N or N * F, 3, 144, 144) float32"""
        return normalised(pictures.reshape(-1, *pictures.shape[-3:]), self.image_mean, self.image_std)

    def instruct_batches(self, tokenizer: Tokenizer, recipe: Recipe, seed: int) -> InstructBatches:
        eos_token = self.make_config(tokenizer).eos_token_ids[0]
        return InstructBatches(
            self.world,
            tokenizer,
            eos_token=eos_token,
            vision_tokens=self.vision_tokens,
            batch=recipe.instruct_batch,
            text_tokens=recipe.text_tokens,
            seed=seed,
        )


DEMOS = {
    "demo": Demo(
        world=SCENES,
        make_tokenizer=lambda: llama_tokenizer(corpus()),
        make_config=demo_config,
        make_model=LlavaModel,
        media_features=picture_features,
        export=export_llava,
        vision_tokens=VISION.num_patches,
        image_mean=CLIP_IMAGE_MEAN,
        image_std=CLIP_IMAGE_STD,
        recipe=Recipe(),
    ),
    "demo-video": Demo(
        world=CLIPS,
        make_tokenizer=lambda: qwen2_tokenizer(video_corpus()),
        make_config=demo_video_config,
        make_model=LlavaOnevisionModel,
        media_features=clip_features,
        export=export_onevision,
        vision_tokens=clips.FRAMES * (-(-VISION.grid_size // 2)) ** 2 + 1,
        image_mean=SIGLIP_IMAGE_MEAN,
        image_std=SIGLIP_IMAGE_STD,
        recipe=Recipe(
            tower_steps=600,
            tower_rate=1e-3,
            instruct_steps=2200,
            instruct_batch=16,
            muon_rate=2e-3,
            adam_rate=1e-3,
            late_step=1400,
            stop_step=2200,
            text_tokens=192,
        ),
        warm=True,
    ),
}


def initialise(model: nn.Module) -> None:
    """Normal weights of standard deviation 1 / sqrt(fan_in); output projections start at zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight", "bias")):
            nn.init.zeros_(parameter)
        elif "embed" in name or name.endswith("lm_head.weight"):
            nn.init.normal_(parameter, std=0.2)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def patch_losses(
    model: Model, coordinates: nn.Linear, word_ids: list[Tensor], pixel_values: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the patch words plus where the patch is; and the accuracies on patches that show something (3,)."""
    features = model.multi_modal_projector(model.vision_tower(pixel_values))  # (N, P, D)
    embeddings = model.language_model.embed_tokens.weight
    loss, accuracies = features.new_zeros(()), []
    for group, ids in enumerate(word_ids):
        logits, wanted = features @ embeddings[ids].T, labels[..., group]
        loss = loss + F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())
        shown = wanted != len(ids) - 1
        accuracies.append((logits.argmax(-1) == wanted)[shown].float().mean())
    axis = torch.linspace(-1, 1, VISION.grid_size)
    wanted_place = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
    return loss + F.mse_loss(coordinates(features).float(), wanted_place.expand(len(features), -1, -1)), torch.stack(accuracies)


def train_tower(demo: Demo, model: Model, tokenizer: Tokenizer, recipe: Recipe, work: Path) -> None:
    """Step 1; leaves `work`/tower.pt."""
    coordinates = nn.Linear(model.multi_modal_projector.linear_2.out_features, 2)
    word_ids = [word_tokens(tokenizer, words) for words in PATCH_WORDS]
    parts = (model.vision_tower, model.multi_modal_projector, coordinates, model.language_model.embed_tokens)
    trained = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(trained, recipe.tower_rate, betas=(0.9, 0.98), weight_decay=0.01)
    batches = torch.utils.data.DataLoader(TowerBatches(recipe.tower_batch, recipe.seed), batch_size=None, num_workers=1)
    log = Log(work / "tower.jsonl")
    for step, (pictures, labels) in enumerate(islice(batches, recipe.tower_steps)):
        set_rate([optimizer], step, recipe.tower_steps)
        pixel_values = demo.pixel_values(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracies = patch_losses(model, coordinates, word_ids, pixel_values, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.add(step, loss=loss.item(), color=accuracies[0].item(), shape=accuracies[1].item(), digit=accuracies[2].item())
    torch.save(model.state_dict(), work / "tower.pt")


def answer_loss(model: Model, features: Tensor, start: int, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Cross entropy over the answers' tokens, and the share of those tokens that is right.

    features: (N, vision tokens, D), which stand at `start` of every row in the place of the media token.
    """
    ids, turns, positions, labels = batch
    decoder = model.language_model
    stop = start + features.shape[1]
    before, behind = decoder.embed_tokens(ids[:, :start]), decoder.embed_tokens(ids[:, stop:])
    hidden_states = torch.cat([before, features, behind], 1)
    rows, length = ids.shape
    bias = turn_bias(turns)
    rotary = rotary_table(decoder.config, positions.flatten(), torch.bfloat16)
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
def masked_layer(layer: nn.Module, hidden_states: Tensor, rotary: Rotary, bias: Tensor) -> Tensor:
    """One decoder layer with an attention bias that is causal at least. hidden_states: (N * L, D), packed.

    Plain matrix products: on this CPU their backward pass is twice as fast as scaled_dot_product_attention's, and compiled
    the whole layer takes a third less. Queries go in blocks, since early ones need no late keys.
    """
    rows, length = bias.shape[0], bias.shape[-1]
    ends = [length * block // QUERY_BLOCKS for block in range(QUERY_BLOCKS + 1)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (heads.unflatten(0, (rows, length)).transpose(1, 2) for heads in (q * q.shape[-1] ** -0.5, k, v))
        blocks = [
            (q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2) + bias[:, :, start:end, :end]).softmax(-1) @ v[:, :, :end]
            for start, end in pairwise(ends)
        ]
        return torch.cat(blocks, 2).transpose(1, 2).flatten(0, 1)

    return layer(hidden_states, rotary, attend)


def train_instruct(demo: Demo, model: Model, tokenizer: Tokenizer, recipe: Recipe, work: Path) -> None:
    """Step 2; writes `work`/instruct.pt every 250 steps and goes on from it."""
    model.vision_tower.requires_grad_(False)
    decoder = model.language_model
    matrices = [parameter for parameter in decoder.layers.parameters() if parameter.dim() == 2]
    taken = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, recipe.muon_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    start = resume(work / "instruct.pt", model, optimizers)
    seed = recipe.seed + 1000 + start  # new pictures after an interruption
    data = demo.instruct_batches(tokenizer, recipe, seed)
    batches = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1)
    log = Log(work / "instruct.jsonl")
    stop = min(recipe.stop_step, recipe.instruct_steps)
    for step, (pictures, *rows) in enumerate(islice(batches, max(stop - start, 0)), start):
        set_rate(optimizers, step, recipe.instruct_steps)
        for group in optimizers[0].param_groups:
            group["weight_decay"] = recipe.weight_decay if step < recipe.late_step else recipe.late_weight_decay
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                seen = model.vision_tower(demo.pixel_values(pictures))
            loss, accuracy = answer_loss(model, demo.media_features(model, seen), len(data.prefix), rows)
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        log.add(step, loss=loss.item(), accuracy=accuracy.item())
        if (step + 1) % 250 == 0 or step + 1 == stop:
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
    """Linear warm-up over 100 steps, constant for four fifths, then a line down to zero."""
    factor = min((step + 1) / 100, 1.0, 5 * (steps - step) / steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * factor


class Log:
    """One JSON line every 25 steps: means since the last line, and how many seconds they took."""

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(DEMOS), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint in the official layout")
    parser.add_argument("--work", type=Path, required=True, help="folder for training checkpoints and logs")
    for name in ("tower_steps", "instruct_steps", "late_step", "stop_step", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: the model's recipe")
    arguments = vars(parser.parse_args())
    demo, output, work = DEMOS[arguments.pop("model")], arguments.pop("output"), arguments.pop("work")
    work.mkdir(parents=True, exist_ok=True)
    recipe = replace(demo.recipe, **{name: value for name, value in arguments.items() if value is not None})
    torch.manual_seed(recipe.seed)
    tokenizer = demo.make_tokenizer()
    model = demo.make_model(demo.make_config(tokenizer))
    initialise(model)
    if demo.warm:
        warm_start(model, tokenizer)
    tower = work / "tower.pt"
    if not tower.is_file():
        train_tower(demo, model, tokenizer, recipe, work)
    model.load_state_dict(torch.load(tower, weights_only=True))
    train_instruct(demo, model, tokenizer, recipe, work)
    demo.export(model, tokenizer, output)


if __name__ == "__main__":
    main()
