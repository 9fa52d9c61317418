"""Transforms: rewritings that change nothing a network computes, fitted so that it rounds better.

Each method is a `Part` with `fit(site, weights, statistics, schemes, heads) → Transform | None`; `fold` puts the result
into the weights. A new one is a new file and a line here.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from bitfold.models.family import Site
from bitfold.numerics import Scheme
from bitfold.part import Part
from bitfold.statistics import InputStatistics
from bitfold.transforms.awq import Awq
from bitfold.transforms.smoothquant import SmoothQuant
from bitfold.transforms.transform import Heads, Transform, fold

__all__ = ["TRANSFORMS", "Heads", "SiteTransform", "Transform", "fold"]


class SiteTransform(Protocol):
    """Fits a transform at one site."""

    def fit(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: InputStatistics,
        schemes: Mapping[str, Scheme],
        heads: Heads,
    ) -> Transform | None: ...


TRANSFORMS: dict[str, type[Part]] = {
    "smoothquant": SmoothQuant,
    "awq": Awq,
}
