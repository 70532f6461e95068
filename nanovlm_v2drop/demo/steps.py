"""The two training steps: the tower learns to name patches, then projector and decoder learn to answer.

Shapes: N pictures or clips, P patches of one picture, D hidden_size, L tokens of one row.
"""

import json
import time
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..models.decoder import Rotary, rotary_table
from ..models.vlm import LlavaModel, LlavaOnevisionModel
from .data import PATCH_WORDS, VISION, TowerBatches, word_tokens
from .recipe import Demo, Recipe

Model = LlavaModel | LlavaOnevisionModel
QUERY_BLOCKS = 3  # parts into which masked_layer splits its queries


def initialise(model: nn.Module) -> None:
    """Draw normal weights with a standard deviation of 1 / sqrt(fan_in); output projections start at zero."""
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
    """The loss of step 1, and the accuracies (3,) on patches that show something.

    The loss is the cross entropy of the three words of each patch, plus the squared error of the patch's coordinates.
    """
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
    """Step 1. Saves `work`/tower.pt."""
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
    """Cross entropy over the answers' tokens, and the share of these tokens that is right.

    features: (N, vision tokens, D); in every row they replace the media tokens, the first of which is token `start`.
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
    wanted = labels.view(rows, length)[:, 1:].flatten()  # the token before predicts it
    asked = wanted != -100
    logits = decoder.lm_head(decoder.norm(hidden_states.view(rows, length, -1)[:, :-1].flatten(0, 1)[asked])).float()
    return F.cross_entropy(logits, wanted[asked]), (logits.argmax(-1) == wanted[asked]).float().mean()


def turn_bias(turns: Tensor) -> Tensor:
    """(N, L) turn numbers -> (N, 1, L, L) to add to attention scores, so that a question sees only the picture and itself."""
    rows, length = turns.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = causal & ((turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None]))
    return torch.zeros(rows, 1, length, length, dtype=torch.bfloat16).masked_fill_(~visible[:, None], -torch.inf)


@torch.compile
def masked_layer(layer: nn.Module, hidden_states: Tensor, rotary: Rotary, bias: Tensor) -> Tensor:
    """One decoder layer with an attention bias (N, 1, L, L) that hides at least the future. hidden_states: (N * L, D), packed.

    Attention is written as plain matrix products. On the CPU of the training their backward pass was twice as fast as that
    of scaled_dot_product_attention, and compiling the layer saved another third. Queries are split into blocks, because
    early queries need no late keys.
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
    """Step 2. Saves `work`/instruct.pt every 250 steps and continues from it after an interruption."""
    model.vision_tower.requires_grad_(False)
    optimizers = instruct_optimizers(model, recipe)
    start = resume(work / "instruct.pt", model, optimizers)
    data = demo.instruct_batches(tokenizer, recipe, recipe.seed + 1000 + start)  # new pictures after an interruption
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
        update(optimizers)
        log.add(step, loss=loss.item(), accuracy=accuracy.item())
        if (step + 1) % 250 == 0 or step + 1 == stop:
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizers": states}, work / "instruct.pt")


def instruct_optimizers(model: Model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's matrices and AdamW for every other parameter that is trained."""
    matrices = [parameter for parameter in model.language_model.layers.parameters() if parameter.dim() == 2]
    taken = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [
        torch.optim.Muon(matrices, recipe.muon_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def update(optimizers: list[torch.optim.Optimizer]) -> None:
    """One step of all optimizers, with gradients clipped to a norm of 1 over all their parameters."""
    trained = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(trained, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def resume(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Load the checkpoint if it exists; returns the number of steps that it has already done."""
    if not path.is_file():
        return 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return saved["step"]


def set_rate(optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    """Raise the rate over 100 steps, keep it until four fifths of the steps, then lower it linearly to zero."""
    factor = min((step + 1) / 100, 1.0, 5 * (steps - step) / steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * factor


class Log:
    """Writes one JSON line every 25 steps: the means since the last line, and the seconds that these steps took."""

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
