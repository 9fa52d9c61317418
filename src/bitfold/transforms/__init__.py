"""Transforms: rewritings that change nothing a network computes, fitted so that it rounds better.

Each method is a `SiteTransform` (statistics, site by site), a `BlockTransform` (gradients, a block's sites together) or
a `StreamTransform` (the basis of the whole model's residual stream); `fold` puts what it fitted into the weights. A new
one is a new file and a line here.
"""

from bitfold.transforms.affine import Affine
from bitfold.transforms.awq import Awq
from bitfold.transforms.block_transform import BlockTransform
from bitfold.transforms.groups import Heads, Transform, fold
from bitfold.transforms.keys import Keys
from bitfold.transforms.kronecker import Kronecker
from bitfold.transforms.reorder import Reorder
from bitfold.transforms.rotation import Rotation
from bitfold.transforms.site_transform import SiteTransform
from bitfold.transforms.smoothquant import SmoothQuant
from bitfold.transforms.stream_transform import StreamTransform
from bitfold.transforms.wush import Wush

__all__ = [
    "TRANSFORMS",
    "BlockTransform",
    "Heads",
    "SiteTransform",
    "StreamTransform",
    "Transform",
    "fold",
]

TRANSFORMS: dict[str, type[SiteTransform | BlockTransform | StreamTransform]] = {
    "rotation": Rotation,
    "smoothquant": SmoothQuant,
    "awq": Awq,
    "wush": Wush,
    "kronecker": Kronecker,
    "keys": Keys,
    "affine": Affine,
    "reorder": Reorder,
}
