"""Ways of rounding, one file each. A new one is a new file and a line here.

Each is a `Part` with `solve(weight, limits, scheme, scale_dtype, gram) → QuantizedTensor`.
"""

from typing import Protocol

import torch
from torch import Tensor

from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.part import Part
from bitfold.rounding.nearest import Nearest

__all__ = ["ROUNDINGS", "Rounding"]


class Rounding(Protocol):
    """Makes codes of a weight [out, in] once its limits are known."""

    def solve(
        self,
        weight: Tensor,
        limits: tuple[Tensor, Tensor],
        scheme: TensorScheme,
        scale_dtype: torch.dtype,
        gram: Tensor | None = None,
    ) -> QuantizedTensor: ...


ROUNDINGS: dict[str, type[Part]] = {
    "nearest": Nearest,
}
