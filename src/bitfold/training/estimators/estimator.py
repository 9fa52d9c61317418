"""What an estimator is: a weight or an input on a grid in the forward pass, and a gradient in the backward pass."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bitfold.numerics import QuantizedTensor, TensorScheme

__all__ = ["InputEstimator", "WeightEstimator"]


class WeightEstimator(nn.Module, ABC):
    """Puts a weight, seen as a matrix [out, in], on the grid of its scheme; of a convolution in = channels · height ·
    width. What `forward` gives and what `quantized` stands for are the same values to the bit."""

    def __init__(self, scheme: TensorScheme, storage: torch.dtype = torch.float32) -> None:
        """storage: the dtype in which scales will be stored; they are rounded to it in training already."""
        super().__init__()
        self.scheme, self.storage = scheme, storage

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The weight [out, in] on its grid, differentiable in it and in what else is learned."""

    @abstractmethod
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """The weight [out, in] as what PTQ makes, too."""

    def bound(self, weight: Tensor) -> None:
        """Bring the weight, in place, and what is learned back into their bounds; called before each use in training,
        without gradients."""

    def extra_repr(self) -> str:
        return self.scheme.describe()


class InputEstimator(nn.Module, ABC):
    """Puts the input of a layer on the grid of its scheme."""

    def __init__(self, scheme: TensorScheme) -> None:
        super().__init__()
        self.scheme = scheme

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x on its grid, same shape and dtype, differentiable in it and in what is learned."""

    @property
    @abstractmethod
    def activation(self) -> TensorScheme:
        """How the converted layer quantizes its input.

        Raises RecipeError when nothing was seen that a range could come from.
        """

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """What it has found of the input, as a layer stores it: input_scale [1] float32, input_zero_point [1] int8."""

    def penalty(self) -> Iterable[Tensor]:
        """What is to be added to the loss, if anything."""
        return ()

    def extra_repr(self) -> str:
        return self.scheme.describe()
