"""Quantization error propagation (QEP, arXiv 2504.09629): weights that make up for what earlier layers got wrong.

The quantized model gives a layer x̂ where the original gave x. Of all weights the one nearest to the original's output,
‖W X − Ŵ X̂‖², is, before any rounding,

    W + α W E[(x − x̂)x̂ᵀ] H⁻¹,      H = E[x̂x̂ᵀ], damped

for α = 1; the paper takes α = ½, which follows the calibration text less. Then GPTQ rounds it.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from bitfold.part import Need
from bitfold.rounding.gptq import Gptq
from bitfold.rounding.rounding import Layer, Rounded
from bitfold.statistics import InputStatistics

__all__ = ["Qep"]


class Qep(Gptq):
    """alpha: share of the correction that is made. Otherwise as `Gptq`."""

    needs = frozenset[Need]({"gram", "cross"})

    alpha: float = Field(default=0.5, ge=0, le=1)

    def solve(
        self,
        layers: Mapping[str, Layer],
        scale_dtype: torch.dtype,
        statistics: InputStatistics | None = None,
    ) -> Rounded:
        """See `Rounding.solve`."""
        assert statistics is not None
        corrected = {
            name: replace(layer, weight=self.corrected(layer.weight, statistics))
            for name, layer in layers.items()
        }
        return self.solve_with(corrected, scale_dtype, statistics.gram)

    def corrected(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        """The weight [out, in] to round instead of this one."""
        gram = statistics.gram
        mean = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
        damped = gram.clone()
        damped.diagonal().add_(self.damping * mean)
        correction = torch.linalg.solve(
            damped, weight.to(gram.dtype) @ statistics.cross, left=False
        )
        return weight + self.alpha * correction.to(weight.dtype)
