"""Round to nearest: the floor of every table."""

import torch
from torch import Tensor

from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.rounding.rounding import Rounding

__all__ = ["Nearest"]


class Nearest(Rounding):
    """Every weight goes to the nearest code within the range."""

    def solve(
        self,
        weight: Tensor,
        limits: tuple[Tensor, Tensor],
        scheme: TensorScheme,
        scale_dtype: torch.dtype,
        gram: Tensor | None = None,
    ) -> QuantizedTensor:
        """Codes of a weight [out, in] whose groups have these limits [..., 1]."""
        return QuantizedTensor.from_limits(weight, *limits, scheme, scale_dtype)
