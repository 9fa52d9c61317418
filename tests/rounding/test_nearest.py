"""Rounding to nearest is the mathematics, and every rounding within limits keeps the contract of `Rounding.solve`."""

from itertools import chain

import pytest
import torch

from bitfold.numerics import TensorScheme, to_groups
from bitfold.ranges import MinMax
from bitfold.rounding import ROUNDINGS, Layer, Nearest, Rounding
from bitfold.statistics import InputStatistics
from reference import round_group

SCHEMES = [
    TensorScheme(bits=4, symmetric=False, granularity="group", group_size=16),
    TensorScheme(bits=3, symmetric=False),
    TensorScheme(bits=2),
    TensorScheme(bits=8, narrow=True, granularity="tensor"),
    TensorScheme(grid="nf4", bits=4, granularity="group", group_size=32),
    TensorScheme(grid="fp8_e4m3"),
]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=TensorScheme.describe)


def weight() -> torch.Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


def _statistics() -> InputStatistics:
    """Of inputs without any correlation."""
    statistics = InputStatistics(frozenset({"gram", "cross", "channels"}), 64)
    statistics.update(torch.eye(64), torch.eye(64))
    return statistics


@by_scheme
@pytest.mark.parametrize(
    "name", [n for n, part in ROUNDINGS.items() if issubclass(part, Rounding) and part.reads_limits]
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_contract(name: str, scheme: TensorScheme, stored: torch.dtype) -> None:
    x = weight()
    limits = MinMax().limits(to_groups(x, scheme), scheme)
    layers = {"w": Layer(x, limits, scheme)}
    tensor = ROUNDINGS[name]().solve(layers, stored, _statistics()).tensors["w"]
    assert tensor.scheme == ROUNDINGS[name]().stored_as("w", scheme, (8, 64), stored)
    assert tensor.shape == x.shape
    assert tensor.scale.dtype == stored
    assert (tensor.zero is None) == scheme.symmetric
    if scheme.grid == "int":
        assert scheme.qmin <= int(tensor.codes.min())
        assert int(tensor.codes.max()) <= scheme.qmax
    # Whatever it does, it stays within the coarsest step of its grid (fp8's is as wide as int4's).
    steps = 2 ** (scheme.bits if scheme.grid == "int" else 4) - 1
    assert ((tensor.dequantize() - x).abs() <= 2 * x.abs().max() / steps).all()


@pytest.mark.parametrize(
    "scheme", [s for s in SCHEMES if s.grid == "int"], ids=TensorScheme.describe
)
def test_nearest_is_the_mathematics(scheme: TensorScheme) -> None:
    x = weight().double()
    groups = to_groups(x, scheme)
    # A range half as wide: a good part is clipped.
    limits = tuple(limit / 2 for limit in MinMax().limits(groups, scheme))
    tensor = Nearest().solve({"w": Layer(x, limits, scheme)}, torch.float64).tensors["w"]
    rows = groups.reshape(-1, groups.shape[-1]).tolist()
    ends = torch.cat([limit.reshape(-1, 1) for limit in limits], dim=1).tolist()
    expected = [
        round_group(
            row,
            scheme.bits,
            symmetric=scheme.symmetric,
            narrow=scheme.narrow,
            limits=(low, high),
        ).codes
        for row, (low, high) in zip(rows, ends, strict=True)
    ]
    assert tensor.codes.flatten().tolist() == list(chain(*expected))
