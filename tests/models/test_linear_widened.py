"""bfloat16 weights for float32 values, beside float32 layers."""

import pytest
import torch
from torch import nn

from nanovlm_v2drop.models import linear_widened
from nanovlm_v2drop.models.linear import can_prepack
from nanovlm_v2drop.models.linear_widened import FEW_ROWS, WidenedLinear

pytestmark = pytest.mark.skipif(not can_prepack(torch.device("cpu")), reason="torch has no oneDNN here")


def random_pair(bias: bool = True) -> tuple[nn.Linear, WidenedLinear]:
    """A float32 layer whose weight has the digits of bfloat16, and the same layer with a bfloat16 weight."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias).requires_grad_(False)
    linear.weight.copy_(linear.weight.bfloat16())
    return linear, WidenedLinear(linear)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(FEW_ROWS + 1, 96), (3, 5, 96), (640, 96)])
def test_many_rows_are_multiplied_in_float32(shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_widened, "PIECE", 7 * 96)  # several pieces, the last one shorter
    linear, widened = random_pair(bias)
    values = torch.randn(shape)
    torch.testing.assert_close(widened(values), linear(values))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (FEW_ROWS, 96), (0, 96)])
def test_few_rows_are_multiplied_in_bfloat16(shape: tuple[int, ...], bias: bool) -> None:
    linear, widened = random_pair(bias)
    values = torch.randn(shape)
    product = widened(values)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, linear(values.bfloat16().float()), atol=1e-2, rtol=1e-2)


def test_a_bfloat16_weight_is_not_copied_and_stays_in_the_state_dict() -> None:
    linear = nn.Linear(96, 40).bfloat16()
    widened = WidenedLinear(linear)
    assert widened.weight.data_ptr() == linear.weight.data_ptr()
    assert widened.state_dict().keys() == linear.state_dict().keys()


def test_gradients_are_refused_with_the_way_out() -> None:
    with pytest.raises(RuntimeError, match="bfloat16 weights have no gradients; load the model in float32"):
        random_pair()[1](torch.randn(5, 96, requires_grad=True))
