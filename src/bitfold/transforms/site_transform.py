"""What a method that fits a transform site by site is."""

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from bitfold.models.family import NormSite, Site
from bitfold.numerics import Scheme
from bitfold.part import Part
from bitfold.statistics import InputStatistics
from bitfold.transforms.groups import Heads, Transform

__all__ = ["SiteTransform"]


class SiteTransform(Part):
    """Fits a transform at one site from statistics of its readers' input."""

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

    def online_size(self, site: NormSite, width: int) -> int | None:
        """The blocks' size where it leaves a matrix behind a norm of this width, which runs; None: all is folded."""
        return None
