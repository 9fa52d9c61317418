"""What a way of correcting weights is."""

from abc import abstractmethod

from torch import Tensor

from bitfold.numerics import TensorScheme
from bitfold.part import Part
from bitfold.statistics import InputStatistics

__all__ = ["Correction"]


class Correction(Part):
    """Changes a layer's weight before its range is chosen."""

    @abstractmethod
    def apply(self, weight: Tensor, scheme: TensorScheme, statistics: InputStatistics) -> Tensor:
        """The weight [out, in] to round instead of this one, in its dtype.

        scheme: of the weight. statistics: of the layer's input as the quantized model sees it, with what `needs` asks
        for.
        """
