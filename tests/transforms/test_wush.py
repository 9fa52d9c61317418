"""WUSH behind a norm: the closed form shares the load between the readers' weights and their inputs evenly."""

import pytest
import torch

from bitfold.models.family import NormSite
from bitfold.numerics import MapShape
from bitfold.part import Need
from bitfold.statistics import InputStatistics
from bitfold.transforms.groups import Heads, OnlineMatrix
from bitfold.transforms.wush import Wush

SITE = NormSite("norm", ("q", "k"))
NEEDS = frozenset[Need]({"gram", "rows"})


def _fit(width: int) -> tuple[OnlineMatrix, torch.Tensor, torch.Tensor]:
    """The matrix, and the second moments of weights and inputs that it was found from; one channel is large."""
    torch.manual_seed(0)
    x = torch.randn(500, width, dtype=torch.float64)
    x[:, 3] *= 30
    weights = {
        "norm.weight": torch.ones(width, dtype=torch.float64),
        "q.weight": torch.randn(width, width, dtype=torch.float64),
        "k.weight": torch.randn(width // 2, width, dtype=torch.float64),
    }
    statistics = InputStatistics(NEEDS, len(x))
    statistics.update(x)
    found = Wush(norms="online", damping=1e-9).fit(
        SITE, weights, statistics, {}, Heads(1, 1, width)
    )
    assert isinstance(found, OnlineMatrix)
    readers = torch.cat([weights["q.weight"], weights["k.weight"]])
    return found, readers.T @ readers / len(readers), statistics.gram.double()


@pytest.mark.parametrize("width", [32, 24], ids=["Hadamard", "no power of two"])
def test_both_moments_become_the_same(width: int) -> None:
    found, moment_w, moment_x = _fit(width)
    assert found.matrix.shape == (1, width, width)
    assert found.defect() < 1e-9
    a, inverse = found.matrix[0], found.inverse[0]
    after_w, after_x = a @ moment_w @ a.T, inverse.T @ moment_x @ inverse
    assert torch.allclose(after_w, after_x, rtol=1e-4, atol=1e-4 * float(after_x.abs().max()))
    power = after_x.diagonal()
    if width == 32:  # the Hadamard matrix spreads it over all dimensions
        assert power.max() / power.min() < 1 + 1e-6


def test_nothing_runs_unless_it_is_asked_for() -> None:
    assert not Wush().wants(SITE, {})
    assert Wush(norms="online").wants(SITE, {})
    statistics = InputStatistics(NEEDS, 0)
    assert Wush().fit(SITE, {}, statistics, {}, Heads(1, 1, 8)) is None
    heads = Heads(1, 1, 8)
    assert Wush().online_map(SITE, 8, heads) is None
    assert Wush(norms="online").online_map(SITE, 8, heads) == MapShape("blocks", (1, 8))
