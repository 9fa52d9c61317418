"""MagR lowers its own objective, and the largest weights, at a price the inputs hardly notice; in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from bitfold.corrections.magr import Magr, project_l1
from bitfold.numerics import TensorScheme, to_groups
from bitfold.statistics import InputStatistics

SCHEMES = [
    TensorScheme(bits=3, symmetric=False),
    TensorScheme(bits=3, granularity="group", group_size=8),
]


def _case() -> tuple[Tensor, InputStatistics]:
    """A weight with outliers, and inputs of low rank but for a little noise."""
    draw = {"generator": torch.Generator().manual_seed(2), "dtype": torch.float64}
    weight = torch.randn(6, 32, **draw)
    weight[:, ::9] *= 4
    inputs = torch.randn(300, 10, **draw) @ torch.randn(10, 32, **draw)
    inputs += 0.01 * torch.randn(300, 32, **draw)
    statistics = InputStatistics(frozenset({"gram"}), 300)
    statistics.update(inputs)
    return weight, statistics


def _objective(
    w: Tensor, start: Tensor, gram: Tensor, alpha: float, scheme: TensorScheme
) -> Tensor:
    curvature = gram / torch.linalg.eigvalsh(gram)[-1]
    quadratic = ((w - start) @ curvature * (w - start)).sum() / 2
    return quadratic + alpha * to_groups(w, scheme).abs().amax(dim=-1).sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=TensorScheme.describe)
def test_the_objective_and_the_outliers_fall(scheme: TensorScheme) -> None:
    weight, statistics = _case()
    found = Magr(alpha=0.01).apply(weight, scheme, statistics)
    before, after = (_objective(w, weight, statistics.gram, 0.01, scheme) for w in (weight, found))
    assert after < 0.95 * before
    assert (
        to_groups(found, scheme).abs().amax(-1).sum()
        < 0.9 * to_groups(weight, scheme).abs().amax(-1).sum()
    )
    output = statistics.gram
    change = ((found - weight) @ output * (found - weight)).sum() / (weight @ output * weight).sum()
    assert change < 0.01


@settings(max_examples=40)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(0.05, 6))
def test_the_projection_is_the_nearest_point_of_the_ball(
    values: list[float], radius: float
) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    found = project_l1(x, radius)
    assert float(found.abs().sum()) <= radius + 1e-9
    if float(x.abs().sum()) <= radius:
        assert torch.equal(found, x)
        return
    # In terms of positive and negative parts the problem is smooth.
    size = len(values)
    best = minimize(
        lambda v: ((v[:size] - v[size:] - x.numpy()) ** 2).sum(),
        np.full(2 * size, radius / (4 * size)),
        bounds=[(0, None)] * (2 * size),
        constraints={"type": "ineq", "fun": lambda v: radius - v.sum()},
        method="SLSQP",
    )
    assert float((found - x).square().sum()) <= best.fun + 1e-6
