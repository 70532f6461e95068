"""Every method with drop points where it can act in the tiny decoders."""

import pytest

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule

SCHEDULE = DropSchedule({1: 0.5, 3: 0.3, 4: 0.0})
every_method = pytest.mark.parametrize("name", DROPPERS)


def make(name, share=None, **options):
    """The method with drop points where it can act: before the decoder, or SCHEDULE's."""
    layers = [0] if DROPPERS[name].latest_layer == 0 else list(SCHEDULE)
    shares = {layer: SCHEDULE.get(layer, 0.5) if share is None else share for layer in layers}
    return DROPPERS[name](DropSchedule(shares), **options)
