"""Channels in clusters of like ranges: RPTQ (Yuan et al. 2023, arXiv 2304.01089), section 3.2.

    minimise over clusters c and centres m:    Σ_j ‖(min_j, max_j) − m_c(j)‖²

the sum over the channels j of an input, by Lloyd's k-means. A channel's range is taken as quantization takes it,
widened to contain 0. The paper starts from random centres; here each one is the channel farthest from those before it
(Gonzalez 1985), so that nothing is drawn, and single outliers have clusters of their own at once.
"""

import torch
from torch import Tensor

__all__ = ["channel_clusters", "over_clusters"]

_STEPS = 100


def channel_clusters(minimum: Tensor, maximum: Tensor, count: int) -> Tensor:
    """The cluster of each channel [n], uint8, given the smallest and largest value of each [n].

    count: of the clusters, at most 256; where there are fewer ranges than that, the last ones stay empty. They are
    numbered by the width of their centres, whatever the order of the channels. Computed in float64 on the CPU, so
    that every device finds the same.
    """
    ranges = torch.stack([minimum.clamp(max=0), maximum.clamp(min=0)], dim=1).double().cpu()
    distinct, channel_of = torch.unique(ranges, dim=0, return_inverse=True)
    weight = torch.bincount(channel_of).double()
    centres = _far_apart(distinct, min(count, len(distinct)))
    nearest = _nearest(distinct, centres)
    for _ in range(_STEPS):
        centres = _means(distinct, weight, nearest, centres)
        before, nearest = nearest, _nearest(distinct, centres)
        if torch.equal(nearest, before):
            break
    by_width = (centres[:, 1] - centres[:, 0]).argsort(stable=True).argsort()
    return by_width[nearest][channel_of].to(torch.uint8).to(minimum.device)


def over_clusters(values: Tensor, clusters: Tensor, count: int, reduce: str) -> Tensor:
    """The extremes of channels [..., n] within each cluster, and 0 with them, [..., count].

    clusters: of the channels [n]; reduce: `amin` or `amax`.
    """
    index = clusters.long().expand(values.shape)
    return values.new_zeros(*values.shape[:-1], count).scatter_reduce(-1, index, values, reduce)


def _far_apart(points: Tensor, count: int) -> Tensor:
    """Points [count, 2], each the farthest from all before it; the first is the farthest from 0."""
    chosen = [int(points.square().sum(dim=1).argmax())]
    distance = _squared(points, points[chosen[0]])
    for _ in range(count - 1):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, _squared(points, points[chosen[-1]]))
    return points[chosen]


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The centre nearest to each point, [n]; of two as near the first."""
    return _squared(points.unsqueeze(1), centres).argmin(dim=1)


def _squared(points: Tensor, other: Tensor) -> Tensor:
    return (points - other).square().sum(dim=-1)


def _means(points: Tensor, weight: Tensor, nearest: Tensor, centres: Tensor) -> Tensor:
    """The mean of each centre's points, weighted; a centre without points stays where it is."""
    mass = torch.zeros(len(centres), dtype=points.dtype).index_add_(0, nearest, weight)
    sums = torch.zeros_like(centres).index_add_(0, nearest, points * weight.unsqueeze(1))
    return torch.where(mass.unsqueeze(1) > 0, sums / mass.unsqueeze(1), centres)
