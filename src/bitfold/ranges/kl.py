"""KL divergence: the range whose quantized histogram is nearest to the original one.

The entropy calibration of Migacz, "8-bit inference with TensorRT" (GTC 2017), for every group at once: P is the
histogram inside the candidate range with what lies outside added to its last bins; Q merges the bins that share a
level and spreads their mass evenly over those that were not empty.
"""

import torch
from pydantic import Field
from torch import Tensor

from bitfold.numerics import TensorScheme
from bitfold.ranges.range import Range

__all__ = ["Kl"]


class Kl(Range):
    """Shrinks min-max to the step of least KL(P ‖ Q)."""

    bins: int = Field(default=512, ge=16)
    smallest: float = Field(default=0.4, gt=0, lt=1)
    steps: int = Field(default=31, ge=2)

    def limits(
        self, groups: Tensor, scheme: TensorScheme, gram: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper limit [..., 1] of grouped values [..., g]."""
        values = groups.flatten(0, -2)
        parts = [
            self._best_ratio(part, scheme) for part in values.split(max(1, 2**22 // self.bins))
        ]
        ratio = torch.cat(parts).reshape(*groups.shape[:-1], 1)
        minimum, maximum = torch.aminmax(groups, dim=-1, keepdim=True)
        return minimum * ratio, maximum * ratio

    def _best_ratio(self, values: Tensor, scheme: TensorScheme) -> Tensor:
        """The ratio [rows] of least divergence for values [rows, g]."""
        minimum, maximum = torch.aminmax(values, dim=-1, keepdim=True)
        minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
        if scheme.symmetric:
            maximum = torch.maximum(-minimum, maximum)
            minimum = -maximum
        width = (maximum - minimum).clamp(min=torch.finfo(values.dtype).tiny)
        index = ((values - minimum) / width * self.bins).long().clamp_(0, self.bins - 1)
        counts = torch.zeros(values.shape[0], self.bins, device=values.device)
        counts.scatter_add_(1, index, torch.ones_like(values, dtype=counts.dtype))
        best = torch.ones(values.shape[0], device=values.device)
        best_divergence = torch.full_like(best, torch.inf)
        # Zero sits at the same share of the width in every row only for symmetric grids: bins are kept
        # relative to the range, and shrinking towards zero is shrinking towards that row's own bin.
        zero_at = (-minimum / width * self.bins).squeeze(-1)
        for ratio in torch.linspace(1.0, self.smallest, self.steps).tolist():
            divergence = _divergence(counts, zero_at, ratio, 2**scheme.bits)
            better = divergence < best_divergence
            best_divergence = torch.where(better, divergence, best_divergence)
            best = torch.where(better, torch.full_like(best, ratio), best)
        return best.to(values.dtype)


def _divergence(counts: Tensor, zero_at: Tensor, ratio: float, levels: int) -> Tensor:
    """KL(P ‖ Q) [rows] of histograms [rows, bins] cut to `ratio` of their width around zero."""
    rows, bins = counts.shape
    centre = torch.arange(bins, device=counts.device) + 0.5
    low = (zero_at * (1 - ratio)).unsqueeze(-1)
    high = low + bins * ratio
    inside = (centre >= low) & (centre < high)
    kept = counts * inside
    # P: the mass outside goes to the first and last bin inside.
    first = inside.float().argmax(dim=1, keepdim=True)
    last = bins - 1 - inside.flip(1).float().argmax(dim=1, keepdim=True)
    below = (counts * (centre < low)).sum(dim=1, keepdim=True)
    above = (counts * (centre >= high)).sum(dim=1, keepdim=True)
    p = kept.scatter_add(1, first, below).scatter_add(1, last, above)
    # Q: bins of one level share the level's mass evenly among those that are not empty.
    level = ((centre - low) / (bins * ratio) * levels).long().clamp(0, levels - 1)
    level = torch.where(inside, level, torch.full_like(level, levels))
    filled = ((counts > 0) & inside).to(counts.dtype)
    mass = torch.zeros(rows, levels + 1, device=counts.device).scatter_add_(1, level, kept)
    share = torch.zeros(rows, levels + 1, device=counts.device).scatter_add_(1, level, filled)
    q = (mass / share.clamp(min=1)).gather(1, level) * filled
    p = p / p.sum(dim=1, keepdim=True)
    q = q / q.sum(dim=1, keepdim=True).clamp(min=1)
    # A bin that P fills only with what was cut off has q = 0: a small floor keeps the divergence finite.
    return (p * (p.clamp(min=1e-12) / q.clamp(min=1e-6)).log()).sum(dim=1)
