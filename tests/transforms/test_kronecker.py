"""Kronecker products: the nearest one of a moment, the closed form of its factors, what is learned on top."""

import pytest
import torch
from torch import Tensor

from bitfold.models.family import QueryKey, UpDown
from bitfold.numerics import MapShape, apply_map
from bitfold.part import Need
from bitfold.statistics import InputStatistics
from bitfold.transforms.groups import Heads, fold
from bitfold.transforms.kronecker import Kronecker, factors_of, nearest_factors
from bitfold.transforms.learned import MaskSettings, learned_at
from bitfold.transforms.online import OnlineKronecker

FLOAT64 = torch.float64
SITE = UpDown("up", "down", "gate")
HEADS = Heads(1, 1, 8)


def _moment(size: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * size, size, dtype=FLOAT64, generator=generator)
    return rows.T @ rows / len(rows)


def _statistics(rows: Tensor) -> InputStatistics:
    statistics = InputStatistics(frozenset[Need]({"gram"}), len(rows))
    statistics.update(rows)
    return statistics


@pytest.mark.parametrize("width", [1, 7, 96, 256, 768, 4096, 11008, 14336])
def test_factors_multiply_to_the_width(width: int) -> None:
    left, right = factors_of(width)
    assert left * right == width
    cheapest = min(a + width // a for a in range(1, width + 1) if width % a == 0)
    assert left + right <= 1.5 * cheapest


def test_the_nearest_product_is_the_leading_singular_pair_of_the_rearranged_moment() -> None:
    moment = _moment(12)
    first, second = nearest_factors(moment, 3, 4)
    found = (moment - torch.kron(first, second)).norm()
    # Van Loan and Pitsianis, by numpy's order of axes: M[i1 i2, j1 j2] → R[i1 j1, i2 j2].
    rearranged = torch.einsum("ikjl->ijkl", moment.view(3, 4, 3, 4)).reshape(9, 16)
    values = torch.linalg.svdvals(rearranged)
    assert torch.allclose(found, values[1:].norm(), rtol=1e-9)
    for factor in (first, second):
        assert torch.allclose(factor, factor.T, atol=1e-12)
        assert float(torch.linalg.eigvalsh(factor).min()) > 0


def test_a_product_is_found_again() -> None:
    left, right = _moment(3), _moment(4, seed=1)
    first, second = nearest_factors(torch.kron(left, right), 3, 4)
    assert torch.allclose(torch.kron(first, second), torch.kron(left, right), atol=1e-12)


def test_of_moments_that_are_products_both_sides_share_the_load() -> None:
    """As with WUSH in full: both second moments become the same, and every channel has the same power."""
    sizes = (4, 8)
    roots = [torch.linalg.cholesky(_moment(size, seed=size)) for size in sizes]
    exact = torch.kron(*[root @ root.T for root in roots])
    values, vectors = torch.linalg.eigh(exact)
    rows = (vectors * values.sqrt()).T * len(values) ** 0.5  # of second moment `exact`
    weights = {"down.weight": torch.eye(32, dtype=FLOAT64) * 32**0.5}
    made = Kronecker(damping=0.0).fit(SITE, weights, _statistics(rows), {}, HEADS)
    assert isinstance(made, OnlineKronecker)
    folded = fold(weights, made, HEADS)
    inputs = apply_map(rows, {"left": made.left, "right": made.right})
    moment_x = inputs.T @ inputs / len(inputs)
    moment_w = folded["down.weight"].T @ folded["down.weight"] / 32
    assert torch.allclose(moment_x / moment_x.trace(), moment_w / moment_w.trace(), atol=1e-9)
    power = moment_x.diagonal()
    assert power.max() / power.min() < 1 + 1e-9


def test_nothing_stands_on_queries_and_keys() -> None:
    site = QueryKey("q", "k", "none")
    statistics = InputStatistics(frozenset(), 0)
    assert Kronecker().online_map(site, 8, HEADS) is None
    assert Kronecker().fit(site, {}, statistics, {}, HEADS) is None
    assert Kronecker().online_map(SITE, 96, HEADS) == MapShape("kronecker", factors_of(96))


@pytest.mark.parametrize("storage", [None, torch.bfloat16])
def test_a_second_product_is_multiplied_with_the_first(storage: torch.dtype | None) -> None:
    weights = {"down.weight": torch.randn(5, 12, dtype=FLOAT64)}
    x = torch.randn(7, 12, dtype=FLOAT64)
    folded = weights
    for _ in range(2):
        factors = (
            torch.eye(n, dtype=FLOAT64) + torch.randn(n, n, dtype=FLOAT64) / 5 for n in (3, 4)
        )
        folded = fold(folded, OnlineKronecker(SITE, *factors), HEADS, storage)
    tensors = {name: folded[f"down.online.{name}"] for name in ("left", "right")}
    if storage is not None:
        assert all(torch.equal(t, t.to(storage).double()) for t in tensors.values())
    found = apply_map(x, tensors) @ folded["down.weight"].T
    assert torch.allclose(found, x @ weights["down.weight"].T, atol=1e-10)


def test_what_is_learned_knows_its_inverse() -> None:
    settings = MaskSettings(1, 1.0, False, "off", 0.0, "float64")
    weights = {"down.weight": torch.randn(5, 12, dtype=FLOAT64)}
    learned = learned_at(SITE, weights, HEADS, settings, full=True, shifts=True, kronecker=True)
    assert learned is not None
    start = learned.transform()
    assert torch.equal(start.matrix[0], torch.eye(12, dtype=FLOAT64))
    for scale in learned.scales:
        scale.data = torch.randn_like(scale) / 2
    moved = learned.transform()
    assert moved.defect() < 1e-12
    assert learned.report()["condition"] == pytest.approx(
        float(torch.linalg.cond(moved.matrix[0])), rel=1e-9
    )
    x = torch.randn(3, 12, dtype=FLOAT64)
    folded = fold(weights, moved, HEADS)
    tensors = {name: folded[f"down.online.{name}"] for name in ("left", "right")}
    output = apply_map(x, tensors) @ folded["down.weight"].T
    assert torch.allclose(output, x @ weights["down.weight"].T, atol=1e-10)
    # The gradient of what the map alone gives reaches every parameter.
    apply_map(x, tensors).square().sum().backward()
    assert all(scale.grad is not None and scale.grad.abs().sum() > 0 for scale in learned.scales)
