"""The trainable fake quantization: its values are fake_quantize's, its gradients the formulas of the docstring."""

import pytest
import torch
from torch import Tensor

from bitfold.numerics import TensorScheme, fake_quantize, scale_and_zero
from bitfold.numerics.straight_through import fake_quantize_trainable

ASYMMETRIC = TensorScheme(bits=3, symmetric=False, granularity="channel")
SYMMETRIC = TensorScheme(bits=3, symmetric=True, granularity="channel")
NARROW = TensorScheme(bits=3, symmetric=True, narrow=True, granularity="channel")
SCHEMES = pytest.mark.parametrize(
    "scheme", [ASYMMETRIC, SYMMETRIC, NARROW], ids=["asymmetric", "symmetric", "narrow"]
)


def _leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


RATIOS = (0.6, 0.7)


def _case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [6, 16], ratios of their limits [6, 1, 1], and a gradient from above."""
    torch.manual_seed(0)
    x = torch.randn(6, 16, dtype=torch.float64)
    x[4], x[5] = x[4].abs(), -x[5].abs()  # ranges that 0 widens
    lower, upper = (torch.full((6, 1, 1), ratio, dtype=torch.float64) for ratio in RATIOS)
    return x, lower, upper, torch.randn_like(x)


@SCHEMES
@pytest.mark.parametrize("clips", [True, False])
def test_values_are_those_of_fake_quantize(scheme: TensorScheme, clips: bool) -> None:
    x, lower, upper, _ = _case()
    low, high = x.amin(-1).view(6, 1, 1), x.amax(-1).view(6, 1, 1)
    if clips:
        low, high = low * lower, high * upper
    expected = fake_quantize(x.unsqueeze(1), *scale_and_zero(low, high, scheme), scheme).squeeze(1)
    found = fake_quantize_trainable(x, scheme, (lower, upper) if clips else None)
    torch.testing.assert_close(found, expected)


@SCHEMES
@pytest.mark.parametrize("clips", [True, False])
def test_gradients_are_the_formulas(scheme: TensorScheme, clips: bool) -> None:
    """A plain loop over elements: inside the range the value passes straight through and the step gets the rounding;
    outside, the value follows its own limit; limits are ratios of the extreme values, which take their gradient."""
    x, lower, upper, gradient = _case()
    leaves = [_leaf(t) for t in (x, lower, upper)]
    ratios = (leaves[1], leaves[2]) if clips else None
    fake_quantize_trainable(leaves[0], scheme, ratios).backward(gradient)
    on_x, on_lower, on_upper = torch.zeros_like(x), torch.zeros_like(lower), torch.zeros_like(upper)
    steps = 2 * scheme.qmax if scheme.narrow else scheme.qmax - scheme.qmin
    by_low, by_high = RATIOS if clips else (1.0, 1.0)
    for row in range(x.shape[0]):
        smallest, largest = float(x[row].min()), float(x[row].max())
        lo, hi = min(smallest * by_low, 0.0), max(largest * by_high, 0.0)
        if scheme.symmetric:
            scale, zero = 2 * max(-lo, hi) / steps, 0.0
        else:
            scale = (hi - lo) / steps
            zero = scheme.qmin - round(lo / scale)
        on_low = on_high = 0.0
        for column in range(x.shape[1]):
            g = float(gradient[row, column])
            u = float(x[row, column]) / scale + zero
            code = min(max(round(u), scheme.qmin), scheme.qmax)
            if not clips or scheme.qmin <= u <= scheme.qmax:
                on_x[row, column] += g
                below, above = -(code - u) / steps * g, (code - u) / steps * g
            else:
                below, above = (0.0, g) if u > scheme.qmax else (g, 0.0)
            if not scheme.symmetric:
                on_low, on_high = on_low + below, on_high + above
            elif hi >= -lo:  # the limits are ∓ the larger end
                on_high += above - below
            else:
                on_low += below - above
        on_low, on_high = on_low * (smallest <= 0), on_high * (largest >= 0)
        on_lower[row], on_upper[row] = on_low * smallest, on_high * largest
        on_x[row, x[row].argmin()] += on_low * by_low
        on_x[row, x[row].argmax()] += on_high * by_high
    torch.testing.assert_close(leaves[0].grad, on_x)
    if clips:
        torch.testing.assert_close(leaves[1].grad, on_lower)
        torch.testing.assert_close(leaves[2].grad, on_upper)


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
