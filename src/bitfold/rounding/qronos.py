"""Qronos (Zhang et al. 2025, arXiv 2505.11695): every code the best given all others, against the original's output.

A layer is given x̂ where the original gave x. Column by column, with H = E[x̂x̂ᵀ] and G = E[x x̂ᵀ]:

    q₁ = Q( (w G_{:,1} − w_{2:} H_{2:,1}) / H₁₁ )              the best first code with the other weights as they were
    w_{t+1:} = argmin ‖ w X − q_{≤t} X̂_{≤t} − w_{t+1:} X̂_{t+1:} ‖²,      q_{t+1} = Q(w_{t+1})

The refit after q₁ is a linear system; from then on it is GPTQ's update.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bitfold.numerics import dequantize, quantize
from bitfold.part import Need
from bitfold.rounding.gptq import (
    Gptq,
    MomentRoot,
    groups_of_columns,
    rounded_in_order,
)
from bitfold.rounding.rounding import Layer, Rounded
from bitfold.statistics import InputStatistics

__all__ = ["Qronos"]


class Qronos(Gptq):
    """Options as `Gptq`; `keep_better` does not apply."""

    needs = frozenset[Need]({"gram", "cross"})

    def solve(
        self,
        layers: Mapping[str, Layer],
        scale_dtype: torch.dtype,
        statistics: InputStatistics | None = None,
    ) -> Rounded:
        """See `Rounding.solve`."""
        assert statistics is not None
        gram, cross = statistics.gram, statistics.cross
        factor = self.root_of(gram)
        tensors = {}
        for name, layer in layers.items():
            fitted = _refitted(layer, scale_dtype, factor, gram, cross)
            tensors[name] = rounded_in_order(fitted, scale_dtype, factor, self.block, settled=1)
        return Rounded(tensors, self.notes_on(factor, layers))


def _refitted(
    layer: Layer, scale_dtype: torch.dtype, factor: MomentRoot, gram: Tensor, cross: Tensor
) -> Layer:
    """The layer with its first column (in the factor's order) as it is to be rounded, and the others refitted to it."""
    order = factor.order
    damped = factor.damped
    weight = layer.weight[:, order].to(gram.dtype)
    target = weight @ (cross[order][:, order] + damped)
    first = (target[:, 0] - weight[:, 1:] @ damped[1:, 0]) / damped[0, 0]
    scales, zeros, width = groups_of_columns(layer, scale_dtype)
    group = int(order[0]) // width
    zero = None if zeros is None else zeros[:, group]
    code = quantize(first, scales[:, group], zero, layer.scheme)
    rounded = dequantize(code, scales[:, group], zero, layer.scheme)
    left = target[:, 1:] - rounded[:, None] * damped[0, 1:]
    others = torch.linalg.solve(damped[1:, 1:], left, left=False)
    found = torch.empty_like(weight)
    found[:, order] = torch.cat([first[:, None], others], dim=1)
    return replace(layer, weight=found.to(layer.weight.dtype))
