"""What a method that fits a transform site by site is."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from bitfold.models.family import Site
from bitfold.numerics import MapShape, Scheme
from bitfold.part import Part
from bitfold.statistics import InputStatistics
from bitfold.transforms.groups import Heads, Transform

__all__ = ["SiteTransform"]


class SiteTransform(Part):
    """Fits a transform at one site from statistics of its readers' input.

    balances: what it leaves inside an MLP is a diagonal.
    """

    balances: ClassVar[bool] = False

    def wants(self, site: Site, schemes: Mapping[str, Scheme]) -> bool:
        """Whether `fit` may find something there: statistics are measured for no other site. schemes: of the block's
        linear layers, by name."""
        return True

    @abstractmethod
    def fit(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: InputStatistics,
        schemes: Mapping[str, Scheme],
        heads: Heads,
    ) -> Transform | None:
        """The site's transform, or None where the method has none for it.

        weights: the block's, [out, in] each; statistics: of the readers' input; schemes: of the readers, by name.
        """

    def online_map(self, site: Site, width: int, heads: Heads) -> MapShape | None:
        """The map that it leaves at a site of this width (of a head at q · k), which runs; None: all is folded."""
        return None

    def running(self, site: Site, shape: MapShape, like: Tensor) -> Transform | None:
        """The map of `online_map` where nothing has to be measured for it: put there once all else is folded. None
        where `fit` gave it. like: in whose dtype, and on whose device."""
        return None
