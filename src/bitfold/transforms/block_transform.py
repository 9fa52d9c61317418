"""What a method that fits all transforms of a block together, by gradient, is given and gives back."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from bitfold.models.family import Site
from bitfold.numerics import MapShape, Scheme
from bitfold.part import Part
from bitfold.transforms.groups import Heads, Transform

__all__ = ["BlockFit", "BlockProblem", "BlockTransform", "Clipping", "Restore", "Terms"]

Terms = Literal["original", "quantized", "both"]
"""Which outputs the quantized block is held against: f(X), f(X̂), or both (AffineQuant's augmented loss)."""

Restore = Callable[[str, Tensor], Tensor]
"""Puts the output of a rewritten layer, by name, back into the basis of the original."""


@dataclass(frozen=True)
class BlockProblem:
    """A block to be rewritten so that it rounds well.

    weights: by name, float32 or float64: the precision of what is learned, whatever the block runs in. schemes: of the
    linear layers. windows: how many there are.
    loss(weights, windows, terms, low): mean squared error of the block's output with these (rewritten, rounded) weights
    on the windows of these indices, relative to what the block adds to the stream; differentiable in the weights. `low`
    runs the block's matrix products in bfloat16.
    linear_loss(weights, windows, terms, low, restore): the mean over the linear layers of the relative squared error of
    each one's own output, as the formula of AffineQuant's paper has it.
    seed: of everything drawn. report(done, total, what): progress. low_is_quick: whether bfloat16 takes less time where
    it runs; on a CPU without instructions for it, it takes a hundred times as long.
    """

    weights: Mapping[str, Tensor]
    sites: tuple[Site, ...]
    schemes: Mapping[str, Scheme]
    heads: Heads
    windows: int
    loss: Callable[[Mapping[str, Tensor], Tensor, Terms, bool], Tensor]
    linear_loss: Callable[[Mapping[str, Tensor], Tensor, Terms, bool, Restore], Tensor]
    seed: int
    report: Callable[[int, int, str], None]
    low_is_quick: bool = True


@dataclass(frozen=True)
class Clipping:
    """Learned limits of a weight's groups as ratios of their min and max, [out, groups, 1] each."""

    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class BlockFit:
    """Transforms to fold, in this order; learned clipping by layer; figures for the report."""

    transforms: list[Transform]
    clipping: dict[str, Clipping]
    report: dict[str, Any] = field(default_factory=dict)


class BlockTransform(Part):
    """Fits the transforms of all sites of a block together."""

    @abstractmethod
    def fit(self, problem: BlockProblem) -> BlockFit:
        """Transforms and clipping of the least loss found; never worse than doing nothing."""

    def online_map(self, site: Site, width: int, heads: Heads) -> MapShape | None:
        """The map that it leaves at a site of this width (of a head at q · k), which runs; None: all is folded."""
        return None
