"""SpinQuant (Liu et al. 2024, arXiv 2405.16406): rotations learned on the Stiefel manifold against the model's loss.

The residual stream's R and a matrix for every KV head's values change nothing that the network computes, until it is
quantized; how much is lost then differs from rotation to rotation. A step of Cayley SGD (Li et al. 2020, arXiv
2002.01113) turns R against the gradient G of the quantized network's loss and stays orthogonal:

    W = G Rᵀ − R Gᵀ          R ← (I + τ/2 W)⁻¹ (I − τ/2 W) R

Under LayerNorm R has to keep the vector of ones: W is projected onto what leaves it alone. The loss is
KL(original ‖ quantized) on calibration text; the paper's is the cross-entropy of the text itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CHECKS", "BasesProblem", "LearnedBases", "cayley_step", "learn_bases", "tangent"]

# Of finding the largest singular value.
_ITERATIONS = 12
CHECKS = 4
"""So often is the state looked at on the windows that are held back, beside the first."""


@dataclass(frozen=True)
class BasesProblem:
    """The quantized model's distance to the original as a function of its bases.

    bases: orthogonal matrices [..., n, n] float64 that require gradients and are changed in place, the stream's first.
    loss(windows): mean KL(original ‖ quantized) in nats per token on the calibration windows of these indices.
    gradient(windows): the same; adds its gradient to every basis. training, check: indices of windows to train on, and
    to judge by. keeps_ones: the stream's R is to keep R 1 = 1. report(done, total, what): progress.
    """

    bases: Sequence[Tensor]
    loss: Callable[[Tensor], float]
    gradient: Callable[[Tensor], float]
    training: Tensor
    check: Tensor
    keeps_ones: bool
    seed: int
    report: Callable[[int, int, str], None]


@dataclass(frozen=True)
class LearnedBases:
    """before, after: KL on the held-back windows; steps: how many were made; kept: after how many of them the state is
    that was kept, 0 where it is the first. notes: what the user should read."""

    before: float
    after: float
    steps: int
    kept: int
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The same, in words."""
        if not math.isfinite(self.before):
            return "Rotations were not learned: the KL on held-back windows is not finite."
        if not self.kept:
            return (
                f"Learning rotations did not lower the KL of {self.before:.4f} on held-back windows: they stayed as "
                "they were."
            )
        return (
            f"Rotations learned: KL on held-back windows {self.before:.4f} → {self.after:.4f}, the state after step "
            f"{self.kept} of {self.steps}; other parts of the recipe not counted."
        )


def learn_bases(problem: BasesProblem, steps: int, batch: int, angle: float) -> LearnedBases:
    """Move the problem's bases to where the loss is lower on the windows that are held back.

    batch: windows in a step; angle: by which the first step turns, in radians, the largest of all planes'; it falls to
    zero along a cosine. A loss that is not finite goes back to the best state and ends it.
    """
    generator = torch.Generator().manual_seed(problem.seed)
    problem.report(0, steps, "learning rotations")
    before = problem.loss(problem.check)
    if not math.isfinite(before):
        note = "rotations: the loss on held-back windows is not finite: nothing was learned"
        return LearnedBases(before, before, 0, 0, (note,))
    best, best_loss, kept = _copies(problem.bases), before, 0
    drawn: list[int] = []
    for step in range(1, steps + 1):
        while len(drawn) < batch:
            order = torch.randperm(len(problem.training), generator=generator)
            drawn += problem.training[order].tolist()
        windows, drawn = torch.tensor(drawn[:batch]), drawn[batch:]
        for basis in problem.bases:
            basis.grad = None
        loss = problem.gradient(windows)
        gradients = [basis.grad for basis in problem.bases]
        if not math.isfinite(loss) or not _finite(gradients):
            _put_back(problem.bases, best)
            note = f"rotations: the loss of step {step} is not finite: the state after step {kept} was kept"
            return LearnedBases(before, best_loss, step - 1, kept, (note,))
        share = (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        for place, (basis, gradient) in enumerate(zip(problem.bases, gradients, strict=True)):
            assert gradient is not None
            skew = tangent(basis.detach(), gradient, problem.keeps_ones and place == 0)
            basis.data.copy_(cayley_step(basis.detach(), skew, angle * share))
        problem.report(step, steps, "learning rotations")
        if step % math.ceil(steps / CHECKS) and step != steps:
            continue
        now = problem.loss(problem.check)
        if now < best_loss:
            best, best_loss, kept = _copies(problem.bases), now, step
    _put_back(problem.bases, best)
    return LearnedBases(before, best_loss, steps, kept)


def tangent(basis: Tensor, gradient: Tensor, keeps_ones: bool) -> Tensor:
    """W = G Rᵀ − R Gᵀ, skew [..., n, n]: the direction in which R, turned from the left, raises the loss most.

    keeps_ones: of those with W 1 = 0.
    """
    product = gradient @ basis.transpose(-1, -2)
    skew = product - product.transpose(-1, -2)
    if keeps_ones:
        skew = skew - skew.mean(dim=-1, keepdim=True)
        skew = skew - skew.mean(dim=-2, keepdim=True)
    return skew


def cayley_step(basis: Tensor, skew: Tensor, angle: float) -> Tensor:
    """R turned against a skew matrix: orthogonal again, by `angle` radians in the plane that turns most."""
    largest = _largest_singular(skew)[..., None, None].clamp(min=1e-300)
    half = skew * (math.tan(angle / 2) / largest)
    eye = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    return torch.linalg.solve(eye + half, (eye - half) @ basis)


def _largest_singular(skew: Tensor) -> Tensor:
    """Of each matrix [..., n, n], within a few per cent, from below."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(skew.shape[-1], 4, generator=generator, dtype=skew.dtype).to(skew.device)
    found = start.expand(*skew.shape[:-1], 4)
    for _ in range(_ITERATIONS):
        found = torch.linalg.qr(skew @ found)[0]
    return torch.linalg.matrix_norm(skew @ found, 2)


def _copies(bases: Sequence[Tensor]) -> list[Tensor]:
    return [basis.detach().clone() for basis in bases]


def _put_back(bases: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for basis, value in zip(bases, values, strict=True):
        basis.data.copy_(value)


def _finite(gradients: Sequence[Tensor | None]) -> bool:
    return all(one is not None and bool(torch.isfinite(one).all()) for one in gradients)
