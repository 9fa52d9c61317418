"""The groups of DESIGN section 3 as small objects: what may stand at a site, and how it is folded.

At the input x of a site's readers (y = x Wᵀ + b) stand an invertible A and a shift δ:

    x' = (x − δ) A⁻¹        W' = W Aᵀ        b' = b + W δ        ⇒   x' W'ᵀ + b' = x Wᵀ + b

and the producer of x takes (x − δ) A⁻¹ into its own weights. Each object has three duties: `matrix` and `inverse` give
A and A⁻¹; `fold` puts them into a block's weights, as a pure and differentiable function; `defect` says how far the
object is from a member of its group (0 for a member).

Shapes: n is the producer's width; K KV heads of H dimensions each, P = H/2 pairs of a rotary embedding.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.errors import EquivalenceError
from bitfold.models.family import ONLINE, FcPair, NormSite, QueryKey, Site, UpDown, ValueOutput
from bitfold.transforms.linears import (
    complex_blocks,
    fold_pair,
    fold_value_output,
    on_rows,
    permuted,
    times_complex,
)
from bitfold.transforms.norms import Weights, fold_norm, fold_online

__all__ = [
    "Diagonal",
    "HeadMatrix",
    "HeadPermutation",
    "Heads",
    "NormedPairScale",
    "OnlineMatrix",
    "Permutation",
    "RotaryScale",
    "Transform",
    "Weights",
    "fold",
]


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


class Transform(ABC):
    """A fitted member of the group of a site."""

    site: Site

    @property
    @abstractmethod
    def matrix(self) -> Tensor:
        """A, as a batch of square blocks on its diagonal [blocks, m, m]."""

    @property
    @abstractmethod
    def inverse(self) -> Tensor:
        """A⁻¹ in the same form."""

    @abstractmethod
    def fold(
        self, weights: Weights, heads: Heads, storage: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The block's weights after the transform; they compute what they computed before.

        storage: the dtype in which unquantized tensors will be stored, so that rounding them costs no equivalence.
        """

    def joins(self, weights: Weights) -> bool:
        """Whether it can be multiplied with what runs at the site already."""
        return False

    def defect(self) -> float:
        """‖A A⁻¹ − I‖ (largest entry): how far from an equivalence."""
        product = self.matrix @ self.inverse
        unit = torch.eye(product.shape[-1], dtype=product.dtype)
        return float((product.detach() - unit).abs().max())


