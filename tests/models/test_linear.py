"""Prepacked weights beside the plain ones that they were."""

import copy

import pytest
import torch
from torch import nn

from nanovlm_v2drop.models import linear as linear_module
from nanovlm_v2drop.models.linear import (
    PrepackedLinear,
    RowByRow,
    added,
    added_and_product,
    as_bfloat16,
    can_prepack,
    prepack,
    products,
)

CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(not can_prepack(CPU), reason="this processor has no fast bfloat16")


def random_linear(*sizes: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*sizes, bias=bias).bfloat16()


def prepacked(linear: nn.Linear) -> PrepackedLinear:
    return PrepackedLinear(linear, torch.empty(linear.weight.numel(), dtype=torch.bfloat16))


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (640, 96), (3, 5, 96), (0, 96)])
def test_products_are_those_of_the_plain_weight(shape: tuple[int, ...], bias: bool) -> None:
    linear, values = random_linear(96, 40, bias=bias), torch.randn(shape).bfloat16()
    with torch.no_grad():
        assert torch.equal(prepacked(linear)(values), linear(values))


@needs_bfloat16
def test_values_that_are_not_contiguous_are_multiplied_right() -> None:
    linear, values = random_linear(96, 40), torch.randn(4, 7, 96).bfloat16()
    packed = prepacked(linear)
    with torch.no_grad():
        for view in (values[:, 1:], values.transpose(0, 1)):
            assert torch.equal(packed(view), packed(view.contiguous()))
            torch.testing.assert_close(packed(view), linear(view), atol=2e-2, rtol=0)


@needs_bfloat16
def test_the_plain_weight_can_be_had_back() -> None:
    linear = random_linear(96, 40)
    assert torch.equal(prepacked(linear).weight, linear.weight)


@needs_bfloat16
def test_a_weight_is_packed_at_its_first_product_and_the_plain_one_is_then_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, let_go = random_linear(96, 40), []
    monkeypatch.setattr(linear_module, "let_go", let_go.append)
    packed = prepacked(linear)
    assert not let_go
    assert packed.plain_weight.data_ptr() == linear.weight.data_ptr()
    with torch.no_grad():
        packed(torch.randn(2, 96).bfloat16())
    assert packed.plain_weight is None
    assert [weight.data_ptr() for weight in let_go] == [linear.weight.data_ptr()]


@needs_bfloat16
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weights_of_other_dtypes_pass_through_one_buffer_one_after_the_other(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 40), nn.Linear(40, 8), nn.Linear(8, 96)).to(dtype)
    wanted = [linear.weight.detach().bfloat16() for linear in model]
    prepack(model)
    assert all(torch.equal(packed.weight, weight) for packed, weight in zip(model, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_conversion_piece_by_piece_is_that_of_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = (torch.randn(30, 7) * 1e-6).to(dtype)  # among them numbers that float16 holds with fewer digits
    monkeypatch.setattr(linear_module, "PIECE", 64)
    assert torch.equal(as_bfloat16(weight), weight.bfloat16())
    assert torch.equal(as_bfloat16(weight.T[1:]), weight.T[1:].bfloat16())


@needs_bfloat16
def test_gradients_are_refused_with_the_way_out() -> None:
    packed, values = prepacked(random_linear(8, 8)), torch.randn(2, 8).bfloat16().requires_grad_()
    with pytest.raises(RuntimeError, match="load the model in float32"):
        packed(values)


@needs_bfloat16
def test_every_linear_layer_is_exchanged_but_a_head_that_is_also_the_embedding_table() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(40, 96), "head": nn.Linear(96, 40, bias=False), "other": nn.Linear(96, 40)})
    model["inner"] = nn.Sequential(nn.Linear(96, 8), nn.GELU())
    model["head"].weight = model["table"].weight
    plain = copy.deepcopy(model.bfloat16())
    prepack(model)
    kinds = {name: type(module) for name, module in model.named_modules() if hasattr(module, "in_features")}
    assert kinds == {"head": nn.Linear, "other": PrepackedLinear, "inner.0": PrepackedLinear}
    values = torch.randn(3, 96).bfloat16()
    with torch.no_grad():
        assert torch.equal(model["inner"](values), plain["inner"](values))


@needs_bfloat16
def test_hooks_of_a_layer_go_on() -> None:
    model = nn.Sequential(random_linear(96, 40))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)  # as the sums over processes are made
    values = torch.randn(3, 96).bfloat16()
    with torch.no_grad():
        wanted = model(values)
        prepack(model)
        assert torch.equal(model(values), wanted)


def test_products_of_plain_layers_are_those_of_each_layer() -> None:
    layers, values = [nn.Linear(8, size) for size in (3, 5)], torch.randn(2, 8)
    assert all(map(torch.equal, products(values, *layers), [layer(values) for layer in layers]))


def test_plain_layers_take_values_that_are_made_row_by_row_as_a_whole() -> None:
    layers, sources = [nn.Linear(8, size) for size in (3, 5)], (torch.randn(4, 8), torch.randn(4, 8))
    values = RowByRow(torch.mul, torch.add, sources)
    assert values.shape == (4, 8)
    assert all(map(torch.equal, products(values, *layers), [layer(sources[0] * sources[1]) for layer in layers]))
    assert [part.whole().tolist() for part in values.split(3)] == [part.tolist() for part in values.whole().split(3)]


def test_a_sum_with_a_product_is_the_same_in_one_step() -> None:
    layer, sums, values = nn.Linear(8, 3), torch.randn(4, 3), torch.randn(4, 8)
    wanted = sums + layer(values)
    assert torch.equal(added(sums, values, layer), wanted)
    assert torch.equal(added(sums, RowByRow(torch.neg, torch.neg, (-values,)), layer), wanted)
    assert all(map(torch.equal, added_and_product(sums, values, layer), (wanted, layer(values))))
