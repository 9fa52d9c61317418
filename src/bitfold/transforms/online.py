"""What stands at a site and runs, since nothing absorbs it: a Hadamard matrix, a Kronecker product, matrices of heads.

The first two may stand wherever a linear layer reads something (behind a norm, before o_proj, before down_proj or fc2):
the readers take the inverse. A Hadamard matrix may also stand on queries and keys behind the rotary embedding, where
q · k undoes it; and a matrix for every KV head only there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.models.family import ONLINE, QueryKey, Site
from bitfold.numerics import apply_map
from bitfold.transforms.groups import Heads, Transform
from bitfold.transforms.norms import Weights

__all__ = ["OnlineHadamard", "OnlineHeads", "OnlineKronecker"]


@dataclass(frozen=True)
class OnlineHadamard(Transform):
    """x' = (signs ∘ x) H / √size; signs of ±1 [copies, size, inner], see `numerics.maps`. At q · k on every head."""

    site: Site
    signs: Tensor

    @property
    def matrix(self) -> Tensor:
        return self.inverse.transpose(1, 2)

    @property
    def inverse(self) -> Tensor:
        return _dense(self._tensors, self.signs)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {"signs": self.signs}

    def fold(
        self, weights: Weights, heads: Heads, storage: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        folded = dict(weights) | _named(self.site, self._tensors)
        for reader in () if isinstance(self.site, QueryKey) else self.site.readers:
            # Orthogonal: A⁻¹ᵀ is A.
            folded[f"{reader}.weight"] = apply_map(weights[f"{reader}.weight"], self._tensors)
        return folded


@dataclass(frozen=True)
class OnlineKronecker(Transform):
    """x' = vec(leftᵀ X right): A⁻¹ = left ⊗ right, [a, a] and [b, b], of any input of linear layers.

    Multiplied with a product of the same sizes that runs there already. inverses: of left and right, where known.
    """

    site: Site
    left: Tensor
    right: Tensor
    inverses: tuple[Tensor, Tensor] | None = None

    def joins(self, weights: Weights) -> bool:
        return f"{self.site.runs_at}.{ONLINE}.left" in weights

    @property
    def matrix(self) -> Tensor:
        left, right = self._inverses
        return _dense({"left": left, "right": right}, left)

    @property
    def inverse(self) -> Tensor:
        return _dense({"left": self.left, "right": self.right}, self.left)

    @property
    def _inverses(self) -> tuple[Tensor, Tensor]:
        return self.inverses or (_inverse(self.left), _inverse(self.right))

    def fold(
        self, weights: Weights, heads: Heads, storage: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        like = weights[f"{self.site.readers[0]}.weight"]
        folded, read_back = dict(weights), {}
        for name, factor, inverse in zip(
            ("left", "right"), (self.left, self.right), self._inverses, strict=True
        ):
            stored = f"{self.site.runs_at}.{ONLINE}.{name}"
            before = weights[stored].to(factor) if stored in weights else None
            after = factor if before is None else before @ factor
            if storage is not None:
                # What runs is rounded first, and the readers take what is left.
                after = after.to(storage).to(after.dtype)
                inverse = _inverse(after) if before is None else _inverse(after) @ before
            folded[stored] = after.to(like.dtype)
            read_back[name] = inverse.T
        for reader in self.site.readers:
            weight = weights[f"{reader}.weight"]
            folded[f"{reader}.weight"] = apply_map(weight.to(self.left.dtype), read_back).to(weight)
        return folded


@dataclass(frozen=True)
class OnlineHeads(Transform):
    """k' = k M and q' = q M⁻ᵀ behind the rotary embedding and norms of heads, M [KV heads, H, H] invertible.

    Multiplied with what runs there already of its kind.
    """

    site: QueryKey
    keys: Tensor

    @property
    def matrix(self) -> Tensor:
        return self.keys

    @property
    def inverse(self) -> Tensor:
        return _inverse(self.keys)

    def fold(
        self, weights: Weights, heads: Heads, storage: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        stored = f"{self.site.runs_at}.{ONLINE}.keys"
        like = next(iter(weights.values()))
        before = weights.get(stored)
        after = self.keys if before is None else before.to(self.keys) @ self.keys
        if storage is not None:
            after = after.to(storage)  # q takes the inverse of what is stored
        return dict(weights) | {stored: after.to(like.dtype)}


def _inverse(matrix: Tensor) -> Tensor:
    return torch.linalg.inv(matrix.double()).to(matrix.dtype)


def _named(site: Site, tensors: Weights) -> dict[str, Tensor]:
    return {f"{site.runs_at}.{ONLINE}.{name}": value for name, value in tensors.items()}


def _dense(tensors: Weights, like: Tensor) -> Tensor:
    """The matrix of a map [1, n, n]."""
    width = like.numel() if "signs" in tensors else like.shape[0] * tensors["right"].shape[0]
    return apply_map(torch.eye(width, dtype=like.dtype, device=like.device), tensors).unsqueeze(0)
