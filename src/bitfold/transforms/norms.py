"""What a norm takes: a diagonal and a shift into its gain and bias, or any matrix behind it, which then runs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bitfold.errors import EquivalenceError
from bitfold.models.family import NormSite
from bitfold.numerics import blocks_product, linear_blocks

__all__ = ["Weights", "bias_of", "fold_norm", "fold_online"]

Weights = Mapping[str, Tensor]


def fold_norm(
    weights: Weights,
    site: NormSite,
    scale: Tensor,
    shift: Tensor | None,
    storage: torch.dtype | None,
) -> dict[str, Tensor]:
    """x' = (x − shift) / scale, both [n], folded: γ' = γ/s, β' = (β − δ)/s, and the readers."""
    folded = dict(weights)
    gain = weights[f"{site.norm}.weight"]
    stored = (gain + site.offset) / scale - site.offset
    if storage is not None:
        # The gain is rounded first, and the readers take what is left: γ/γ' instead of s.
        stored = _stored_gain(stored, site.offset, storage)
        exact = (gain + site.offset) / (stored + site.offset)
        # A channel whose gain is zero (before or after rounding) carries nothing: any scale serves.
        scale = torch.where(torch.isfinite(exact) & (exact != 0), exact, scale)
    folded[f"{site.norm}.weight"] = stored
    bias = weights.get(f"{site.norm}.bias")
    if bias is not None:
        folded[f"{site.norm}.bias"] = (bias if shift is None else bias - shift) / scale
    elif shift is not None:
        raise _no_bias(site.norm)
    for reader in site.readers:
        weight = weights[f"{reader}.weight"]
        if shift is not None:
            folded[f"{reader}.bias"] = bias_of(weights, reader) + weight @ shift
        folded[f"{reader}.weight"] = weight * scale
    return folded


def fold_online(
    weights: Weights,
    site: NormSite,
    blocks: Tensor,
    inverse: Tensor,
    shift: Tensor | None,
    storage: torch.dtype | None,
) -> dict[str, Tensor]:
    """x' = (x − shift) A⁻¹ for a block-diagonal A: A⁻¹ joins what runs behind the norm, A goes into the readers.

    What runs is stored as a linear layer's weight, transposed. The products are formed in the precision of the blocks.
    """
    folded = dict(weights)
    before = weights[site.online].transpose(1, 2) if site.online in weights else None
    if shift is not None:
        folded[f"{site.norm}.bias"] = bias_of(weights, site.norm) - _behind(shift, before)
    after = inverse if before is None else blocks_product(before.to(inverse.dtype), inverse)
    if storage is not None:
        # What runs is rounded first, and the readers take what is left: A becomes the inverse of the stored one.
        after = after.to(storage).to(after.dtype)
        exact = torch.linalg.inv_ex(after.double()).inverse
        if before is not None:
            exact = blocks_product(exact, before.double())
        blocks = exact.to(blocks.dtype)
    after = after.to(weights[f"{site.norm}.weight"].dtype)
    folded[site.online] = after.transpose(1, 2).contiguous()
    for reader in site.readers:
        weight = weights[f"{reader}.weight"]
        if shift is not None:
            folded[f"{reader}.bias"] = bias_of(weights, reader) + weight @ shift
        read_back = linear_blocks(weight.to(blocks.dtype), blocks)
        folded[f"{reader}.weight"] = read_back.to(weight.dtype)
    return folded


def bias_of(weights: Weights, name: str) -> Tensor:
    """A module's bias; EquivalenceError where it has none."""
    if f"{name}.bias" not in weights:
        raise _no_bias(name)
    return weights[f"{name}.bias"]


def _no_bias(name: str) -> EquivalenceError:
    return EquivalenceError(f"{name} has no bias that could carry a shift.")


def _behind(shift: Tensor, online: Tensor | None) -> Tensor:
    """The shift of a norm's bias [n] that is `shift` [n] behind the matrix that runs there."""
    if online is None:
        return shift
    count, size, _ = online.shape
    behind = shift.view(count, 1, size).double()
    return torch.linalg.solve(online.double(), behind, left=False).flatten().to(shift.dtype)


def _stored_gain(stored: Tensor, offset: float, storage: torch.dtype) -> Tensor:
    """A norm's gain rounded to what can be stored, but not to one that would lose its channel (Gemma's −1)."""
    rounded = stored.to(storage).to(stored.dtype)
    lost = (rounded + offset == 0) & (stored + offset != 0)
    nearest = -offset * (1 - torch.finfo(storage).eps / 2) if offset else torch.finfo(storage).tiny
    return torch.where(lost, torch.full_like(rounded, nearest), rounded)
