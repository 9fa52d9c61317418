"""Quantization error propagation (QEP, arXiv 2504.09629): weights that make up for what earlier layers got wrong.

The quantized model gives a layer x̂ where the original gave x. Of all weights the one nearest to the original's output,
‖W X − Ŵ X̂‖², is

    W + α W E[(x − x̂)x̂ᵀ] H⁻¹,      H = E[x̂x̂ᵀ], damped

for α = 1; the paper takes α = ½, which follows the calibration text less.
"""

import torch
from pydantic import Field
from torch import Tensor

from bitfold.corrections.correction import Correction
from bitfold.numerics import TensorScheme
from bitfold.part import Need
from bitfold.statistics import InputStatistics

__all__ = ["Qep"]


class Qep(Correction):
    """alpha: share of the correction that is made. damping: as in `Gptq`."""

    needs = frozenset[Need]({"gram", "cross"})

    alpha: float = Field(default=0.5, ge=0, le=1)
    damping: float = Field(default=0.01, gt=0)

    def apply(self, weight: Tensor, scheme: TensorScheme, statistics: InputStatistics) -> Tensor:
        """See `Correction.apply`."""
        gram = statistics.gram
        mean = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
        damped = gram.clone()
        damped.diagonal().add_(self.damping * mean)
        product = weight.to(gram.dtype) @ statistics.cross
        correction = torch.linalg.solve(damped, product, left=False)
        return weight + self.alpha * correction.to(weight.dtype)
