"""QuaRot's rotations (Ashkboos et al. 2024, arXiv 2404.00456): of the residual stream, of heads, and those that run.

In a random basis no channel is an outlier: every reader's input and every writer's rows are mixtures of all. Any
orthogonal matrix serves; a Hadamard matrix H with random signs has entries of one size.

    residual stream          x R                     folded, for the whole model
    v → o, per KV head       v H, o_proj reads back  folded
    o_proj's input           across heads            runs
    down_proj's, fc2's       x H                     runs
    q · k                    q H, k H, behind RoPE   runs
"""

import math
import zlib
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from bitfold.models.family import NormSite, Site, ValueOutput
from bitfold.numerics import MapShape, Scheme, hadamard_matrix, hadamard_size
from bitfold.statistics import InputStatistics
from bitfold.transforms.groups import HeadMatrix, Heads, Transform
from bitfold.transforms.online import OnlineHadamard
from bitfold.transforms.stream_transform import StreamTransform

__all__ = ["Rotation"]


class Rotation(StreamTransform):
    """Hadamard with random signs where there is such a matrix of the size, else uniformly random.

    heads: turn the values of every KV head too, folded. online: Hadamard matrices before o_proj, down_proj (fc2) and on
    queries and keys, which run; of the largest size that divides the width.
    steps: learn the stream's rotation and those of heads, which begin as they would be without (`spinquant.py`), in so
    many steps of `batch` windows; angle: by which the first turns, in radians. rounds_weights: while learning round
    weights too, as is done where nothing else is. held_back: share of the calibration windows by which the best state
    is chosen.
    """

    heads: bool = False
    online: bool = False
    steps: int = Field(default=0, ge=0)
    batch: int = Field(default=8, ge=1)
    angle: float = Field(default=0.3, gt=0, lt=math.pi)
    rounds_weights: bool = False
    held_back: float = Field(default=0.125, gt=0, lt=1)

    def matrix(self, size: int, *, keeps_ones: bool, seed: int) -> Tensor:
        """See `StreamTransform.matrix`."""
        generator = torch.Generator().manual_seed(seed)
        if not keeps_ones:
            return _orthogonal(size, generator)
        # The reflection that swaps the first axis and the direction of ones, around a rotation of all other axes.
        axis = torch.full((size,), -(size**-0.5), dtype=torch.float64)
        axis[0] += 1
        reflection = torch.eye(size, dtype=torch.float64)
        if float(axis.norm()) > 0:
            axis = axis / axis.norm()
            reflection -= 2 * torch.outer(axis, axis)
        inner = torch.eye(size, dtype=torch.float64)
        inner[1:, 1:] = _orthogonal(size - 1, generator)
        return reflection @ inner @ reflection

    def fit(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: InputStatistics,
        schemes: Mapping[str, Scheme],
        heads: Heads,
    ) -> Transform | None:
        """One rotation for all KV heads at v → o; nothing elsewhere, nor where it was learned."""
        if self.steps or not (self.heads and isinstance(site, ValueOutput)):
            return None
        blocks = self.head_matrices(site, heads).to(weights[f"{site.output}.weight"])
        return HeadMatrix(site, blocks, blocks.transpose(1, 2))

    def head_matrices(self, site: Site, heads: Heads) -> Tensor:
        """Of the values of every KV head, all the same [K, H, H], float64."""
        return _orthogonal(heads.size, _generator(site)).repeat(heads.keys, 1, 1)

    def online_map(self, site: Site, width: int, heads: Heads) -> MapShape | None:
        """See `SiteTransform.online_map`."""
        if not self.online or isinstance(site, NormSite):
            return None
        across = isinstance(site, ValueOutput) and self.heads
        if across and hadamard_size(heads.queries) == heads.queries:
            return MapShape("hadamard", (1, heads.queries, heads.size))
        size = hadamard_size(width)
        return MapShape("hadamard", (width // size, size, 1))

    def running(self, site: Site, shape: MapShape, like: Tensor) -> Transform | None:
        """See `SiteTransform.running`."""
        if not self.online or isinstance(site, NormSite):
            return None
        signs = torch.randint(0, 2, shape.shape, generator=_generator(site)) * 2 - 1
        return OnlineHadamard(site, signs.to(like))


def _generator(site: Site) -> torch.Generator:
    """Of signs that differ from site to site."""
    return torch.Generator().manual_seed(zlib.crc32(site.name.encode()))


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    if size and hadamard_size(size) == size:
        signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
        return signs[:, None] * hadamard_matrix(size) / size**0.5
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).contiguous()  # uniform over the group
