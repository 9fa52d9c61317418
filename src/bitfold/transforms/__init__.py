"""Transforms: rewritings that change nothing a network computes, fitted so that it rounds better.

Each method is a `SiteTransform` (statistics, site by site) or a `BlockTransform` (gradients, a block's sites together);
`fold` puts what it fitted into the weights. A new one is a new file and a line here.
"""

from bitfold.transforms.affine import Affine
from bitfold.transforms.awq import Awq
from bitfold.transforms.block_transform import BlockTransform
from bitfold.transforms.groups import Heads, Transform, fold
from bitfold.transforms.site_transform import SiteTransform
from bitfold.transforms.smoothquant import SmoothQuant
from bitfold.transforms.wush import Wush

__all__ = ["TRANSFORMS", "BlockTransform", "Heads", "SiteTransform", "Transform", "fold"]

TRANSFORMS: dict[str, type[SiteTransform] | type[BlockTransform]] = {
    "smoothquant": SmoothQuant,
    "awq": Awq,
    "wush": Wush,
    "affine": Affine,
}
