"""Start the training of demo-video from the weights of demo, which has the same widths in another family's layout.

A LLaMA layer is a Qwen2 layer with zero biases. The new tower takes the three blocks that LLaVA runs. It has neither a class
token nor a norm before the blocks, so it needs a short training of its own.
"""

from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..loading.zoo import load
from ..models.decoder import Decoder
from ..models.vlm import LlavaOnevisionModel
from ..processing.images import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD

# Tokens of the new vocabulary that the old one spells differently.
SAME_TOKENS = {"<|im_end|>": "</s>", "Ċ": "<0x0A>"}


@torch.no_grad()
def warm_start(model: LlavaOnevisionModel, tokenizer: Tokenizer) -> None:
    """Copy demo's weights into a LLaVA-OneVision of the same widths; tensors that demo lacks keep their values."""
    demo = load("demo")
    new, old = model.state_dict(), demo.model.state_dict()  # views: copying into them changes the model
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
    """Whether the tensor's rows have another meaning in the new model: words, or places in the picture."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight", "position_embedding.weight", "patch_embedding.weight"))


def word_pairs(tokenizer: Tokenizer, old_id: Callable[[str], int | None]) -> list[tuple[int, int]]:
    """(new id, old id) of every token that both vocabularies have.

    A word without a space before it starts from the old word with a space.
    """
    pairs = []
    for token, new in tokenizer.get_vocab().items():
        text = SAME_TOKENS.get(token) or tokenizer.decode([new], skip_special_tokens=False)
        candidates = ("▁" + text.removeprefix(" "), text, text.removeprefix(" "))
        known = [old for old in map(old_id, candidates) if old is not None]
        pairs += [(new, known[0])] if known else []
    return pairs


def copy_words(decoder: Decoder, old: Decoder, pairs: list[tuple[int, int]]) -> None:
    """Copy the rows of embedding and head for each pair (new id, old id)."""
    new_rows, old_rows = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
    decoder.embed_tokens.weight[new_rows] = old.embed_tokens.weight[old_rows]
    decoder.lm_head.weight[new_rows] = old.lm_head.weight[old_rows]


def renormalised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a patch embedding that gives for pixels from -1 to 1 what `weight` gives for CLIP's pixels."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_IMAGE_MEAN, CLIP_IMAGE_STD))
    return weight * 0.5 / std, (weight * (0.5 - mean) / std).sum((1, 2, 3))
