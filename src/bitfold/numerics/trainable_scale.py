"""Scales that are trained while the codes stay: exactly the values that loaders compute, differentiable in the scales.

    x̂ = s · (q − z)        dL/ds = Σ over the group of dL/dx̂ · (q − z)

s is rounded to the dtype of storage before, and the gradient is passed straight through that rounding. Nothing but the
codes is kept for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from bitfold.numerics.quantize import dequantize, from_groups, to_groups
from bitfold.numerics.tensor import QuantizedTensor

__all__ = ["as_stored", "dequantize_trainable"]


def as_stored(x: Tensor, storage: torch.dtype) -> Tensor:
    """x rounded to the dtype in which it will be stored, in its own dtype; gradients pass straight through."""
    rounded: Tensor = _AsStored.apply(x, storage)
    return rounded


def dequantize_trainable(
    tensor: QuantizedTensor, scale: Tensor, computed_in: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """The weight [out, in] in `dtype` of the codes with other scales [out, groups], differentiable in the scales.

    scale: values that the dtype of the tensor's own scales holds exactly (`as_stored`). computed_in: the dtype in which
    loaders multiply. The result is `QuantizedTensor.dequantize(computed_in).to(dtype)` to the bit.
    """
    values: Tensor = _Dequantize.apply(scale, tensor, computed_in, dtype)
    return values


class _AsStored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, storage: torch.dtype) -> Tensor:
        return x.to(storage, copy=True).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scale: Tensor,
        tensor: QuantizedTensor,
        computed_in: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.tensor, ctx.like = tensor, scale
        stored = scale.to(tensor.scale.dtype)
        changed = QuantizedTensor(tensor.codes, stored, tensor.zero, tensor.scheme)
        return changed.dequantize(computed_in).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        tensor: QuantizedTensor = ctx.tensor
        like: Tensor = ctx.like
        codes = to_groups(tensor.codes, tensor.scheme)
        one = like.new_ones((*codes.shape[:-1], 1))
        zero = None if tensor.zero is None else tensor.zero.reshape(one.shape)
        units = from_groups(dequantize(codes, one, zero, tensor.scheme), tensor.shape)
        by_group = to_groups(units.mul_(gradient.to(like.dtype)), tensor.scheme)
        return by_group.sum(dim=-1).reshape(like.shape), None, None, None
