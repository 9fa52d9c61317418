"""Transforms: rewritings that change nothing a network computes, fitted so that it rounds better.

Each method is a `SiteTransform`; `fold` puts what it fitted into the weights. A new one is a new file and a line here.
"""

from bitfold.transforms.awq import Awq
from bitfold.transforms.site_transform import SiteTransform
from bitfold.transforms.smoothquant import SmoothQuant
from bitfold.transforms.transform import Heads, Transform, fold

__all__ = ["TRANSFORMS", "Heads", "SiteTransform", "Transform", "fold"]

TRANSFORMS: dict[str, type[SiteTransform]] = {
    "smoothquant": SmoothQuant,
    "awq": Awq,
}
