"""A matrix for every KV head on keys, as the attention multiplies them (FlatQuant, Sun et al. 2024, arXiv 2410.09426).

k' = k M and q' = q M⁻ᵀ: behind a rotary embedding, or norms of heads, nothing absorbs it, and it runs. FlatQuant learns
M; here it is WUSH's closed form (arXiv 2512.00956) of the second moments of the keys and of the queries that read
them, and a start for what `affine` learns. Only where queries or keys are quantized.
"""

from collections.abc import Mapping

from torch import Tensor

from bitfold.models.family import QueryKey, Site
from bitfold.numerics import MapShape, Scheme
from bitfold.part import Need
from bitfold.statistics import InputStatistics
from bitfold.transforms.groups import HeadMatrix, Heads, Transform
from bitfold.transforms.online import OnlineHeads
from bitfold.transforms.site_transform import SiteTransform
from bitfold.transforms.wush import closed_form

__all__ = ["Keys", "head_matrices", "quantizes_keys"]


class Keys(SiteTransform):
    """damping: share of the mean moment that is added to each moment's diagonal, so that it is invertible."""

    needs = frozenset[Need]({"heads"})

    damping: float = 1e-4

    def online_map(self, site: Site, width: int, heads: Heads) -> MapShape | None:
        """See `SiteTransform.online_map`."""
        return head_matrices(site, heads) if isinstance(site, QueryKey) else None

    def wants(self, site: Site, schemes: Mapping[str, Scheme]) -> bool:
        """See `SiteTransform.wants`."""
        return isinstance(site, QueryKey) and quantizes_keys(site, schemes)

    def fit(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: InputStatistics,
        schemes: Mapping[str, Scheme],
        heads: Heads,
    ) -> Transform | None:
        """The matrices at q · k, folded where they can be; None elsewhere.

        statistics: with the second moments of queries and keys as they are multiplied.
        """
        if not isinstance(site, QueryKey) or not self.wants(site, schemes):
            return None
        queries, keys = (statistics.head_moment(name, heads.keys) for name in ("query", "key"))
        inverse, found = closed_form(queries.double(), keys.double(), self.damping, rotate=True)
        dtype = weights[f"{site.key}.weight"].dtype
        if head_matrices(site, heads) is None:
            return HeadMatrix(site, found.to(dtype), inverse.to(dtype))
        return OnlineHeads(site, found.to(dtype))


def head_matrices(site: QueryKey, heads: Heads) -> MapShape | None:
    """The map of matrices on keys; None where they fold."""
    folds = site.rotary == "none" and site.key_norm is None
    return None if folds else MapShape("heads", (heads.keys, heads.size))


def quantizes_keys(site: QueryKey, schemes: Mapping[str, Scheme]) -> bool:
    """Whether a block's attention has its queries or keys quantized, by the schemes of its linear layers."""
    found = (schemes[name] for name in (site.query, site.key) if name in schemes)
    return any(scheme.query is not None or scheme.key is not None for scheme in found)
