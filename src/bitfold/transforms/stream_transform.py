"""What a method that turns the residual stream of the whole model is."""

from abc import abstractmethod

from torch import Tensor

from bitfold.transforms.site_transform import SiteTransform

__all__ = ["StreamTransform"]


class StreamTransform(SiteTransform):
    """Chooses the basis of the residual stream, before the first block; and what goes with it at the sites of a block.

    where_free: only of a model that pays nothing for it, its head being a tensor of its own already; others, and those
    whose norms allow none, stay as they are. Without it a tied head is untied, which is size.
    where_possible: models whose norms allow none stay as they are, instead of being refused.
    """

    where_free: bool = False
    where_possible: bool = False

    @abstractmethod
    def matrix(self, size: int, *, keeps_ones: bool, seed: int) -> Tensor:
        """R [size, size] float64, orthogonal; keeps_ones: with R 1 = 1 (under LayerNorm)."""
