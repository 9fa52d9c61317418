"""GPTAQ (Li et al. 2025, arXiv 2504.02692): GPTQ whose target is the original's output, not the quantized stream's.

A layer is given x̂ where the original gave x. Beside its own rounding error each step spreads what earlier layers did to
its column: with P = ((C L) ⊙ M) Lᵀ, C = E[(x − x̂)x̂ᵀ], L the Cholesky factor of H⁻¹ and M strictly upper triangular,

    W_{:, j+1:} ← W_{:, j+1:} − e_j L_{j+1:, j}ᵀ + w_j P_{j, j+1:}
"""

from collections.abc import Mapping

import torch
from pydantic import Field

from bitfold.part import Need
from bitfold.rounding.gptq import Gptq
from bitfold.rounding.rounding import Layer, Rounded
from bitfold.statistics import InputStatistics

__all__ = ["Gptaq"]


class Gptaq(Gptq):
    """alpha: share of the correction that is made. Otherwise as `Gptq`."""

    needs = frozenset[Need]({"gram", "cross"})

    alpha: float = Field(default=1.0, ge=0, le=1)

    def solve(
        self,
        layers: Mapping[str, Layer],
        scale_dtype: torch.dtype,
        statistics: InputStatistics | None = None,
    ) -> Rounded:
        """See `Rounding.solve`."""
        assert statistics is not None
        return self.solve_with(layers, scale_dtype, statistics.gram, statistics.cross * self.alpha)
