"""What a way of rounding is."""

from abc import abstractmethod

import torch
from torch import Tensor

from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.part import Part

__all__ = ["Rounding"]


class Rounding(Part):
    """Makes the codes of a weight once its limits are known."""

    @abstractmethod
    def solve(
        self,
        weight: Tensor,
        limits: tuple[Tensor, Tensor],
        scheme: TensorScheme,
        scale_dtype: torch.dtype,
        gram: Tensor | None = None,
    ) -> QuantizedTensor:
        """Codes of a weight [out, in] whose groups have these limits [..., 1].

        scale_dtype: in which the scales will be stored. gram: as in `Range.limits`.
        """
