"""How weights/demo was made: a small LLaVA trained from nothing on the scenes of scenes.py, on two CPU cores.

    python -m nanovlm_v2drop.demo.train --output weights/demo --work runs/demo

Three steps, in the order of LLaVA's own recipe:
1. tower: every patch names the colour, shape and digit that it shows, in the decoder's own word embeddings. This trains
   tower, projector and embeddings together and stands for CLIP's pre-training: without it, end-to-end training sits on a
   text-only plateau for very long.
2. instruct: the tower is frozen, as in LLaVA-1.5; projector and decoder learn to answer. All questions about a picture share
   one pass over it and cannot see each other, so that each is trained exactly as it will be asked: alone. For the last
   third weight decay is raised, as large models are trained with: without it the layers keep writing large updates into
   background tokens that nobody reads, and how much a token changes says nothing about what it is worth.
3. export: safetensors in the official LLaVA layout.

Both training steps write checkpoints into --work and go on from them.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..config import TextConfig, VLMConfig
from ..decoder import Rotary, rotary_table
from ..images import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from ..vlm import LlavaModel
from .data import PATCH_WORDS, VISION, InstructBatches, TowerBatches, corpus, llama_tokenizer, normalised, word_tokens


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
    text_tokens: int = 136  # room for the questions of one picture
    seed: int = 0


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
    return VLMConfig(VISION, text, image_token_id=tokenizer.get_vocab()["<image>"])


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
    model: LlavaModel, coordinates: nn.Linear, word_ids: list[Tensor], batch: list[Tensor]
) -> tuple[Tensor, Tensor]:
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
    parts = (model.vision_tower, model.multi_modal_projector, coordinates, model.language_model.embed_tokens)
    trained = [parameter for part in parts for parameter in part.parameters()]
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
def masked_layer(layer: nn.Module, hidden_states: Tensor, rotary: Rotary, bias: Tensor) -> Tensor:
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
        torch.optim.Muon(matrices, recipe.muon_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    start = resume(work / "instruct.pt", model, optimizers)
    seed = recipe.seed + 1000 + start  # new pictures after an interruption
    data = InstructBatches(tokenizer, model.config, recipe.instruct_batch, recipe.text_tokens, seed)
    batches = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1)
    log = Log(work / "instruct.jsonl")
    stop = min(recipe.stop_step, recipe.instruct_steps)
    for step, batch in enumerate(islice(batches, max(stop - start, 0)), start):
        set_rate(optimizers, step, recipe.instruct_steps)
        for group in optimizers[0].param_groups:
            group["weight_decay"] = recipe.weight_decay if step < recipe.late_step else recipe.late_weight_decay
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


def export(model: LlavaModel, tokenizer: Tokenizer, output: Path) -> None:
    """Step 3: the files that llava-hf publishes, in float16 and under its names."""
    output.mkdir(parents=True, exist_ok=True)
    tensors = {official_name(name): value.half().contiguous() for name, value in model.state_dict().items()}
    save_file({**unused_tensors(tensors), **tensors}, output / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(output / "tokenizer.json"))
    for name, content in official_settings(model.config, tokenizer).items():
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def official_name(name: str) -> str:
    """Our parameter name as llava-hf stores it."""
    if name.startswith("language_model."):
        inner = name.removeprefix("language_model.")
        return name if inner.startswith("lm_head") else f"language_model.model.{inner}"
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def unused_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the layout holds and LLaVA never reads: the tower's last block (zeros: it would change nothing) and its norm."""
    tower, last = "vision_tower.vision_model.", VISION.num_hidden_layers - 1
    first_block = f"{tower}encoder.layers.0."
    block = {
        name.replace(".layers.0.", f".layers.{last}."): torch.zeros_like(value)
        for name, value in tensors.items()
        if name.startswith(first_block)
    }
    norm, width = f"{tower}post_layernorm.", VISION.hidden_size
    return {**block, f"{norm}weight": torch.ones(width).half(), f"{norm}bias": torch.zeros(width).half()}


def official_settings(config: VLMConfig, tokenizer: Tokenizer) -> dict[str, dict[str, object]]:
    """config.json and its companions, as llava-hf/llava-1.5-7b-hf has them."""
    size, pad = config.vision_config.image_size, tokenizer.get_vocab()["<pad>"]
    text = {**asdict(config.text_config), "model_type": "llama", "torch_dtype": "float16"}
    derived = ("qkv_bias", "mrope_section")  # ours, not Hugging Face's
    return {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": config.image_token_id,
            "pad_token_id": pad,
            "projector_hidden_act": "gelu",
            "text_config": {name: value for name, value in text.items() if name not in derived},
            "torch_dtype": "float16",
            "vision_config": {**asdict(config.vision_config), "model_type": "clip_vision_model"},
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": "default",
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": config.eos_token_ids[0], "pad_token_id": pad},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "model_max_length": config.text_config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "image_mean": list(CLIP_IMAGE_MEAN),
            "image_std": list(CLIP_IMAGE_STD),
            "do_convert_rgb": True,
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": VISION.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
        },
    }


def main() -> None:
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint in the official layout")
    parser.add_argument("--work", type=Path, required=True, help="folder for training checkpoints and logs")
    for name in ("tower_steps", "instruct_steps", "late_step", "stop_step", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(recipe, name))
    arguments = vars(parser.parse_args())
    output, work = arguments.pop("output"), arguments.pop("work")
    work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(**{**asdict(recipe), **arguments})
    torch.manual_seed(recipe.seed)
    tokenizer = llama_tokenizer(corpus())
    model = LlavaModel(demo_config(tokenizer))
    initialise(model)
    tower = work / "tower.pt"
    if not tower.is_file():
        train_tower(model, tokenizer, recipe, work)
    model.load_state_dict(torch.load(tower, weights_only=True))
    train_instruct(model, tokenizer, recipe, work)
    export(model, tokenizer, output)


if __name__ == "__main__":
    main()
