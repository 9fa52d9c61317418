"""Percentile: the range leaves out a given share of the values at each end."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bitfold.numerics import TensorScheme
from bitfold.ranges.range import Range

__all__ = ["Percentile"]

# torch.quantile refuses inputs of more than 16M elements.
_LARGEST = 2**24


class Percentile(Range):
    """The range between the (100 − p)th and the pth percentile."""

    p: float = Field(default=99.9, gt=50, le=100)
    interpolation: Literal["linear", "nearest"] = "linear"

    def limits(
        self, groups: Tensor, scheme: TensorScheme, gram: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper limit [..., 1] of grouped values [..., g]."""
        values = groups.flatten(0, -2)
        upper_share = torch.tensor([1 - self.p / 100, self.p / 100], dtype=values.dtype)
        rows = max(1, _LARGEST // values.shape[-1])
        stride = max(1, -(-values.shape[-1] // _LARGEST))
        parts = [
            torch.quantile(
                part[:, ::stride],
                upper_share.to(values.device),
                dim=-1,
                keepdim=True,
                interpolation=self.interpolation,
            )
            for part in values.split(rows)
        ]
        lower, upper = torch.cat(parts, dim=1)
        shape = (*groups.shape[:-1], 1)
        return lower.reshape(shape), upper.reshape(shape)
