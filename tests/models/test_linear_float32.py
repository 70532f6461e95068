"""float32 products by oneDNN beside those of nn.Linear."""

from pathlib import Path

import pytest
import torch
from torch import nn

from nanovlm_v2drop.loading.precision import Precision, pack
from nanovlm_v2drop.loading.zoo import load
from nanovlm_v2drop.models import linear_float32
from nanovlm_v2drop.models.linear_float32 import FEW_ROWS, OneDNNLinear, is_faster_with_onednn

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def random_linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 40, bias=bias)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (FEW_ROWS, 96), (640, 96), (3, 50, 96), (0, 96)])
def test_products_are_those_of_nn_linear(shape: tuple[int, ...], bias: bool) -> None:
    linear, values = random_linear(bias), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(OneDNNLinear(linear)(values), linear(values), atol=1e-5, rtol=1e-5)


@needs_onednn
def test_values_and_weights_that_are_not_contiguous_are_multiplied_right() -> None:
    linear, values = random_linear(), torch.randn(40, 70, 96)
    linear.weight = nn.Parameter(torch.randn(96, 41).T[1:], requires_grad=False)
    with torch.no_grad():
        for view in (values[:, 1:], values.transpose(0, 1)):
            torch.testing.assert_close(OneDNNLinear(linear)(view), linear(view), atol=1e-4, rtol=1e-5)


@needs_onednn
def test_a_row_has_the_same_product_in_a_batch_of_any_size() -> None:
    linear, values = OneDNNLinear(random_linear()), torch.randn(640, 96)
    with torch.no_grad():
        whole = linear(values)
        assert all(torch.equal(linear(values[:rows]), whole[:rows]) for rows in range(FEW_ROWS, 640, 41))


@needs_onednn
def test_weights_are_shared_and_have_gradients_for_any_number_of_rows() -> None:
    linear, values = random_linear(), torch.randn(64, 96)
    fast = OneDNNLinear(linear)
    assert fast.weight is linear.weight
    assert fast.state_dict().keys() == linear.state_dict().keys()
    fast(values).sum().backward()
    torch.testing.assert_close(linear.weight.grad, values.sum(0).expand(40, 96))


def test_only_float32_matrices_on_a_cpu_with_unused_instructions_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for faster, name, kind in ((True, "float32", OneDNNLinear), (True, "float64", nn.Linear), (False, "float32", nn.Linear)):
        monkeypatch.setattr("nanovlm_v2drop.loading.precision.is_faster_with_onednn", lambda faster=faster: faster)
        model = nn.Sequential(random_linear())
        pack(model, Precision(name, getattr(torch, name)), CPU)
        assert type(model[0]) is kind


def test_processors_of_other_makers_keep_mkl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("vendor_id : GenuineIntel\n")
    monkeypatch.setattr(linear_float32, "CPUINFO", tmp_path / "cpuinfo")
    assert not is_faster_with_onednn.__wrapped__()


@pytest.mark.skipif(not is_faster_with_onednn(), reason="this processor gains nothing")
def test_the_demo_is_loaded_with_them() -> None:
    model = load("demo").model
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {OneDNNLinear}
