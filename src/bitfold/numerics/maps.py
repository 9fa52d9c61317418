"""Linear maps that are cheap enough to run: block-diagonal, Hadamard, Kronecker; as the tensors that are stored.

    blocks      weight [count, size, size]      x ↦ x Wᵀ                          n · size multiply-adds
    hadamard    signs [copies, size, inner]     x ↦ (signs ∘ x) H / √size         n · log₂ size additions *
    kronecker   left [a, a], right [b, b]       x ↦ vec(leftᵀ X right), X [a, b]  n · (a + b) multiply-adds
    heads       keys [heads, n, n]              k ↦ k M, q ↦ q M⁻ᵀ                n · n multiply-adds

All on the last axis of x, n values; `heads` on queries and keys, whose product undoes it (`turn_heads`).
H stands on `size`, with `inner` values that stay together between.
* Where size is a power of two: else m + log₂(size / m) for each value, m the size of Paley's matrix in H.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitfold.numerics.blocks import linear_blocks
from bitfold.numerics.hadamard import hadamard_additions, hadamard_transform

__all__ = ["MapKind", "MapShape", "aligned", "apply_map", "for_queries", "turn_heads"]

MapKind = Literal["blocks", "hadamard", "kronecker", "heads"]

_ALIGNMENT = 64


@dataclass(frozen=True)
class MapShape:
    """What a map is before its numbers are known. shape: blocks (count, size), hadamard (copies, size, inner),
    kronecker (a, b), heads (KV heads, head_dim)."""

    kind: MapKind
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """n."""
        return self.shape[1] if self.kind == "heads" else math.prod(self.shape)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what is stored, by name."""
        if self.kind == "blocks":
            count, size = self.shape
            return {"weight": (count, size, size)}
        if self.kind == "hadamard":
            return {"signs": self.shape}
        if self.kind == "heads":
            count, size = self.shape
            return {"keys": (count, size, size)}
        left, right = self.shape
        return {"left": (left, left), "right": (right, right)}

    @property
    def operations(self) -> int:
        """Multiply-adds for one row x; of a Hadamard matrix the additions of a fast transform."""
        if self.kind == "hadamard":
            return self.width * hadamard_additions(self.shape[1])
        return self.width * (sum(self.shape) if self.kind == "kronecker" else self.shape[1])

    @property
    def numbers(self) -> int:
        """How many are stored."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    def identity(self, like: Tensor) -> dict[str, Tensor]:
        """Tensors that do nothing, in the dtype of `like`; ValueError for a Hadamard matrix, which always does."""
        if self.kind == "hadamard":
            raise ValueError("a Hadamard matrix is no identity")
        return {
            name: torch.eye(shape[-1], dtype=like.dtype, device=like.device).expand(shape).clone()
            for name, shape in self.tensors.items()
        }


def apply_map(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Rows x [..., n] through the map of these tensors, in x's dtype and shape."""
    if "weight" in tensors:
        return linear_blocks(x, aligned(tensors["weight"]))
    if "signs" in tensors:
        signs = tensors["signs"]
        signed = x.unflatten(-1, signs.shape) * signs.to(x.dtype)
        return hadamard_transform(signed).flatten(-3)
    left, right = aligned(tensors["left"]), aligned(tensors["right"])
    pieces = x.unflatten(-1, (left.shape[0], right.shape[0]))
    return (left.T @ (pieces @ right)).flatten(-2)


def turn_heads(
    name: Literal["query", "key", "value"],
    x: Tensor,
    tensors: Mapping[str, Tensor],
    queries: Tensor | None = None,
) -> Tensor:
    """Queries or keys x [batch, heads, tokens, head_dim] through the map of these tensors.

    queries: what `for_queries` makes of a map of heads, where that is known.
    """
    if "keys" not in tensors:
        return apply_map(x, tensors)
    if name == "key":
        return x @ aligned(tensors["keys"]).to(x.dtype)
    turned = for_queries(tensors["keys"]) if queries is None else queries
    # Query heads that share a KV head are more rows of it.
    by_key = x.unflatten(1, (turned.shape[0], -1))
    rows = by_key.flatten(2, 3) @ turned.to(x.dtype)
    return rows.view(by_key.shape).flatten(1, 2)


def for_queries(keys: Tensor) -> Tensor:
    """M⁻ᵀ of a map of heads M [KV heads, n, n], in float32 at least."""
    precise = keys if keys.dtype == torch.float64 else keys.float()
    return torch.linalg.inv(precise).transpose(1, 2).contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """The same numbers as a loader should have them, row by row, at an address such as PyTorch allocates: on a CPU the
    last bits of a product depend on both. What is read from a file lies anywhere; what was solved for may be a view."""
    if tensor.data_ptr() % _ALIGNMENT:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()
