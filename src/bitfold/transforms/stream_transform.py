"""What a method that turns the residual stream of the whole model is."""

from abc import abstractmethod

from torch import Tensor

from bitfold.part import Part

__all__ = ["StreamTransform"]


class StreamTransform(Part):
    """Chooses the basis of the residual stream, before the first block."""

    @abstractmethod
    def matrix(self, size: int, *, keeps_ones: bool, seed: int) -> Tensor:
        """R [size, size] float64, orthogonal; keeps_ones: with R 1 = 1 (under LayerNorm)."""
