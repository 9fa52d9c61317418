"""What is learned at a site: parameters, and the transform they stand for at a given gradual mask.

A diagonal is exp(θ), so that it stays positive; a matrix per head is A∘GM, as in the paper; a rotary scale is
exp(ρ + iφ). All start at the identity: a start by statistics is a transform of its own that is folded before.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitfold.models.family import FcPair, NormSite, QueryKey, Site, UpDown, ValueOutput
from bitfold.transforms.dominance import gradual_mask, margin, project
from bitfold.transforms.groups import (
    Diagonal,
    HeadMatrix,
    Heads,
    NormedPairScale,
    OnlineMatrix,
    RotaryScale,
    Transform,
    Weights,
)
from bitfold.transforms.kronecker import factors_of
from bitfold.transforms.online import OnlineHeads, OnlineKronecker

__all__ = ["Learned", "MaskSettings", "learned_at"]


@dataclass(frozen=True)
class MaskSettings:
    """How A∘GM is formed and kept invertible; see `transforms.affine.Affine` for the fields' meaning."""

    epochs: int
    alpha: float
    gradual: bool
    dominance: Literal["project", "off"]
    least_margin: float
    precision: Literal["float32", "float64", "mixed"]

    def mask(self, size: int, epoch: int) -> Tensor:
        """GM_e; full from the start without `gradual`."""
        if not self.gradual:
            return gradual_mask(size, 0, 1, self.alpha)
        return gradual_mask(size, min(epoch, self.epochs - 1), self.epochs, self.alpha)


class Learned(ABC):
    """Parameters at one site. `scales`, `shifts`: tensors that require gradients, by kind of learning rate."""

    scales: list[Tensor]
    shifts: list[Tensor]

    @abstractmethod
    def transform(self) -> Transform:
        """What the parameters stand for now; differentiable."""

    def start_epoch(self, epoch: int) -> None:  # noqa: B027 - most kinds have nothing to do
        """Called before an epoch."""

    def after_step(self) -> None:  # noqa: B027
        """Called after an optimiser's step."""

    def report(self) -> dict[str, float]:
        """Figures about the transform found."""
        with torch.no_grad():
            matrix = self.transform().matrix.double()
        return {"condition": float(torch.linalg.cond(matrix).max())}


class _Scale(Learned):
    def __init__(self, site: Site, size: int, shift: bool, like: Tensor) -> None:
        self._site = site
        self.scales = [like.new_zeros(size).requires_grad_()]
        self.shifts = [like.new_zeros(size).requires_grad_()] if shift else []

    def transform(self) -> Transform:
        return Diagonal(self._site, self.scales[0].exp(), self.shifts[0] if self.shifts else None)

    def report(self) -> dict[str, float]:
        scale = self.scales[0].detach().exp()
        return {"condition": float(scale.max() / scale.min())}


