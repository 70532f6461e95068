"""Watch one request on its way through the decoder: what every layer is given, what leaves, and what is answered.

    watched = watch(vlm, Request(text="What digit is on the red circle?", images=["scene.png"]), V2Drop(schedule))
    watched.variation(3), watched.kept, watched.answer
    watched.picture(8).save("layer8.png")

Shapes: L layers, T tokens of which n are vision tokens, D hidden_size, H query heads, V vocabulary.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from ..dropping import V2Drop
from ..dropping.base import PrefillState, TokenDropper
from ..dropping.budget import shapes_of
from ..dropping.contract import check_kept, is_own
from ..dropping.schedule import DropSchedule
from ..inference import MAX_NEW_TOKENS, NothingDropped, check_options, decode_tokens, decode_until, prefill
from ..loading.zoo import VisionLanguageModel
from ..models.attention import attention_weights
from ..models.decoder import ModuleOutputs
from ..models.kv_cache import DecodePruning
from ..processing.prompts import Request
from .gallery import board_of, fade_dropped


@dataclass(frozen=True)
class Watched:
    """One request on its way through the decoder, and its answer.

    `states` has L + 1 entries. `states[l]` is what a dropping method sees at the entrance of layer l, before anything leaves
    there, and `states[L]` is the state behind the last layer. Keep in mind that `states[l].previous` is the input of layer
    l - 1 after its drop. `kept` maps the layer of each drop point to the numbers of the vision tokens that stay there.
    """

    vlm: VisionLanguageModel
    request: Request
    states: tuple[PrefillState, ...]
    kept: Mapping[int, Tensor]
    logits: Tensor  # (V,) of the prompt's last token
    answer: str

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """Frames, rows and columns of tokens of each picture, tile or video."""
        return self.states[0].vision_grids[0]

    def hidden_states(self, layer_idx: int) -> Tensor:
        """(n, D) the vision tokens at the entrance of layer `layer_idx`, before anything leaves there."""
        state = self.states[layer_idx]
        return state.hidden_states[state.vision_mask]

    def variation(self, layer_idx: int) -> Tensor:
        """(n,) how far layer `layer_idx` - 1 moved each vision token, in L2: what V2Drop ranks by at `layer_idx`."""
        return self.scores(V2Drop(DropSchedule({})), layer_idx)

    def scores(self, method: TokenDropper, layer_idx: int) -> Tensor:
        """(n,) what a method would score the vision tokens at the entrance of layer `layer_idx`.

        Raises ValueError for a layer that the method cannot work at.
        """
        latest = len(self.states) - 1 if method.latest_layer is None else method.latest_layer
        if not method.earliest_layer <= layer_idx <= latest:
            raise ValueError(f"{method.name} works at layers {method.earliest_layer} to {latest}, not at {layer_idx}")
        state = self.states[layer_idx]
        return method.score(state)[state.vision_mask]

    def attention(self, layer_idx: int) -> Tensor:
        """(H, T) what each head of layer `layer_idx` gives to each token for the prompt's last token; every row sums to 1."""
        queries, keys = self.states[layer_idx + 1].queries_and_keys()
        last = torch.tensor([len(keys) - 1], device=keys.device)
        return attention_weights(queries[last], keys, last)[:, 0]

    def picture(self, layer_idx: int) -> Image.Image:
        """The picture as the vision tower sees it; patches whose tokens do not enter layer `layer_idx` are faded.

        The frames of a video stand side by side. Raises ValueError for a request without picture and video.
        """
        if not self.grids:
            raise ValueError("this request has neither picture nor video, so there is nothing to draw")
        board = board_of(self.vlm, self.request)
        numbers = self.kept[max(drops)] if (drops := [layer for layer in self.kept if layer <= layer_idx]) else None
        places = range(len(board.cells)) if numbers is None else numbers.tolist()
        return fade_dropped(board.picture, board.places(places), board.grid)


class NoDropper(TokenDropper):
    """Drops nothing."""

    name = "dense"


class Watcher(TokenDropper):
    """Notes the state at the entrance of each layer, and otherwise does what `dropper` does."""

    def __init__(self, dropper: TokenDropper, num_layers: int) -> None:
        super().__init__(DropSchedule(dict.fromkeys(range(num_layers), 1.0)), cut_cache=dropper.cut_cache)
        self.dropper, self.name, self.renumbers = dropper, dropper.name, dropper.renumbers
        self.states: list[PrefillState] = []

    @property
    def layers_read(self) -> frozenset[int]:
        return frozenset(self.schedule)

    @property
    def layers_observed(self) -> frozenset[int]:
        return self.dropper.layers_observed

    def observe(self, state: PrefillState, outputs: ModuleOutputs) -> None:
        self.dropper.observe(state, outputs)

    def begin(self, state: PrefillState) -> PrefillState:
        return self.dropper.begin(state)

    def __call__(self, state: PrefillState) -> PrefillState:
        self.states.append(replace(state))
        if state.layer_idx not in self.dropper.schedule:
            return state
        after = self.dropper(state)
        if not is_own(type(self.dropper)):
            check_kept(self.dropper, state, after)
        return after

    def decode_pruning(self, state: PrefillState) -> DecodePruning | None:
        """Prefill asks this behind the last layer, so the last state is noted here."""
        self.states.append(state)
        return self.dropper.decode_pruning(state)


def watch(
    vlm: VisionLanguageModel,
    request: Request,
    dropper: TokenDropper | type[TokenDropper] | None = None,
    *,
    tokens: float | None = None,
    retain: float | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Watched:
    """Answer a request as `generate` does, and return everything that the decoder's layers were given.

    This keeps the input, queries and keys of every layer in memory. Without a dropper every token goes through all layers.
    `dropper`, `tokens` and `retain` are those of `generate`, and so are the errors raised.
    """
    budget = check_options(vlm, dropper, tokens, retain, max_new_tokens)
    packed, decoder = vlm.prepare([request]), vlm.model.language_model
    num_layers = decoder.config.num_hidden_layers
    if isinstance(dropper, type):
        assert budget is not None  # check_options
        dropper = budget.dropper(dropper, shapes_of(packed, num_layers))
    dropper = dropper or NoDropper(DropSchedule({}))
    dropper.check(num_layers)
    watcher = Watcher(dropper, num_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingDropped)  # a watcher may drop nothing: `kept` says what left
        prefilled = prefill(decoder, packed, watcher, max_new_tokens=max_new_tokens)
    kept = {layer: numbers for layer, (numbers,) in prefilled.kept if layer in dropper.schedule}
    logits = prefilled.logits[0].clone()
    (ids,) = decode_until(decode_tokens(decoder, prefilled), vlm.config.eos_token_ids, max_new_tokens)
    return Watched(vlm, request, tuple(watcher.states), kept, logits, vlm.tokenizer.decode(ids).strip())
