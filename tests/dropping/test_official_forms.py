"""Which invariants of the equal-budget forms the released codes break, measured on their published options."""

from dataclasses import replace

import pytest
import torch
from tiny import one_prompt, tiny_decoder

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule
from nanovlm_v2drop.inference import prefill

POSITIONS = "kept tokens have the position ids of the prompt"
ROWS = "every vision row is a row of the prompt"
ORDER = "vision tokens stand in reading order"
CACHE = "layers before a drop keep all tokens in their caches"

# A method that is not named breaks none.
BROKEN = {
    "pdrop": {POSITIONS},
    "dycoke": {POSITIONS},
    "divprune": {POSITIONS},
    "cdpruner": {POSITIONS},
    "vidcom2": {POSITIONS},
    "transprune": {POSITIONS},
    "visionzip": {POSITIONS, ROWS},
    "tome": {POSITIONS, ROWS},
    "sparsevlm": {POSITIONS, ROWS},
    "fastvid": {ROWS},
    "holov": {POSITIONS, ROWS, ORDER},  # zero rows, and runs in order of falling attention
    "clse": {CACHE},
}


def broken_by(dropper) -> set[str]:
    """What breaks in a run with the drop points of this dropper."""
    decoder, packed, found = tiny_decoder(), one_prompt(5, 36, 7), set()
    # Of HoloV's runs of three, the first gets more tokens than it has and the second two of its three.
    attention = torch.tensor([[1.0, 1.0, 1.0, 0.1, 0.15, 0.05, *[0.01] * 30]])
    packed.vision = tuple(replace(trace, received_attention=lambda: attention) for trace in packed.vision)
    call = type(dropper).__call__

    def watched(self, state):
        after = call(self, state)
        numbers = after.vision_indices[after.vision_mask]
        old = {int(number): row for row, number in enumerate(state.vision_indices) if number >= 0}
        rows = [old.get(int(number)) for number in numbers]
        if not all(row is not None and torch.equal(state.hidden_states[row], after.hidden_states[after.vision_mask][place])
                   for place, row in enumerate(rows)):  # fmt: skip
            found.add(ROWS)
        known = numbers[numbers >= 0].tolist()
        if known != sorted(known):
            found.add(ORDER)
        kept = torch.tensor([row for row in rows if row is not None])
        wanted = state.position_ids[kept]
        if not torch.equal(after.position_ids[after.vision_mask][[row is not None for row in rows]], wanted):
            found.add(POSITIONS)
        return after

    watching = type("Watching", (type(dropper),), {"__call__": watched, "__module__": type(dropper).__module__})
    dropper.__class__ = watching
    out = prefill(decoder, packed, dropper)
    if out.cache.seqlens[0] != (48,) and min(dropper.schedule) > 0:
        found.add(CACHE)
    return found


@pytest.mark.parametrize("name", [name for name in DROPPERS if DROPPERS[name].published])
def test_the_released_codes_break_these_invariants_and_no_others(name):
    method = DROPPERS[name]
    options = next(iter(method.published.values())).options
    layers = [0] if method.latest_layer == 0 else [2, 4]
    dropper = method(DropSchedule(dict.fromkeys(layers, 0.5)), **options)
    assert broken_by(dropper) == BROKEN.get(name, set())
