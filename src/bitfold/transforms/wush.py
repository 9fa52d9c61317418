"""WUSH (arXiv 2512.00956): the closed form from second moments, per head, folded at v → o and q · k.

At q · k queries play the weights' part: k' = (k − mean) A and q' = q A⁻ᵀ. Behind a rotary embedding only a size per
pair commutes; it is chosen so that both sides have the same power.

With the Cholesky factors W'W'ᵀ = E over outputs of the readers' second moment and X'X'ᵀ = E[xᵀx] of their inputs, and
the singular values W'ᵀX' = U S Vᵀ:

    T = H S^(−½) Uᵀ W'ᵀ,    x' = x Tᵀ,    W ← W T⁻¹      (A = T⁻ᵀ)

After it both second moments are H S Hᵀ: the load is shared evenly by both sides and, through the Hadamard matrix H, by
all dimensions.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from bitfold.models.family import NormSite, QueryKey, Site, ValueOutput
from bitfold.numerics import MapShape, Scheme, hadamard_matrix, hadamard_size
from bitfold.part import Need
from bitfold.statistics import InputStatistics
from bitfold.transforms.diagonal import reader_weights
from bitfold.transforms.groups import HeadMatrix, Heads, OnlineMatrix, RotaryScale, Transform
from bitfold.transforms.site_transform import SiteTransform

__all__ = ["Wush", "closed_form"]


class Wush(SiteTransform):
    """damping: share of the mean moment that is added to each moment's diagonal, so that both are invertible.
    rotate: end with the Hadamard matrix (sizes that have one), or keep the singular basis (`none`).
    norms: `none`: nothing behind norms; or `online`, the closed form of the whole width there, which then runs."""

    needs = frozenset[Need]({"gram", "rows"})

    damping: float = 1e-4
    rotate: Literal["hadamard", "none"] = "hadamard"
    norms: Literal["none", "online"] = "none"

    def online_map(self, site: Site, width: int, heads: Heads) -> MapShape | None:
        """See `SiteTransform.online_map`."""
        behind_norm = self.norms == "online" and isinstance(site, NormSite)
        return MapShape("blocks", (1, width)) if behind_norm else None

    def wants(self, site: Site, schemes: Mapping[str, Scheme]) -> bool:
        """See `SiteTransform.wants`."""
        if isinstance(site, NormSite):
            return self.norms == "online"
        return isinstance(site, ValueOutput | QueryKey)

    def fit(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: InputStatistics,
        schemes: Mapping[str, Scheme],
        heads: Heads,
    ) -> Transform | None:
        """The matrix per KV head at v → o and q · k (sizes per pair behind a rotary embedding); None elsewhere.

        statistics: at q · k of the input that q and k share.
        """
        if isinstance(site, QueryKey):
            return self._query_key(site, weights, statistics.rows, heads)
        if isinstance(site, NormSite):
            return self._norm(site, weights, statistics.gram) if self.norms == "online" else None
        if not isinstance(site, ValueOutput):
            return None
        output = weights[f"{site.output}.weight"].double()
        columns = output.view(output.shape[0], heads.keys, heads.shared, heads.size)
        moment_w = torch.einsum("okqh,okqg->khg", columns, columns) / output.shape[0]
        moment_x = _diagonal_blocks(statistics.gram.double(), heads)
        blocks, inverse = closed_form(moment_w, moment_x, self.damping, self.rotate == "hadamard")
        dtype = weights[f"{site.output}.weight"].dtype
        return HeadMatrix(site, blocks.to(dtype), inverse.to(dtype))

    def _norm(self, site: NormSite, weights: Mapping[str, Tensor], gram: Tensor) -> OnlineMatrix:
        readers = reader_weights(weights, site).double()
        moment_w, moment_x = readers.T @ readers / len(readers), gram.double()
        blocks, inverse = closed_form(
            moment_w[None], moment_x[None], self.damping, self.rotate == "hadamard"
        )
        dtype = weights[f"{site.norm}.weight"].dtype
        return OnlineMatrix(site, blocks.to(dtype), inverse.to(dtype))

    def _query_key(
        self, site: QueryKey, weights: Mapping[str, Tensor], rows: Tensor, heads: Heads
    ) -> Transform | None:
        if site.key_norm is not None:
            return None
        key, query = _projected(site.key, weights, rows), _projected(site.query, weights, rows)
        dtype = weights[f"{site.key}.weight"].dtype
        key_nkh = key.view(-1, heads.keys, heads.size)
        query_nkqh = query.view(-1, heads.keys, heads.shared, heads.size)
        if site.rotary == "half-split":
            pairs = heads.size // 2
            key_power = key_nkh.square().view(-1, heads.keys, 2, pairs).mean(dim=(0, 2))
            query_power = query_nkqh.square().mean(dim=2).view(-1, heads.keys, 2, pairs)
            ratio = query_power.mean(dim=(0, 2)) / key_power.clamp(min=1e-30)
            size = ratio.clamp(1e-6, 1e6).pow(0.25).to(dtype)
            return RotaryScale(site, size, torch.zeros_like(size))
        has_bias = f"{site.key}.bias" in weights
        shift = key_nkh.mean(dim=0) if has_bias else torch.zeros_like(key_nkh[0])
        key_nkh = key_nkh - shift
        moment_k = torch.einsum("nkh,nkg->khg", key_nkh, key_nkh) / key_nkh.shape[0]
        moment_q = torch.einsum("nkqh,nkqg->khg", query_nkqh, query_nkqh) / key_nkh.shape[0]
        # v' = v A⁻¹ there, k' = k A here: the two matrices change places.
        inverse, blocks = closed_form(moment_q, moment_k, self.damping, self.rotate == "hadamard")
        carried = shift.reshape(-1).to(dtype) if has_bias else None
        return HeadMatrix(site, blocks.to(dtype), inverse.to(dtype), carried)


def _projected(name: str, weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """What a linear layer makes of input rows, float64 [n, out]."""
    projected = rows.double() @ weights[f"{name}.weight"].double().T
    bias = weights.get(f"{name}.bias")
    return projected if bias is None else projected + bias


def closed_form(
    moment_w: Tensor, moment_x: Tensor, damping: float, rotate: bool
) -> tuple[Tensor, Tensor]:
    """A and A⁻¹ [K, H, H] from the second moments of the readers' weights and of their input, [K, H, H] each."""
    size = moment_w.shape[-1]
    lower_w, lower_x = (_cholesky(moment, damping) for moment in (moment_w, moment_x))
    u, s, _ = torch.linalg.svd(lower_w.transpose(1, 2) @ lower_x)
    basis = torch.eye(size, dtype=u.dtype, device=u.device)
    if rotate and hadamard_size(size) == size:
        basis = hadamard_matrix(size).to(u) / size**0.5
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
