"""Round to nearest: the floor of every table."""

from collections.abc import Mapping

import torch

from bitfold.numerics import QuantizedTensor
from bitfold.rounding.rounding import Layer, Rounded, Rounding
from bitfold.statistics import InputStatistics

__all__ = ["Nearest"]


class Nearest(Rounding):
    """Every weight goes to the nearest code within the range."""

    def solve(
        self,
        layers: Mapping[str, Layer],
        scale_dtype: torch.dtype,
        statistics: InputStatistics | None = None,
    ) -> Rounded:
        """See `Rounding.solve`; nothing of the input is read."""
        return Rounded(
            {
                name: QuantizedTensor.from_limits(
                    layer.weight, *layer.limits, layer.scheme, scale_dtype
                )
                for name, layer in layers.items()
            }
        )