def fold(
    weights: Weights, transform: Transform, heads: Heads, storage: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The block's weights after a transform (see `Transform.fold`).

    Raises EquivalenceError where a map runs at the site that cannot be multiplied by it.
    """
    site = transform.site
    runs = any(name.startswith(f"{site.runs_at}.{ONLINE}.") for name in weights)
    # What runs on queries and keys is undone by their product, whatever becomes of them before.
    if runs and not isinstance(site, QueryKey) and not transform.joins(weights):
        raise EquivalenceError(
            f"At {site.name} a map runs already, and nothing folds before it: let it be the last there."
        )
    return transform.fold(weights, heads, storage)


@dataclass(frozen=True)
class Diagonal(Transform):
    """norm → readers, v → o, up → down, fc1 → ReLU → fc2: x' = (x − shift) / scale, both [n].

    A shift needs biases that carry it: the producer's, and each reader's.
    """

    site: Site
    scale: Tensor
    shift: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        return self.scale.view(-1, 1, 1)

    @property
    def inverse(self) -> Tensor:
        return self.scale.reciprocal().view(-1, 1, 1)

    def joins(self, weights: Weights) -> bool:
        return isinstance(self.site, NormSite) and self.site.online in weights

    def defect(self) -> float:
        """Zeros nowhere, and nothing negative through ReLU."""
        bad = self.scale == 0 if not isinstance(self.site, FcPair) else self.scale <= 0
        return float((bad | ~torch.isfinite(self.scale)).any())

    def fold(
        self, weights: Weights, heads: Heads, storage: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        site = self.site
        if isinstance(site, NormSite):
            if site.online in weights:  # what runs behind the norm is what the readers see
                online = OnlineMatrix(site, self.matrix, self.inverse, self.shift)
                return online.fold(weights, heads, storage)
            return fold_norm(weights, site, self.scale, self.shift, storage)
        if isinstance(site, ValueOutput):
            blocks = torch.diag_embed(self.scale.view(heads.keys, heads.size))
            inverse = torch.diag_embed(self.scale.reciprocal().view(heads.keys, heads.size))
            return fold_value_output(weights, site, blocks, inverse, self.shift, heads.shared)
        if isinstance(site, UpDown):
            return fold_pair(weights, site.up, site.down, self.scale)
        if isinstance(site, FcPair) and site.homogeneous:
            return fold_pair(weights, site.fc1, site.fc2, self.scale)
        raise EquivalenceError(
            f"A diagonal does not pass {type(site).__name__}: choose another group."
        )


@dataclass(frozen=True)
class OnlineMatrix(Transform):
    """norm → readers, *not* folded: any invertible A, block-diagonal [k, n/k, n/k] (k = 1: full); shift [n].

    No gain absorbs A⁻¹: it stays behind the norm, as the module's `online`, and runs. A shift needs the biases that
    carry it, as for `Diagonal`.
    """

    site: NormSite
    blocks: Tensor
    blocks_inverse: Tensor
    shift: Tensor | None = None

    def joins(self, weights: Weights) -> bool:
        return self.site.online in weights

    @property
    def matrix(self) -> Tensor:
        return self.blocks

    @property
    def inverse(self) -> Tensor:
        return self.blocks_inverse

    def fold(
        self, weights: Weights, heads: Heads, storage: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        return fold_online(
            weights, self.site, self.blocks, self.blocks_inverse, self.shift, storage
        )


@dataclass(frozen=True)
class HeadMatrix(Transform):
    """v → o, or q · k without a rotary embedding: A [K, H, H] per KV head, shift [K · H].

    v → o:  v' = (v − δ) A⁻¹, and o_proj reads it back for every query head that shares the KV head.
    q · k:  k' = (k − δ) A and q' = q A⁻ᵀ; the softmax ignores what the shift adds, a constant per query.
    """

    site: ValueOutput | QueryKey
    blocks: Tensor
    blocks_inverse: Tensor
    shift: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        return self.blocks

    @property
    def inverse(self) -> Tensor:
        return self.blocks_inverse

    def fold(
        self, weights: Weights, heads: Heads, storage: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        site = self.site
        if isinstance(site, ValueOutput):
            return fold_value_output(
                weights, site, self.blocks, self.blocks_inverse, self.shift, heads.shared
            )
        if site.rotary != "none" or site.key_norm is not None:
            raise EquivalenceError(
                "A matrix per head does not pass the rotary embedding or a norm on q and k: "
                "only what commutes with them does."
            )
        folded = dict(weights)
        transposed = self.blocks.transpose(1, 2)
        on_rows(folded, site.key, transposed, self.shift)
        per_query = self.blocks_inverse.repeat_interleave(heads.shared, dim=0)
        on_rows(folded, site.query, per_query, None)
        return folded


@dataclass(frozen=True)
class RotaryScale(Transform):
    """q · k behind a rotary embedding: one complex number c ≠ 0 per pair and KV head, k' = c k, q' = q / conj(c).

    real, imaginary: [K, P]; in half-split pairing dimension j is the real part, j + P the imaginary one.
    """

    site: QueryKey
    real: Tensor
    imaginary: Tensor

    @property
    def matrix(self) -> Tensor:
        return complex_blocks(self.real, self.imaginary)

    @property
    def inverse(self) -> Tensor:
        power = self.real.square() + self.imaginary.square()
        return complex_blocks(self.real / power, -self.imaginary / power)

    def fold(
        self, weights: Weights, heads: Heads, storage: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        if self.site.rotary != "half-split" or self.site.key_norm is not None:
            raise EquivalenceError(
                "A complex number per pair stands at a rotary q · k without norms."
            )
        folded = dict(weights)
        times_complex(folded, self.site.key, self.real, self.imaginary)
        power = self.real.square() + self.imaginary.square()  # 1 / conj(c) = c / |c|²
        shared = heads.shared
        times_complex(
            folded,
            self.site.query,
            (self.real / power).repeat_interleave(shared, dim=0),
            (self.imaginary / power).repeat_interleave(shared, dim=0),
        )
        return folded


@dataclass(frozen=True)
class NormedPairScale(Transform):
    """q · k with per-head norms before the rotary embedding: one real factor r ≠ 0 per pair, shared by all heads.

    factor: [P], γ_k · r and γ_q / r. signs: [K, P] of ±1, on the rows of k and of the query heads that share it.
    """

    site: QueryKey
    factor: Tensor
    signs: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        return self.factor.view(-1, 1, 1)

    @property
    def inverse(self) -> Tensor:
        return self.factor.reciprocal().view(-1, 1, 1)

    def fold(
        self, weights: Weights, heads: Heads, storage: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        site = self.site
        if site.key_norm is None or site.query_norm is None:
            raise EquivalenceError("A real factor per pair stands at q · k with norms on q and k.")
        folded = dict(weights)
        twice = torch.cat([self.factor, self.factor])
        key, query, offset = (
            f"{site.key_norm}.weight",
            f"{site.query_norm}.weight",
            site.norm_offset,
        )
        folded[key] = (weights[key] + offset) * twice - offset
        folded[query] = (weights[query] + offset) / twice - offset
        if self.signs is not None:
            nothing = torch.zeros_like(self.signs)
            times_complex(folded, site.key, self.signs, nothing)
            shared = self.signs.repeat_interleave(heads.shared, dim=0)
            times_complex(folded, site.query, shared, torch.zeros_like(shared))
        return folded


@dataclass(frozen=True)
class Permutation(Transform):
    """The inner width of an MLP in another order: entry i is what was entry order[i]; order [n]."""

    site: UpDown | FcPair
    order: Tensor

    @property
    def matrix(self) -> Tensor:
        return torch.eye(self.order.numel(), dtype=torch.float64)[self.order].unsqueeze(0)

    @property
    def inverse(self) -> Tensor:
        return self.matrix.transpose(1, 2)

    def fold(
        self, weights: Weights, heads: Heads, storage: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        site = self.site
        rows = (site.up, site.gate) if isinstance(site, UpDown) else (site.fc1,)
        columns = site.down if isinstance(site, UpDown) else site.fc2
        return permuted(weights, rows, columns, self.order)


@dataclass(frozen=True)
class HeadPermutation(Transform):
    """KV heads, with the query heads that share them, in another order: head i is what was order[i]; order [K]."""

    site: ValueOutput
    queries: QueryKey
    order: Tensor

    @property
    def matrix(self) -> Tensor:
        return torch.eye(self.order.numel(), dtype=torch.float64)[self.order].unsqueeze(0)

    @property
    def inverse(self) -> Tensor:
        return self.matrix.transpose(1, 2)

    def fold(
        self, weights: Weights, heads: Heads, storage: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        inside = torch.arange(heads.size)
        keys = (self.order[:, None] * heads.size + inside).flatten()
        wide = torch.arange(heads.shared * heads.size)
        queries = (self.order[:, None] * heads.shared * heads.size + wide).flatten()
        folded = permuted(weights, (self.site.value, self.queries.key), None, keys)
        return permuted(folded, (self.queries.query,), self.site.output, queries)
