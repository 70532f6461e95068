"""demo-video begins where demo ended: the same things, words and widths, in another family's layout.

A LLaMA layer is a Qwen2 layer whose biases are zero. The tower keeps three of demo's blocks, the ones that LLaVA runs, and
loses the class token and the norm before the blocks, so it has to be trained again, briefly.
"""

from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..loading.zoo import load
from ..models.decoder import Decoder
from ..models.vlm import LlavaOnevisionModel
from ..processing.images import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD

# Tokens of the new vocabulary that are spelled otherwise in the old one.
SAME_TOKENS = {"<|im_end|>": "</s>", "Ċ": "<0x0A>"}


@torch.no_grad()
def warm_start(model: LlavaOnevisionModel, tokenizer: Tokenizer) -> None:
    """Copy what demo's weights hold into a LLaVA-OneVision of the same widths; what demo has not keeps its value."""
    demo = load("demo")
    new, old = model.state_dict(), demo.model.state_dict()  # views: what is copied into them is in the model
    for name in old.keys() & new.keys():
        if not is_row_table(name):
            new[name].copy_(old[name])
    copy_words(model.language_model, demo.model.language_model, word_pairs(tokenizer, demo.tokenizer.token_to_id))
    embeddings = "vision_tower.embeddings."
    new[f"{embeddings}position_embedding.weight"].copy_(old[f"{embeddings}position_embedding.weight"][1:])  # 0: class token
    weight, bias = renormalised(old[f"{embeddings}patch_embedding.weight"])
    new[f"{embeddings}patch_embedding.weight"].copy_(weight)
    new[f"{embeddings}patch_embedding.bias"].copy_(bias)


def is_row_table(name: str) -> bool:
    """Tensors whose rows mean something else in the new model: words, and places in the picture."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight", "position_embedding.weight", "patch_embedding.weight"))


def word_pairs(tokenizer: Tokenizer, old_id: Callable[[str], int | None]) -> list[tuple[int, int]]:
    """(new id, old id) of every token that both know; a word without a space before it begins as the one with it."""
    pairs = []
    for token, new in tokenizer.get_vocab().items():
        text = SAME_TOKENS.get(token) or tokenizer.decode([new], skip_special_tokens=False)
        candidates = ("▁" + text.removeprefix(" "), text, text.removeprefix(" "))
        known = [old for old in map(old_id, candidates) if old is not None]
        pairs += [(new, known[0])] if known else []
    return pairs


def copy_words(decoder: Decoder, old: Decoder, pairs: list[tuple[int, int]]) -> None:
    new_rows, old_rows = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
    decoder.embed_tokens.weight[new_rows] = old.embed_tokens.weight[old_rows]
    decoder.lm_head.weight[new_rows] = old.lm_head.weight[old_rows]


def renormalised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a patch embedding that sees pixels scaled to -1 .. 1 as `weight` sees CLIP's."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_IMAGE_MEAN, CLIP_IMAGE_STD))
    return weight * 0.5 / std, (weight * (0.5 - mean) / std).sum((1, 2, 3))
