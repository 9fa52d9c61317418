"""QuantEase (Behdin et al. 2023, arXiv 2309.01885): coordinate descent on the layer's error, begun at GPTQ's codes.

The error of a row, δ H δᵀ with δ = w − ŵ and H = E[xxᵀ], is quadratic in each of its codes and in each of its scales.
With r = δ H both have their optimum in closed form while all else stays:

    code      of column j: the nearest to ŵ_j + r_j / H_jj
    scale     of group g, whose codes less the zero-point are u: s + (u · r_g) / (u H_gg uᵀ)

No step makes a row worse: what can be stored that is nearest to the optimum is the best of what can be stored.
GPTQ decides about a column once, not knowing what those after it will be; here each is decided again. The paper leaves
scales as they are; refitting them too is an addition. It matters most where bits are few.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from bitfold.numerics import QuantizedTensor, dequantize, quantize
from bitfold.numerics.stored_scale import storable_scale
from bitfold.rounding.gptq import Gptq, MomentRoot
from bitfold.rounding.rounding import Layer

__all__ = ["Quantease", "refined"]

# A scale moves by at most this factor in a turn: a group whose codes are nearly all zero says little about it.
_FARTHEST = 2.0


class Quantease(Gptq):
    """rounds: turns over all scales and all codes, fewer where one changes nothing. The rest as in `Gptq`."""

    rounds: int = Field(default=4, ge=0)

    def improved(
        self, found: QuantizedTensor, layer: Layer, factor: MomentRoot, scale_dtype: torch.dtype
    ) -> QuantizedTensor:
        """See `Gptq.improved`."""
        blocks = factor.order.split(self.block)
        weight = layer.weight.to(factor.damped.dtype)
        return refined(found, weight, factor.moment, blocks, scale_dtype, self.rounds)


def refined(
    tensor: QuantizedTensor,
    weight: Tensor,
    moment: Tensor,
    blocks: tuple[Tensor, ...],
    scale_dtype: torch.dtype,
    rounds: int,
) -> QuantizedTensor:
    """Codes and scales of a weight [out, in] after so many turns, each row's error in H = `moment` [in, in] never more
    than it was. blocks: the columns in the order in which they are decided, in parts."""
    # One scale for all rows has no row's optimum, those of fp4 grids are few, and those in blocks hang together: they
    # stay.
    free = len(tensor.scale) == len(weight) and not tensor.scheme.fp4
    free = free and tensor.scheme.scales != "blocks"
    for _ in range(rounds):
        turn = _with_scales(tensor, weight, moment, scale_dtype) if free else tensor
        turn = _with_codes(turn, weight, moment, blocks)
        settled = torch.equal(turn.codes, tensor.codes)
        settled = settled and not (free and (turn.scale != tensor.scale).any())
        tensor = turn
        if settled:
            break
    return tensor


def _with_scales(
    tensor: QuantizedTensor, weight: Tensor, moment: Tensor, scale_dtype: torch.dtype
) -> QuantizedTensor:
    """Group by group the best scale, as it will be stored."""
    values = tensor.dequantize(weight.dtype)
    missing = weight - values
    scales = tensor.scale.to(weight.dtype, copy=True)
    for group, columns in _groups(tensor):
        old = scales[:, group]
        units = values[:, columns] / old[:, None]
        curvature = ((units @ moment[columns, columns]) * units).sum(dim=1)
        slope = (units * (missing @ moment[:, columns])).sum(dim=1)
        moved = old + slope / curvature.clamp(min=torch.finfo(curvature.dtype).tiny)
        moved = torch.minimum(torch.maximum(moved, old / _FARTHEST), old * _FARTHEST)
        moved = storable_scale(moved, scale_dtype, tensor.scheme)
        missing[:, columns] -= units * (moved - old)[:, None]
        scales[:, group] = moved
    return replace(tensor, scale=scales.to(tensor.scale.dtype))


def _with_codes(
    tensor: QuantizedTensor, weight: Tensor, moment: Tensor, blocks: tuple[Tensor, ...]
) -> QuantizedTensor:
    """Column by column the best code."""
    scheme = tensor.scheme
    # One row for each column, so that what a step reads and writes lies together.
    values = tensor.dequantize(weight.dtype).T.contiguous()
    missing = weight.T - values
    codes = tensor.codes.T.contiguous()
    steps, zeros, width = _steps(tensor, weight)
    for columns in blocks:
        toward = moment[:, columns]
        pulled, within = toward.T @ missing, toward[columns]
        moved = torch.empty_like(pulled)
        for place, column in enumerate(columns.tolist()):
            step = steps[column // width]
            zero = None if zeros is None else zeros[column // width]
            pull = pulled[place] - within[:place, place] @ moved[:place]
            code = quantize(values[column] + pull / within[place, place], step, zero, scheme)
            codes[column] = code
            moved[place] = dequantize(code, step, zero, scheme) - values[column]
        missing[columns] -= moved
    return replace(tensor, codes=codes.T.contiguous())


def _groups(tensor: QuantizedTensor) -> Iterator[tuple[int, slice]]:
    """The groups of columns that share a scale in each row."""
    width = tensor.shape[1] // tensor.scale.shape[1]
    for group in range(tensor.scale.shape[1]):
        yield group, slice(group * width, (group + 1) * width)


def _steps(tensor: QuantizedTensor, weight: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Scales and zero-points [groups, out] in the weight's dtype, and how many columns share one."""
    rows = len(weight)
    steps = tensor.scale.to(weight.dtype)
    if tensor.global_scale is not None:
        steps = steps / tensor.global_scale
    zeros = None if tensor.zero is None else tensor.zero.to(weight.dtype).expand(rows, -1)
    width = weight.shape[1] // steps.shape[1]
    by_group = steps.expand(rows, -1).T.contiguous()
    return by_group, None if zeros is None else zeros.T.contiguous(), width
