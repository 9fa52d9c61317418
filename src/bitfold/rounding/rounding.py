"""What a way of rounding is."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.part import Part
from bitfold.statistics import InputStatistics

__all__ = ["Layer", "Rounded", "Rounding"]


@dataclass(frozen=True)
class Layer:
    """A weight [out, in] to be rounded, and the limits [..., 1] of its groups, one after the other."""

    weight: Tensor
    limits: tuple[Tensor, Tensor]
    scheme: TensorScheme


@dataclass(frozen=True)
class Rounded:
    """What became of layers, by name; sentences that the user should read."""

    tensors: dict[str, QuantizedTensor]
    notes: list[str] = field(default_factory=list)


class Rounding(Part):
    """Makes the codes of weights once their limits are known."""

    @abstractmethod
    def solve(
        self,
        layers: Mapping[str, Layer],
        scale_dtype: torch.dtype,
        statistics: InputStatistics | None = None,
    ) -> Rounded:
        """Round layers that are given the same input.

        scale_dtype: in which the scales will be stored. statistics: what `needs` asks for, of that input as the
        quantized model sees it; None where it asks for nothing.
        """
