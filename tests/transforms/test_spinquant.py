"""Steps on the Stiefel manifold: orthogonal to the last bit, downhill as calculus says, to the optimum."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitfold.transforms.spinquant import BasesProblem, cayley_step, learn_bases, tangent

F64 = torch.float64
SIZE = 12


def rotation(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=F64))[0]


def keeping_ones(size: int) -> Tensor:
    """A rotation that leaves the vector of ones alone: one of the plane across it, by an orthonormal basis."""
    basis = torch.linalg.qr(torch.cat([torch.ones(size, 1), torch.eye(size)[:, 1:]], 1).double())[0]
    inner = torch.eye(size, dtype=F64)
    inner[1:, 1:] = rotation(size - 1, size - 1, seed=3)
    return basis @ inner @ basis.T


def curved(point: Tensor) -> Tensor:
    """A function of a matrix that is not linear."""
    weights = torch.arange(point.numel(), dtype=F64).reshape(point.shape).sin()
    return (weights * point).sum() + (point**4 * weights.cos()).sum()


@pytest.mark.parametrize("size", [64, 1024])
def test_the_angle_does_not_depend_on_the_width(size: int) -> None:
    skew = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=F64)
    skew = skew - skew.T
    moved = cayley_step(torch.eye(size, dtype=F64), skew, 0.5)
    # cos of the largest angle is the least eigenvalue of the symmetric part.
    turned = torch.linalg.eigvalsh((moved + moved.T) / 2).min().clamp(max=1).acos()
    assert turned == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("angle", [1e-3, 1.0, 3.0])
def test_a_step_stays_in_the_group(keeps_ones: bool, angle: float) -> None:
    point = keeping_ones(SIZE) if keeps_ones else rotation(SIZE, SIZE)
    gradient = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=F64)
    moved = cayley_step(point, tangent(point, gradient, keeps_ones), angle)
    assert (moved @ moved.T - torch.eye(SIZE, dtype=F64)).abs().max() < 1e-13
    turned = torch.linalg.eigvals(moved @ point.T).angle().abs().max()
    assert turned == pytest.approx(angle, rel=0.02)  # of the plane that turns most
    if keeps_ones:
        assert (moved.sum(dim=1) - 1).abs().max() < 1e-13


def test_matrices_of_several_heads_move_each_by_itself() -> None:
    points = rotation(3, SIZE, SIZE)
    gradient = torch.randn(points.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    gradient[1] *= 100
    together = cayley_step(points, tangent(points, gradient, False), 0.3)
    for one, point, its in zip(together, points, gradient, strict=True):
        torch.testing.assert_close(one, cayley_step(point, tangent(point, its, False), 0.3))


def test_downhill_at_the_rate_of_the_derivative() -> None:
    point = rotation(SIZE, SIZE).requires_grad_()
    (gradient,) = torch.autograd.grad(curved(point), point)
    point = point.detach()
    skew = tangent(point, gradient, False)
    largest = float(torch.linalg.matrix_norm(skew, 2))

    def fall(angle: float) -> float:
        """By the formula R' = (I + τ/2 W)⁻¹ (I − τ/2 W) R for a small τ, and the derivative −τ ‖W‖²/2 of f along it."""
        predicted = angle / largest * float(skew.square().sum()) / 2
        return float(curved(point) - curved(cayley_step(point, skew, angle))) / predicted

    assert fall(1e-5) == pytest.approx(1, abs=1e-3)


def problem(
    bases: list[Tensor], function: Callable[[], Tensor], keeps_ones: bool = False
) -> BasesProblem:
    def gradient(windows: Tensor) -> float:
        loss = function()
        loss.backward()
        return float(loss.detach())

    return BasesProblem(
        bases=bases,
        loss=lambda windows: float(function().detach()),
        gradient=gradient,
        training=torch.arange(5),
        check=torch.arange(5, 7),
        keeps_ones=keeps_ones,
        seed=0,
        report=lambda done, total, what: None,
    )


def test_the_nearest_rotation_is_found() -> None:
    """Procrustes' problem, whose answer is known: min ‖R A − B‖ over rotations is U Vᵀ of B Aᵀ = U S Vᵀ."""
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(6, 20, generator=generator, dtype=F64)
    b = torch.randn(6, 20, generator=generator, dtype=F64) * 0.1 + rotation(6, 6, seed=7) @ a
    u, _, v = torch.linalg.svd(b @ a.T)
    start = torch.eye(6, dtype=F64)
    if torch.linalg.det(u @ v) < 0:  # a rotation does not become a reflection
        start[0, 0] = -1
    bases = [start.requires_grad_()]
    found = learn_bases(problem(bases, lambda: (bases[0] @ a - b).square().sum()), 400, 2, 0.5)
    best = float((u @ v @ a - b).square().sum())
    assert found.after == pytest.approx(best, rel=1e-2)
    assert found.before > 5 * best
    assert 0 < found.kept <= found.steps == 400


def test_a_loss_that_is_not_finite_goes_back() -> None:
    bases = [rotation(4, 4).requires_grad_()]
    calls = []

    def function() -> Tensor:
        calls.append(1)
        value = bases[0][0, 0] * 3
        return value / 0 if len(calls) > 8 else value

    found = learn_bases(problem(bases, function), 40, 2, 0.5)
    assert 0 < found.steps < 39
    assert "not finite" in found.notes[0]
    assert torch.equal(bases[0].detach(), rotation(4, 4))


def test_a_first_loss_that_is_not_finite_learns_nothing() -> None:
    bases = [rotation(4, 4).requires_grad_()]
    found = learn_bases(problem(bases, lambda: bases[0].sum() * torch.nan), 40, 2, 0.5)
    assert found.steps == 0
    assert "nothing was learned" in found.notes[0]
    assert "not finite" in found.sentence
    assert torch.equal(bases[0].detach(), rotation(4, 4))


def test_what_is_worse_on_held_back_windows_is_not_kept() -> None:
    bases = [rotation(4, 4).requires_grad_()]
    uphill = problem(bases, lambda: -bases[0].sum())
    found = learn_bases(
        BasesProblem(**vars(uphill) | {"loss": lambda w: float(bases[0].detach().sum())}), 8, 2, 0.5
    )
    assert (found.kept, found.before) == (0, found.after)
    assert torch.equal(bases[0].detach(), rotation(4, 4))
    assert "did not lower" in found.sentence
