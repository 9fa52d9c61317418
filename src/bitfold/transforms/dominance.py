"""AffineQuant's gradual mask, and diagonal dominance (arXiv 2403.12544, section 3.2–3.3).

A strictly diagonally dominant matrix, |a_ii| > Σ_{j≠i} |a_ij|, is invertible (Levy–Desplanques). The mask and its
stability factor only help towards dominance; `project` ensures it.
"""

import torch
from torch import Tensor

__all__ = ["gradual_mask", "margin", "project"]


def gradual_mask(
    size: int, epoch: int, epochs: int, alpha: float, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """GM_e [n, n]: 1 on the diagonal, α for 0 < |i − j| ≤ ⌊(n−1)·e/(t−1)⌋, 0 otherwise; one epoch: full.

    >>> gradual_mask(3, epoch=1, epochs=3, alpha=0.5)
    tensor([[1.0000, 0.5000, 0.0000],
            [0.5000, 1.0000, 0.5000],
            [0.0000, 0.5000, 1.0000]])
    """
    width = size - 1 if epochs == 1 else (size - 1) * epoch // (epochs - 1)
    index = torch.arange(size)
    distance = (index[:, None] - index).abs()
    mask = torch.where(distance <= width, alpha, 0.0).to(dtype)
    return mask.fill_diagonal_(1.0)


def margin(matrices: Tensor) -> Tensor:
    """Per matrix of [..., n, n]: the least of 1 − Σ_{j≠i}|a_ij| / |a_ii| over the rows; positive: dominant."""
    magnitude = matrices.abs()
    diagonal = magnitude.diagonal(dim1=-2, dim2=-1)
    others = magnitude.sum(dim=-1) - diagonal
    return (1 - others / diagonal.clamp(min=1e-30)).amin(dim=-1)


def project(matrices: Tensor, mask: Tensor, least: float) -> None:
    """Shrink, in place, the off-diagonal entries of the rows whose margin, masked, is below `least`."""
    masked = (matrices * mask).abs()
    diagonal = masked.diagonal(dim1=-2, dim2=-1)
    others = masked.sum(dim=-1) - diagonal
    factor = ((1 - least) * diagonal / others.clamp(min=1e-30)).clamp(max=1.0).unsqueeze(-1)
    kept = matrices.diagonal(dim1=-2, dim2=-1).clone()
    matrices.mul_(factor)
    matrices.diagonal(dim1=-2, dim2=-1).copy_(kept)
