"""MagR (Zhang et al. 2024, arXiv 2406.00800): weights' outliers shrunk along directions that the inputs hardly use.

Per output channel w₀, by proximal gradient descent,

    minimise ½ (w − w₀) H (w − w₀)ᵀ + α ‖w‖∞,      H = E[xxᵀ] / its largest eigenvalue

The proximal operator of t‖·‖∞ is v − (its projection onto the ℓ1 ball of radius t) (Moreau's decomposition). With
groups the norm is of each group.
"""

import torch
from pydantic import Field
from torch import Tensor

from bitfold.corrections.correction import Correction
from bitfold.numerics import TensorScheme, from_groups, to_groups
from bitfold.part import Need
from bitfold.statistics import InputStatistics

__all__ = ["Magr", "project_l1"]


class Magr(Correction):
    """alpha: weight of the penalty, relative to the largest eigenvalue of H. steps: of the descent."""

    needs = frozenset[Need]({"gram"})

    alpha: float = Field(default=1e-3, gt=0)
    steps: int = Field(default=150, ge=1)

    def apply(self, weight: Tensor, scheme: TensorScheme, statistics: InputStatistics) -> Tensor:
        """See `Correction.apply`."""
        gram = statistics.gram
        largest = torch.linalg.eigvalsh(gram)[-1].clamp(min=torch.finfo(gram.dtype).tiny)
        curvature = gram / largest
        start = weight.to(gram.dtype)
        found = start
        for _ in range(self.steps):
            moved = found - (found - start) @ curvature
            groups = to_groups(moved, scheme)
            found = from_groups(groups - project_l1(groups, self.alpha), moved.shape)
        return found.to(weight.dtype)


def project_l1(x: Tensor, radius: float) -> Tensor:
    """The nearest point to x [..., n] with ‖·‖₁ ≤ radius along the last axis (Duchi et al. 2008)."""
    magnitude = x.abs()
    falling = magnitude.sort(dim=-1, descending=True).values
    excess = falling.cumsum(dim=-1) - radius
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    kept = (falling * count > excess).sum(dim=-1, keepdim=True).clamp(min=1)
    threshold = (excess.gather(-1, kept - 1) / kept).clamp(min=0)
    return x.sign() * (magnitude - threshold).clamp(min=0)
