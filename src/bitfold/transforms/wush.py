"""WUSH (arXiv 2512.00956): the closed form from second moments, per head, folded at v → o and q · k.

With the Cholesky factors W'W'ᵀ = E over outputs of the readers' second moment and X'X'ᵀ = E[xᵀx] of their inputs, and
the singular values W'ᵀX' = U S Vᵀ:

    T = H S^(−½) Uᵀ W'ᵀ,    x' = x Tᵀ,    W ← W T⁻¹      (A = T⁻ᵀ)

After it both second moments are H S Hᵀ: the load is shared evenly by both sides and, through the Hadamard matrix H, by
all dimensions.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from scipy.linalg import hadamard
from torch import Tensor

from bitfold.models.family import Site, ValueOutput
from bitfold.numerics import Scheme
from bitfold.part import Need
from bitfold.statistics import InputStatistics
from bitfold.transforms.groups import HeadMatrix, Heads, Transform
from bitfold.transforms.site_transform import SiteTransform

__all__ = ["Wush", "closed_form"]


class Wush(SiteTransform):
    """damping: share of the mean moment that is added to each moment's diagonal, so that both are invertible.
    rotate: end with the Hadamard matrix (head sizes that are a power of two), or keep the singular basis (`none`)."""

    needs = frozenset[Need]({"gram"})

    damping: float = 1e-4
    rotate: Literal["hadamard", "none"] = "hadamard"

    def fit(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: InputStatistics,
        schemes: Mapping[str, Scheme],
        heads: Heads,
    ) -> Transform | None:
        """The matrix per KV head at v → o; None at other sites."""
        if not isinstance(site, ValueOutput):
            return None
        output = weights[f"{site.output}.weight"].double()
        columns = output.view(output.shape[0], heads.keys, heads.shared, heads.size)
        moment_w = torch.einsum("okqh,okqg->khg", columns, columns) / output.shape[0]
        moment_x = _diagonal_blocks(statistics.gram.double(), heads)
        blocks, inverse = closed_form(moment_w, moment_x, self.damping, self.rotate == "hadamard")
        dtype = weights[f"{site.output}.weight"].dtype
        return HeadMatrix(site, blocks.to(dtype), inverse.to(dtype))


def closed_form(
    moment_w: Tensor, moment_x: Tensor, damping: float, rotate: bool
) -> tuple[Tensor, Tensor]:
    """A and A⁻¹ [K, H, H] from the second moments of the readers' weights and of their input, [K, H, H] each."""
    size = moment_w.shape[-1]
    lower_w, lower_x = (_cholesky(moment, damping) for moment in (moment_w, moment_x))
    u, s, _ = torch.linalg.svd(lower_w.transpose(1, 2) @ lower_x)
    basis = torch.eye(size, dtype=u.dtype, device=u.device)
    if rotate and size & (size - 1) == 0:
        basis = torch.from_numpy(hadamard(size)).to(u) / size**0.5
    t = basis @ (s.rsqrt().unsqueeze(-1) * (u.transpose(1, 2) @ lower_w.transpose(1, 2)))
    # x' = x Tᵀ is x A⁻¹.
    inverse = t.transpose(1, 2)
    return torch.linalg.inv(inverse), inverse


def _cholesky(moment: Tensor, damping: float) -> Tensor:
    mean = moment.diagonal(dim1=1, dim2=2).mean(dim=-1).clamp(min=1e-12)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return torch.linalg.cholesky(moment + damping * mean.view(-1, 1, 1) * eye)


def _diagonal_blocks(gram: Tensor, heads: Heads) -> Tensor:
    """The second moment per KV head [K, H, H] of an input [queries · H], over the query heads that share it."""
    blocks = gram.view(heads.keys, heads.shared, heads.size, heads.keys, heads.shared, heads.size)
    index = torch.arange(heads.keys)
    shared = torch.arange(heads.shared)
    return blocks[index[:, None], shared, :, index[:, None], shared, :].mean(dim=1)
