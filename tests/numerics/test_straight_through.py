"""The trainable fake quantization: its values are fake_quantize's, its gradients the formulas of the docstring."""

import pytest
import torch
from torch import Tensor

from bitfold.numerics import TensorScheme, fake_quantize, scale_and_zero
from bitfold.numerics.straight_through import fake_quantize_trainable, quantize_through

ASYMMETRIC = TensorScheme(bits=3, symmetric=False, granularity="channel")
SYMMETRIC = TensorScheme(bits=3, symmetric=True, granularity="channel")
NARROW = TensorScheme(bits=3, symmetric=True, narrow=True, granularity="channel")
SCHEMES = pytest.mark.parametrize(
    "scheme", [ASYMMETRIC, SYMMETRIC, NARROW], ids=["asymmetric", "symmetric", "narrow"]
)


def _leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def _case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [6, 1, 16], limits inside their range, and a gradient from above."""
    torch.manual_seed(0)
    x = torch.randn(6, 1, 16, dtype=torch.float64)
    low, high = x.amin(-1, keepdim=True) * 0.6, x.amax(-1, keepdim=True) * 0.7
    return x, low, high, torch.randn_like(x)


@SCHEMES
def test_values_are_those_of_fake_quantize(scheme: TensorScheme) -> None:
    x, low, high, _ = _case()
    expected = fake_quantize(x, *scale_and_zero(low, high, scheme), scheme)
    torch.testing.assert_close(quantize_through(x, low, high, scheme), expected)


@SCHEMES
def test_gradients_are_the_formulas(scheme: TensorScheme) -> None:
    """A plain loop over elements: inside the range the value passes straight through and the step gets the rounding;
    outside, the value follows its own limit."""
    x, low, high, gradient = _case()
    leaves = [_leaf(t) for t in (x, low, high)]
    quantize_through(*leaves, scheme).backward(gradient)
    on_x, on_low, on_high = torch.zeros_like(x), torch.zeros_like(low), torch.zeros_like(high)
    steps = 2 * scheme.qmax if scheme.narrow else scheme.qmax - scheme.qmin
    for row in range(x.shape[0]):
        lo, hi = float(low[row]), float(high[row])
        if scheme.symmetric:
            scale, zero = 2 * max(-lo, hi) / steps, 0.0
        else:
            scale = (hi - lo) / steps
            zero = scheme.qmin - round(lo / scale)
        for column in range(x.shape[2]):
            g = float(gradient[row, 0, column])
            u = float(x[row, 0, column]) / scale + zero
            if scheme.qmin <= u <= scheme.qmax:
                on_x[row, 0, column] += g
                below, above = -(round(u) - u) / steps * g, (round(u) - u) / steps * g
            else:
                below, above = (0.0, g) if u > scheme.qmax else (g, 0.0)
            if not scheme.symmetric:
                on_low[row] += below
                on_high[row] += above
            elif hi >= -lo:  # the limits are ∓ the larger end
                on_high[row] += above - below
            else:
                on_low[row] += below - above
    torch.testing.assert_close(leaves[0].grad, on_x)
    torch.testing.assert_close(leaves[1].grad, on_low)
    torch.testing.assert_close(leaves[2].grad, on_high)


def test_descent_on_the_range_lowers_the_error_of_an_outlier() -> None:
    """The gradient through the range lets a scale shrink; passing the value straight through alone cannot."""
    torch.manual_seed(0)
    x = torch.randn(1, 64, dtype=torch.float64)
    x[0, 0] = 12.0
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def error() -> Tensor:
        first = (torch.tensor(0),)
        factor = torch.ones(64, dtype=torch.float64).index_put(first, (-log_scale).exp())
        rounded = fake_quantize_trainable(x * factor, ASYMMETRIC) / factor
        return (rounded - x).square()[0, 1:].sum()

    before = float(error())
    optimizer = torch.optim.Adam([log_scale], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error() < 0.5 * before
    assert log_scale > 0.5
