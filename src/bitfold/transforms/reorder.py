"""RPTQ's reordering (Yuan et al. 2023, arXiv 2304.01089): channels of one cluster side by side, where that is free.

Inside an MLP the order of the channels is nobody's business: rows of up (and gate), or of fc1, and columns of down, or
fc2, are put in the order of the clusters. Elsewhere the order stays, and each channel says which cluster it is of:

* behind a norm the order is the residual stream's, the same for the whole model. The paper's norms write their output
  in another order, which is such an index as well.
* from v to o only the order within a head is free, and a cluster has channels of all heads.
"""

from collections.abc import Mapping

from torch import Tensor

from bitfold.models.family import FcPair, Site, UpDown
from bitfold.numerics import Scheme, channel_clusters
from bitfold.part import Need
from bitfold.statistics import InputStatistics
from bitfold.transforms.groups import Heads, Permutation, Transform
from bitfold.transforms.site_transform import SiteTransform

__all__ = ["Reorder"]


class Reorder(SiteTransform):
    """No options: the number of clusters is the scheme's (`activation.clusters`)."""

    needs = frozenset[Need]({"channels"})

    def fit(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: InputStatistics,
        schemes: Mapping[str, Scheme],
        heads: Heads,
    ) -> Transform | None:
        """The order of an MLP's channels by cluster, within one as they were; None at other sites, or without clusters.

        weights: the block's, [out, in] each; statistics: of the readers' input; schemes: of the readers, by name.
        """
        if not isinstance(site, UpDown | FcPair):
            return None
        activation = schemes[site.readers[0]].activation
        if activation is None or activation.clusters is None:
            return None
        clusters = channel_clusters(statistics.minimum, statistics.maximum, activation.clusters)
        return Permutation(site, clusters.argsort(stable=True))
