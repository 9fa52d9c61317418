"""Double quantization against arithmetic in float64, and what it costs."""

import numpy as np
import pytest
import torch

from bitfold.numerics import TensorScheme
from bitfold.numerics.nested_scale import NestedScale, nested_nearest

NF4 = TensorScheme(grid="nf4", bits=4, granularity="group", group_size=64)
INT4 = TensorScheme(bits=4, symmetric=False, granularity="group", group_size=32)


def weight(rows: int = 40, columns: int = 640) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_scales_are_the_nearest_of_their_block() -> None:
    """The reference: mean + outer · k/127 with the best whole k, tried one by one in float64."""
    scale = weight(40, 16).abs() + 0.1  # 640 scales: blocks of 256, 256 and 128
    nested = NestedScale.of(scale)
    exact = scale.double().numpy().ravel()
    mean = exact.mean()
    for start in range(0, 640, 256):
        around = exact[start : start + 256] - mean
        outer = np.abs(around).max()
        levels = outer * np.arange(-127, 128) / 127
        nearest = levels[np.abs(around[:, None] - levels).argmin(axis=1)] + mean
        found = nested.values().numpy().ravel()[start : start + 256]
        np.testing.assert_allclose(found, nearest, rtol=2e-6)
    assert len(nested.outer) == 3


def test_it_takes_a_quarter_of_the_bits() -> None:
    """0.127 bits a weight in place of 0.5, section 3 of the paper: 8/64 + 32/(64 · 256)."""
    big = weight(256, 4096)
    tensor, nested = nested_nearest(big, NF4)
    assert nested is not None
    assert nested.bits / big.numel() == pytest.approx(8 / 64 + 32 / (64 * 256), rel=1e-3)
    assert torch.equal(tensor.scale, nested.values())


@pytest.mark.parametrize("scheme", [NF4, INT4])
def test_codes_are_nearest_on_the_grid_of_the_stored_scales(scheme: TensorScheme) -> None:
    w = weight()
    tensor, nested = nested_nearest(w, scheme)
    assert nested is not None
    size = scheme.group_size
    values = tensor.dequantize(torch.float64).view(40, -1, size)
    scale = nested.values().double()[..., None]
    if scheme.grid == "nf4":
        from bitfold.numerics.quantize import NF4_LEVELS

        grid = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    else:
        assert tensor.zero is not None
        grid = torch.arange(-8, 8).double() - tensor.zero.double()[..., None, None]
    levels = scale[..., None] * grid
    best = (w.double().view(40, -1, size, 1) - levels).abs().amin(-1)
    found = (w.double().view(40, -1, size) - values).abs()
    assert float((found - best).max()) < 1e-6


def test_it_costs_little() -> None:
    w = weight()
    low = w.view(40, -1, 64).amin(-1, keepdim=True)
    high = w.view(40, -1, 64).amax(-1, keepdim=True)
    from bitfold.numerics import QuantizedTensor

    single = QuantizedTensor.from_limits(w, low, high, NF4, torch.float32).dequantize()
    double = nested_nearest(w, NF4)[0].dequantize()
    assert float((double - w).norm() / (single - w).norm()) < 1.01


def test_equal_scales_and_zeros_are_no_harm() -> None:
    tensor, _ = nested_nearest(torch.ones(4, 128), NF4)
    assert torch.allclose(tensor.dequantize(), torch.ones(4, 128), rtol=1e-6)
    tensor, _ = nested_nearest(torch.zeros(4, 128), NF4)
    assert torch.equal(tensor.dequantize().abs(), torch.zeros(4, 128))
