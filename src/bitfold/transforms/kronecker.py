"""A Kronecker product before every linear layer, which runs (FlatQuant's shape, Sun et al. 2024, arXiv 2410.09426).

x' = x (A₁ ⊗ A₂) with A₁ [a, a], A₂ [b, b], a b = n: n (a + b) multiply-adds instead of n². FlatQuant learns both; here
they are WUSH's closed form (arXiv 2512.00956) for each factor, of the second moments' own nearest Kronecker products

    E[xᵀx] ≈ X₁ ⊗ X₂        WᵀW / out ≈ W₁ ⊗ W₂

(Van Loan and Pitsianis 1993: the best rank-1 matrix of the rearranged moment), and a start for what `affine` learns.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from bitfold.models.family import QueryKey, Site
from bitfold.numerics import MapShape, Scheme, hadamard_size
from bitfold.part import Need
from bitfold.statistics import InputStatistics
from bitfold.transforms.diagonal import reader_weights
from bitfold.transforms.groups import Heads, Transform
from bitfold.transforms.online import OnlineKronecker
from bitfold.transforms.site_transform import SiteTransform
from bitfold.transforms.wush import closed_form

__all__ = ["Kronecker", "factors_of", "nearest_factors"]

# A pair of factors that have Hadamard matrices is preferred while it costs at most so many times as much.
_WORTH = 1.5


class Kronecker(SiteTransform):
    """damping: share of the mean moment that is added to each factor's diagonal, so that it is invertible."""

    needs = frozenset[Need]({"gram"})

    damping: float = 1e-4

    def online_map(self, site: Site, width: int, heads: Heads) -> MapShape | None:
        """See `SiteTransform.online_map`."""
        return None if isinstance(site, QueryKey) else MapShape("kronecker", factors_of(width))

    def wants(self, site: Site, schemes: Mapping[str, Scheme]) -> bool:
        """See `SiteTransform.wants`."""
        return not isinstance(site, QueryKey)

    def fit(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: InputStatistics,
        schemes: Mapping[str, Scheme],
        heads: Heads,
    ) -> Transform | None:
        """The product before the readers of a site; None at q · k."""
        if isinstance(site, QueryKey):
            return None
        readers = reader_weights(weights, site)
        sizes = factors_of(readers.shape[1])
        moments_x = nearest_factors(statistics.gram.double(), *sizes)
        moments_w = nearest_factors(readers.double().T @ readers.double() / len(readers), *sizes)
        left, right = (
            closed_form(w[None], x[None], self.damping, rotate=True)[1][0]
            for w, x in zip(moments_w, moments_x, strict=True)
        )
        return OnlineKronecker(site, left.to(readers.dtype), right.to(readers.dtype))


def factors_of(width: int) -> tuple[int, int]:
    """Two factors of a width, near its root, and of sizes that have Hadamard matrices where that costs little.

    >>> [factors_of(width) for width in (256, 768, 4096, 11008, 14336, 7)]
    [(16, 16), (24, 32), (64, 64), (86, 128), (112, 128), (1, 7)]
    """
    pairs = [(a, width // a) for a in range(1, int(width**0.5) + 1) if width % a == 0]
    cheapest = min(pairs, key=sum)
    able = [pair for pair in pairs if all(hadamard_size(size) == size for size in pair)]
    best = min(able, key=sum, default=cheapest)
    return best if sum(best) <= _WORTH * sum(cheapest) else cheapest


def nearest_factors(moment: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Symmetric positive semi-definite X₁ [left, left], X₂ [right, right] of least ‖M − X₁ ⊗ X₂‖ for such an M."""
    rearranged = moment.view(left, right, left, right).transpose(1, 2).reshape(left**2, right**2)
    # The leading singular pair, by power iteration: of a positive operator it starts well at the trace.
    second = torch.eye(right, dtype=moment.dtype, device=moment.device).flatten()
    for _ in range(50):
        first = rearranged @ second
        first /= first.norm().clamp(min=torch.finfo(moment.dtype).tiny)
        second = rearranged.T @ first
    return first.view(left, left), second.view(right, right)
