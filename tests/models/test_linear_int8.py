"""Int8 layers beside a slow twin, whose sums are exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import pack_together, tiny_decoder, tiny_prompts
from torch import Tensor, nn

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule
from nanovlm_v2drop.inference import decode_one_token, prefill
from nanovlm_v2drop.models import linear_int8
from nanovlm_v2drop.models.decoder import Decoder
from nanovlm_v2drop.models.linear import RowByRow, added, products
from nanovlm_v2drop.models.linear_int8 import (
    LARGEST,
    ZERO_POINT,
    Int8Linear,
    int8_obstacle,
    quantise_int8,
    quantise_rows,
    quantise_weight,
)

CPU = torch.device("cpu")
needs_int8 = pytest.mark.skipif(int8_obstacle(CPU) is not None, reason=f"int8: {int8_obstacle(CPU)}")
SHAPES = [(96,), (1, 96), (7, 96), (640, 96), (3, 5, 96), (0, 96)]
FLOATS = [torch.float32, torch.bfloat16]


class ExactTwin(nn.Module):
    """What an Int8Linear computes, with integers in float64 and one rounding."""

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        self.q, self.scale, self.bias, self.dtype = layer.q.double(), layer.scale.double(), layer.bias, layer.dtype

    def forward(self, values: Tensor) -> Tensor:
        rows = quantise_rows(values)
        sums = (rows.q.double() - ZERO_POINT) @ self.q.T  # whole numbers below 2 ** 53
        product = (sums * self.scale * rows.scale.double()).view(*values.shape[:-1], len(self.q))
        return (product if self.bias is None else product + self.bias.double()).to(self.dtype)


def random_layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias).requires_grad_(False)
    return linear, Int8Linear.of(linear, dtype)


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_exact_twin(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    _, layer = random_layer(bias, dtype)
    values = torch.randn(shape).to(dtype)
    # In bfloat16 the sums are rounded, then the products with the scales, then the sum with the bias.
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(layer(values), ExactTwin(layer)(values), **tolerance)


@needs_int8
def test_values_that_are_not_contiguous_are_multiplied_right() -> None:
    _, layer = random_layer()
    values = torch.randn(96, 7).T
    assert torch.equal(layer(values), layer(values.contiguous()))


@needs_int8
def test_results_are_near_those_of_the_float_weight() -> None:
    linear, layer = random_layer()
    values = torch.randn(200, 96)
    wanted = linear(values)
    assert (layer(values) - wanted).norm() < 0.012 * wanted.norm()


@given(st.lists(st.floats(-1e38, 1e38), min_size=1, max_size=9), st.sampled_from(FLOATS))
def test_every_value_is_quantised_within_half_a_scale(row: list[float], dtype: torch.dtype) -> None:
    values = torch.tensor([row]).to(dtype)
    rows = quantise_rows(values)
    back = (rows.q.double() - ZERO_POINT) * rows.scale.double()
    error = (back - values.double()).abs()
    smallest = torch.finfo(torch.float32).tiny * LARGEST * 2  # scales of smaller values have few digits or none
    assert (error <= rows.scale.double() * 0.502 + smallest).all()


def test_the_largest_value_of_a_row_never_wraps_around() -> None:
    values = torch.linspace(1, 2, 1001)[:, None] * torch.tensor([1.0, -1.0])  # every rounding of a scale
    rows = quantise_rows(values)
    assert set((rows.q.int() - ZERO_POINT).abs().unique().tolist()) <= {126, 127}
    assert ((rows.q.int() - ZERO_POINT).sign() == values.sign()).all()


def test_a_row_of_zeros_and_a_channel_of_zeros_stay_zero() -> None:
    assert (quantise_rows(torch.zeros(2, 5)).q == ZERO_POINT).all()
    q, scale = quantise_weight(torch.zeros(3, 5))
    assert not q.any()
    assert not scale.any()


@needs_int8
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_not_finite(bad: float) -> None:
    _, layer = random_layer()
    values = torch.randn(3, 96)
    values[1, 5] = bad
    assert layer(values).isfinite().all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_quantised_by_output_channel_slice_by_slice(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = (torch.randn(30, 7) * torch.logspace(-3, 3, 30)[:, None]).to(dtype)
    monkeypatch.setattr(linear_int8, "SLICE", 8)
    q, scale = quantise_weight(weight)
    assert (q.abs().amax(1) == LARGEST).all()
    assert ((q * scale[:, None] - weight.float()).abs() <= 0.5001 * scale[:, None]).all()


@needs_int8
def test_the_weight_can_be_had_back() -> None:
    linear, layer = random_layer()
    q, scale = quantise_weight(linear.weight)
    assert torch.equal(layer.q, q)
    assert torch.equal(layer.weight, q * scale[:, None])


@needs_int8
def test_layers_with_the_same_input_quantise_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, values, calls = [random_layer()[1] for _ in range(3)], torch.randn(4, 96), []
    wanted = [layer(values) for layer in layers]
    original = linear_int8.quantise_rows
    monkeypatch.setattr(linear_int8, "quantise_rows", lambda rows: calls.append(1) or original(rows))
    assert all(map(torch.equal, products(values, *layers), wanted))
    assert len(calls) == 1


@needs_int8
def test_values_that_are_made_row_by_row_are_made_in_float32_for_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = random_layer(dtype=torch.bfloat16)
    sources, sizes = (torch.randn(7, 96).bfloat16(), torch.randn(7, 96).bfloat16()), []
    monkeypatch.setattr(linear_int8, "AT_ONCE", 3 * 96)
    values = RowByRow(torch.mul, lambda one, other: sizes.append(len(one)) or one * other, sources)
    assert torch.equal(products(values, layer)[0], layer(sources[0].float() * sources[1].float()))
    assert sizes == [3, 3, 1]


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_with_a_product_has_the_digits_of_the_sum(dtype: torch.dtype, bias: bool) -> None:
    _, layer = random_layer(bias, torch.bfloat16)
    sums, values = torch.randn(7, 40).to(dtype), torch.randn(7, 96).bfloat16()
    twin = ExactTwin(layer)
    twin.dtype = torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    given = added(sums, values, layer)
    assert given.dtype == dtype
    torch.testing.assert_close(given.float(), sums.float() + twin(values), rtol=tolerance, atol=tolerance)


@needs_int8
def test_gradients_are_refused_with_the_way_out() -> None:
    _, layer = random_layer()
    values = torch.randn(2, 96, requires_grad=True)
    normed = RowByRow(torch.neg, torch.neg, (values,))
    for call in (lambda: layer(values), lambda: products(normed, layer), lambda: added(torch.zeros(2, 40), normed, layer)):
        with pytest.raises(RuntimeError, match="quantised weights have no gradients; load the model in float32"):
            call()


@pytest.fixture(params=["untied", "tied"])
def quantised_and_twin(request: pytest.FixtureRequest) -> tuple[Decoder, Decoder]:
    decoders = [tiny_decoder(tie_word_embeddings=request.param == "tied", qkv_bias=True).requires_grad_(False) for _ in "12"]
    for decoder in decoders:
        quantise_int8(decoder, torch.float32)
    for name, module in list(decoders[1].named_modules()):
        if isinstance(module, Int8Linear):
            parent, _, own = name.rpartition(".")
            setattr(decoders[1].get_submodule(parent), own, ExactTwin(module))
    return decoders[0], decoders[1]


@needs_int8
def test_every_matrix_of_a_decoder_is_quantised_and_a_tied_table_stays(quantised_and_twin: tuple[Decoder, Decoder]) -> None:
    decoder, _ = quantised_and_twin
    assert not [module for module in decoder.modules() if type(module) is nn.Linear]
    assert isinstance(decoder.lm_head, Int8Linear)
    assert decoder.embed_tokens.weight.dtype == torch.float32


@needs_int8
@pytest.mark.parametrize("name", sorted(DROPPERS))
def test_every_method_keeps_and_answers_as_with_the_exact_twin(name: str, quantised_and_twin: tuple[Decoder, Decoder]) -> None:
    packed = pack_together(tiny_prompts())
    earliest = DROPPERS[name].earliest_layer
    schedule = DropSchedule({earliest: 0.5} if DROPPERS[name].latest_layer == earliest else {max(earliest, 1): 0.5})
    runs = [prefill(decoder, packed, DROPPERS[name](schedule)) for decoder in quantised_and_twin]
    for (layer, kept), (layer_of_twin, kept_of_twin) in zip(*(run.kept for run in runs), strict=True):
        assert layer == layer_of_twin
        assert all(map(torch.equal, kept, kept_of_twin))
    torch.testing.assert_close(runs[0].logits, runs[1].logits, rtol=1e-3, atol=1e-3)
    tokens = runs[0].logits.argmax(-1)
    steps = [decode_one_token(decoder, tokens, run.cache) for decoder, run in zip(quantised_and_twin, runs, strict=True)]
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-3)


@needs_int8
def test_a_batch_answers_as_its_samples_one_by_one(quantised_and_twin: tuple[Decoder, Decoder]) -> None:
    decoder, parts = quantised_and_twin[0], tiny_prompts()
    together = prefill(decoder, pack_together(parts)).logits
    torch.testing.assert_close(together, torch.cat([prefill(decoder, part).logits for part in parts]), rtol=1e-3, atol=1e-3)


def test_other_devices_have_no_int8() -> None:
    assert int8_obstacle(torch.device("cuda")) == "it is for CPUs, not cuda"
