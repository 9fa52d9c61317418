"""A fitted transform, and how it is folded into the weights around its site.

At the input x of the site's readers (y = x Wᵀ + b) stand an invertible A and a shift δ (DESIGN section 3):

    x' = (x − δ) A⁻¹        W' = W Aᵀ        b' = b + W δ        ⇒   x' W'ᵀ + b' = x Wᵀ + b

and the producer of x takes (x − δ) A⁻¹ into its own weights. Folding is a pure function on a block's weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitfold.models.family import FcPair, NormSite, QueryKey, Site, UpDown, ValueOutput

__all__ = ["Heads", "Transform", "fold"]

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Heads:
    """Head counts of an attention: query heads, KV heads, head_dim."""

    queries: int
    keys: int
    size: int

    @property
    def shared(self) -> int:
        """Query heads that share a KV head."""
        return self.queries // self.keys


@dataclass(frozen=True)
class Transform:
    """A diagonal `scale` [n] in front of a site's readers, x' = (x − shift) / scale, and an optional `shift` [n].

    n is the producer's width: the norm's at a norm, KV heads · head_dim at v → o, the MLP's inner width at up → down.
    """

    site: Site
    scale: Tensor
    shift: Tensor | None = None


def fold(
    weights: Weights, transform: Transform, heads: Heads, storage: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The block's weights after a transform; computes what they computed before.

    storage: the dtype in which unquantized tensors will be stored. A norm's new gain γ/s is rounded to it first, and
    the readers take γ/γ' instead of s, so that the rounding costs no equivalence.
    """
    site = transform.site
    if isinstance(site, NormSite):
        return _fold_norm(weights, site, transform, storage)
    if isinstance(site, ValueOutput):
        return _fold_value_output(weights, site, transform, heads)
    if isinstance(site, UpDown):
        return _fold_pair(weights, site.up, site.down, transform)
    if isinstance(site, FcPair):
        return _fold_pair(weights, site.fc1, site.fc2, transform)
    assert isinstance(site, QueryKey)
    raise NotImplementedError("no method of this version fits a transform at q · k")


def _fold_norm(
    weights: Weights, site: NormSite, transform: Transform, storage: torch.dtype | None
) -> dict[str, Tensor]:
    folded = dict(weights)
    gain = weights[f"{site.norm}.weight"]
    stored = (gain + site.offset) / transform.scale - site.offset
    if storage is not None:
        stored = stored.to(storage).to(gain.dtype)
    folded[f"{site.norm}.weight"] = stored
    # A channel whose gain is zero (before or after rounding) carries nothing: any scale serves.
    scale = (gain + site.offset) / (stored + site.offset)
    scale = torch.where(torch.isfinite(scale) & (scale != 0), scale, transform.scale)
    bias = weights.get(f"{site.norm}.bias")
    if bias is not None:
        shift = torch.zeros_like(bias) if transform.shift is None else transform.shift
        folded[f"{site.norm}.bias"] = (bias - shift) / scale
    elif transform.shift is not None:
        raise ValueError(f"{site.norm} has no bias that could carry a shift")
    return _fold_readers(folded, site, replace(transform, scale=scale))


def _fold_readers(
    weights: dict[str, Tensor], site: NormSite | UpDown | FcPair, transform: Transform
) -> dict[str, Tensor]:
    for reader in site.readers:
        weight = weights[f"{reader}.weight"]
        if transform.shift is not None:
            if f"{reader}.bias" not in weights:
                raise ValueError(f"{reader} has no bias that could carry a shift")
            weights[f"{reader}.bias"] = weights[f"{reader}.bias"] + weight @ transform.shift
        weights[f"{reader}.weight"] = weight * transform.scale
    return weights


def _fold_value_output(
    weights: Weights, site: ValueOutput, transform: Transform, heads: Heads
) -> dict[str, Tensor]:
    folded = dict(weights)
    folded[f"{site.value}.weight"] = weights[f"{site.value}.weight"] / transform.scale.unsqueeze(-1)
    if f"{site.value}.bias" in weights:
        folded[f"{site.value}.bias"] = weights[f"{site.value}.bias"] / transform.scale
    per_query = transform.scale.view(heads.keys, 1, heads.size).expand(-1, heads.shared, -1)
    folded[f"{site.output}.weight"] = weights[f"{site.output}.weight"] * per_query.reshape(-1)
    return folded


def _fold_pair(
    weights: Weights, first: str, second: str, transform: Transform
) -> dict[str, Tensor]:
    folded = dict(weights)
    folded[f"{first}.weight"] = weights[f"{first}.weight"] / transform.scale.unsqueeze(-1)
    if f"{first}.bias" in weights:
        folded[f"{first}.bias"] = weights[f"{first}.bias"] / transform.scale
    folded[f"{second}.weight"] = weights[f"{second}.weight"] * transform.scale
    return folded