class _Rotary(Learned):
    def __init__(self, site: QueryKey, heads: Heads, like: Tensor) -> None:
        self._site = site
        shape = (heads.keys, heads.size // 2)
        self.scales = [like.new_zeros(shape).requires_grad_() for _ in range(2)]
        self.shifts = []

    def transform(self) -> Transform:
        size, angle = self.scales[0].exp(), self.scales[1]
        return RotaryScale(self._site, size * angle.cos(), size * angle.sin())

    def report(self) -> dict[str, float]:
        size = (
            self.scales[0].detach().exp()
        )  # of a head's matrix: its pairs' sizes are the singular values
        return {"condition": float((size.amax(dim=-1) / size.amin(dim=-1)).max())}


class _NormedPair(Learned):
    def __init__(self, site: QueryKey, heads: Heads, like: Tensor) -> None:
        self._site = site
        self.scales = [like.new_zeros(heads.size // 2).requires_grad_()]
        self.shifts = []

    def transform(self) -> Transform:
        return NormedPairScale(self._site, self.scales[0].exp())

    def report(self) -> dict[str, float]:
        factor = self.scales[0].detach().exp()
        return {"condition": float(factor.max() / factor.min())}


class _Matrix(Learned):
    """A∘GM per KV head [K, H, H], or behind a norm, where it runs, as one head [1, n, n]."""

    def __init__(
        self,
        site: NormSite | ValueOutput | QueryKey,
        heads: Heads,
        shift: bool,
        settings: MaskSettings,
        like: Tensor,
    ) -> None:
        self._site, self._settings = site, settings
        dtype = torch.float64 if settings.precision == "float64" else like.dtype
        blocks = torch.eye(heads.size, dtype=dtype, device=like.device).repeat(heads.keys, 1, 1)
        self.scales = [blocks.requires_grad_()]
        width = heads.keys * heads.size
        self.shifts = [like.new_zeros(width).requires_grad_()] if shift else []
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        blocks = self.scales[0]
        self._mask = self._settings.mask(blocks.shape[-1], epoch).to(blocks)

    def after_step(self) -> None:
        if self._settings.dominance == "project":
            with torch.no_grad():
                project(self.scales[0], self._mask, self._settings.least_margin)

    def transform(self) -> Transform:
        blocks = self.scales[0] * self._mask
        precise = blocks.double() if self._settings.precision == "mixed" else blocks
        inverse = torch.linalg.inv(precise).to(blocks.dtype)
        shift = self.shifts[0] if self.shifts else None
        if isinstance(self._site, NormSite):
            return OnlineMatrix(self._site, blocks, inverse, shift)
        return HeadMatrix(self._site, blocks, inverse, shift)

    def report(self) -> dict[str, float]:
        blocks = (self.scales[0].detach() * self._mask).double()
        return {
            "condition": float(torch.linalg.cond(blocks).max()),
            "margin": float(margin(blocks).min()),
        }


class _Keys(Learned):
    """A matrix for every KV head on keys, which runs; parametrised as a factor of `_Kronecker` is."""

    def __init__(self, site: QueryKey, heads: Heads, like: Tensor) -> None:
        self._site = site
        shapes = ((heads.keys, heads.size, heads.size), (heads.keys, heads.size))
        self.scales = [like.new_zeros(shapes[i]).requires_grad_() for i in (0, 1, 0)]
        self.shifts = []

    def transform(self) -> OnlineHeads:
        return OnlineHeads(self._site, _by_singular_values(*self.scales)[0])

    def report(self) -> dict[str, float]:
        logs = self.scales[1].detach()
        return {"condition": float((logs.amax(dim=-1) - logs.amin(dim=-1)).max().exp())}


class _Kronecker(Learned):
    """A Kronecker product that runs, as FlatQuant has it: each factor Q₁ diag(eᵗ) Q₂ᵀ with Cayley's orthogonal
    Q = (I − S)(I + S)⁻¹, S = P − Pᵀ, whose inverse takes no inverting."""

    def __init__(self, site: Site, sizes: tuple[int, int], like: Tensor) -> None:
        self._site = site
        self.scales = [
            like.new_zeros(shape).requires_grad_()
            for size in sizes
            for shape in ((size, size), (size,), (size, size))
        ]
        self.shifts = []

    def transform(self) -> OnlineKronecker:
        (left, left_inverse), (right, right_inverse) = (
            _by_singular_values(*self.scales[start : start + 3]) for start in (0, 3)
        )
        return OnlineKronecker(self._site, left, right, (left_inverse, right_inverse))

    def report(self) -> dict[str, float]:
        with torch.no_grad():
            spreads = [t.max() - t.min() for t in (self.scales[1], self.scales[4])]
            return {"condition": float(torch.stack(spreads).sum().exp())}


def _by_singular_values(first: Tensor, logs: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix and its inverse, or as many as there are."""
    before, after, sizes = _cayley(first), _cayley(second), logs.exp().unsqueeze(-2)
    return (before * sizes) @ after.mT, (after / sizes) @ before.mT


def _cayley(parameters: Tensor) -> Tensor:
    skew = parameters - parameters.mT
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew, eye - skew)


def learned_at(
    site: Site,
    weights: Weights,
    heads: Heads,
    settings: MaskSettings,
    *,
    full: bool,
    shifts: bool,
    online: bool = False,
    kronecker: bool = False,
    keys: bool = False,
) -> Learned | None:
    """The parameters for a site, or None where nothing of the kind can stand.

    weights: float32 or float64, the precision of what is learned. full: matrices per head where the group has them,
    else diagonals. shifts: where biases can carry one. online: a full matrix behind a norm, which then runs.
    kronecker: a Kronecker product before all linear layers, which runs, and nothing that folds there.
    keys: a matrix for every KV head on queries and keys, which runs.
    """
    like = next(iter(weights.values()))
    if kronecker and not isinstance(site, QueryKey):
        width = weights[f"{site.readers[0]}.weight"].shape[1]
        return _Kronecker(site, factors_of(width), like)
    if keys and isinstance(site, QueryKey):
        return _Keys(site, heads, like)
    if isinstance(site, NormSite):
        carried = shifts and _have_bias(weights, site.norm, *site.readers)
        width = weights[f"{site.norm}.weight"].numel()
        if online:
            return _Matrix(site, Heads(1, 1, width), carried, settings, like)
        return _Scale(site, width, carried, like)
    if isinstance(site, ValueOutput):
        carried = shifts and _have_bias(weights, site.value, site.output)
        if full:
            return _Matrix(site, heads, carried, settings, like)
        return _Scale(site, heads.keys * heads.size, carried, like)
    if isinstance(site, UpDown):
        return _Scale(site, weights[f"{site.up}.weight"].shape[0], False, like)
    if isinstance(site, FcPair):
        width = weights[f"{site.fc1}.weight"].shape[0]
        return _Scale(site, width, False, like) if site.homogeneous else None
    if site.key_norm is not None:
        return _NormedPair(site, heads, like)
    if site.rotary == "half-split":
        return _Rotary(site, heads, like)
    carried = shifts and _have_bias(weights, site.key)
    return _Matrix(site, heads, carried, settings, like) if full else None


def _have_bias(weights: Weights, *names: str) -> bool:
    return all(f"{name}.bias" in weights for name in names)
