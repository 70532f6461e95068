"""4-bit layers: both ways to compute beside a slow twin."""

import pytest
import torch
from tiny import pack_together, tiny_decoder, tiny_prompts
from torch import Tensor, nn

from nanovlm_v2drop.dropping import DropSchedule, V2Drop
from nanovlm_v2drop.inference import decode_one_token, prefill
from nanovlm_v2drop.models import linear_int4
from nanovlm_v2drop.models.decoder import Decoder
from nanovlm_v2drop.models.linear_int4 import (
    FEW_ROWS,
    GROUP,
    LARGEST,
    LARGEST_MULTIPLE,
    Int4Linear,
    int4_obstacle,
    quantise_groups,
    quantise_int4,
)
from nanovlm_v2drop.models.linear_int8 import ZERO_POINT, Int8Linear, quantise_int8, quantise_rows

CPU = torch.device("cpu")
needs_int4 = pytest.mark.skipif(int4_obstacle(CPU) is not None, reason=f"int4: {int4_obstacle(CPU)}")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}


class ExactTwin(nn.Module):
    """What an Int4Linear computes, with float64 sums: few rows in bfloat16, more rows in int8."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        q, multiples, scale = quantise_groups(linear.weight.detach())
        self.q, self.steps = q.double(), (multiples * scale[:, None]).repeat_interleave(GROUP, 1)
        self.bias, self.dtype = linear.bias, dtype

    def forward(self, values: Tensor) -> Tensor:
        product = self.of_few(values) if values.numel() <= FEW_ROWS * values.shape[-1] else self.of_many(values)
        return (product if self.bias is None else product + self.bias.double()).to(self.dtype)

    def of_few(self, values: Tensor) -> Tensor:
        return values.bfloat16().double() @ (self.q * self.steps.bfloat16().double()).T

    def of_many(self, values: Tensor) -> Tensor:
        rows = quantise_rows(values)
        read = (rows.q.double() - ZERO_POINT) * rows.scale.double()
        return (read @ (self.q * self.steps.double()).T).view(*values.shape[:-1], -1)


def random_layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Int4Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(192, 320, bias=bias).requires_grad_(False)
    return linear, Int4Linear.of(linear, dtype)


@needs_int4
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(192,), (1, 192), (FEW_ROWS, 192), (FEW_ROWS + 1, 192), (3, 9, 192), (640, 192), (0, 192)])
def test_products_are_those_of_the_exact_twin(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    linear, layer = random_layer(bias, dtype)
    values = torch.randn(shape).to(dtype)
    torch.testing.assert_close(layer(values), ExactTwin(linear, dtype)(values), rtol=1.6e-2, atol=1.6e-2)


@needs_int4
@pytest.mark.parametrize("rows", [3, 30])
def test_values_that_are_not_contiguous_are_multiplied_right(rows: int) -> None:
    _, layer = random_layer()
    values = torch.randn(192, rows).T
    assert torch.equal(layer(values), layer(values.contiguous()))


@needs_int4
@pytest.mark.parametrize(("at_once", "pieces"), [(1, 5), (192 * 64, 5), (192 * 130, 3), (192 * 320, 1)])
def test_pieces_of_any_size_give_the_same_numbers(at_once: int, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = random_layer()
    values = torch.randn(40, 192)
    whole = layer(values)
    monkeypatch.setattr(linear_int4, "UNPACKED", at_once)
    assert len(layer.pieces()) == pieces
    assert torch.equal(layer(values), whole)


@needs_int4
def test_what_is_unpacked_is_what_was_quantised() -> None:
    linear, layer = random_layer()
    q, multiples, scale = quantise_groups(linear.weight)
    assert torch.equal(layer.weight, q * multiples.repeat_interleave(GROUP, 1) * scale[:, None])


@needs_int4
def test_a_product_leaves_the_weight_as_it_is() -> None:
    layer = Int4Linear.of(nn.Linear(64, 64).requires_grad_(False), torch.float32)
    before = layer.nibbles.clone()
    layer(torch.randn(30, 64))
    assert torch.equal(layer.nibbles, before)


def test_weights_are_quantised_by_groups_within_half_a_step() -> None:
    weight = torch.randn(64, 256) * torch.logspace(-3, 3, 64)[:, None]
    weight[5], weight[6, :GROUP] = 0.0, 0.0
    q, multiples, scale = quantise_groups(weight)
    assert (q.abs().amax(1)[:5] == LARGEST).all()
    assert (multiples.amax(1) == LARGEST_MULTIPLE)[:5].all()
    assert multiples.min() == multiples[6, 0] == 1  # a copy with other multiples could not be loaded
    steps = multiples.repeat_interleave(GROUP, 1) * scale[:, None]
    # Multiples are at least 5 here. Their rounding moves the largest numbers of a group, and so does that of the scale.
    assert ((q * steps - weight).abs() <= 0.5 * steps + 0.11 * weight.abs()).all()
    assert not q[5].any()
    assert not q[6, :GROUP].any()
    assert torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (64, 96)])
def test_a_shape_that_the_kernel_does_not_take_is_refused_with_the_way_out(rows: int, columns: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 64 rows and columns, not {rows} x {columns}; use int8"):
        Int4Linear.of(nn.Linear(columns, rows), torch.float32)


def decoders() -> tuple[Decoder, Decoder]:
    """A quantised decoder, and one with slow twins in place of its 4-bit layers."""
    quantised, twins = (tiny_decoder(**SIZES).requires_grad_(False) for _ in "12")
    for name, module in list(twins.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("layers."):
            parent, _, own = name.rpartition(".")
            setattr(twins.get_submodule(parent), own, ExactTwin(module, torch.float32))
    quantise_int4(quantised, torch.float32)
    for decoder in (quantised, twins):
        quantise_int8(decoder, torch.float32)
    return quantised, twins


@needs_int4
def test_the_layers_are_in_int4_and_the_head_in_int8() -> None:
    quantised, _ = decoders()
    assert {type(module) for module in quantised.layers.modules() if hasattr(module, "in_features")} == {Int4Linear}
    assert isinstance(quantised.lm_head, Int8Linear)


@needs_int4
def test_dropping_and_decoding_are_those_of_the_exact_twin() -> None:
    packed, both = pack_together(tiny_prompts(hidden_size=64)), decoders()
    runs = [prefill(decoder, packed, V2Drop(DropSchedule({2: 0.5, 4: 0.2}))) for decoder in both]
    for (layer, kept), (layer_of_twin, kept_of_twin) in zip(*(run.kept for run in runs), strict=True):
        assert layer == layer_of_twin
        assert all(map(torch.equal, kept, kept_of_twin))
    torch.testing.assert_close(runs[0].logits, runs[1].logits, rtol=0.02, atol=0.02)
    tokens = runs[0].logits.argmax(-1)
    ours, exact = (decode_one_token(decoder, tokens, run.cache) for decoder, run in zip(both, runs, strict=True))
    assert (ours - exact).norm() < 0.04 * exact.norm()  # the kernel rounds every product to bfloat16


def test_other_devices_have_no_int4() -> None:
    assert int4_obstacle(torch.device("cuda")) == "it is for CPUs, not cuda"
