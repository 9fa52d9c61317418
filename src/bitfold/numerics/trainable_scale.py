"""Scales that are trained, with the codes or without them: exactly the values that loaders compute, differentiable.

    x̂ = s · (q − z)        dL/ds = Σ over the group of dL/dx̂ · (q − z)
    q = clamp(round(p))    dL/dp = s · dL/dx̂ inside the grid, 0 outside

s is rounded to the dtype of storage before, and a position p between the codes to one of them; the gradient is passed
straight through both roundings.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitfold.numerics.quantize import from_groups, to_groups
from bitfold.numerics.scheme import TensorScheme
from bitfold.numerics.stored_scale import storable_scale
from bitfold.numerics.tensor import QuantizedTensor

__all__ = ["as_stored", "dequantize_trainable", "nearest_codes"]


def as_stored(x: Tensor, storage: torch.dtype, scheme: TensorScheme | None = None) -> Tensor:
    """x rounded to the dtype in which it will be stored, in its own dtype; gradients pass straight through.

    scheme: of the weight whose scales [out, groups] x are, which may say more of their precision.
    """
    rounded: Tensor = _AsStored.apply(x, storage, scheme)
    return rounded


def dequantize_trainable(
    tensor: QuantizedTensor,
    scale: Tensor,
    computed_in: torch.dtype,
    dtype: torch.dtype,
    position: Tensor | None = None,
) -> Tensor:
    """The weight [out, in] in `dtype` of the codes with other scales [out, groups], differentiable in the scales.

    scale: values that the dtype of the tensor's own scales holds exactly (`as_stored`). computed_in: the dtype in which
    loaders multiply. position: of every weight between the codes [out, in], differentiable; None: the codes stay.
    The result is `QuantizedTensor.dequantize(computed_in).to(dtype)` to the bit.
    """
    values: Tensor = _Dequantize.apply(scale, position, tensor, computed_in, dtype)
    return values


def nearest_codes(position: Tensor, scheme: TensorScheme) -> Tensor:
    """The codes of an integer grid nearest to positions between them, int8."""
    return position.detach().round().clamp_(scheme.qmin, scheme.qmax).to(torch.int8)


class _AsStored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, storage: torch.dtype, scheme: TensorScheme | None) -> Tensor:
        if scheme is not None and scheme.scales != "storage":
            return storable_scale(x, storage, scheme)
        return x.to(storage, copy=True).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scale: Tensor,
        position: Tensor | None,
        tensor: QuantizedTensor,
        computed_in: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:
        if position is not None:
            tensor = replace(tensor, codes=nearest_codes(position, tensor.scheme))
        ctx.tensor = tensor
        ctx.save_for_backward(scale, position)
        stored = scale.to(tensor.scale.dtype)
        return replace(tensor, scale=stored).dequantize(computed_in).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        tensor: QuantizedTensor = ctx.tensor
        like, position = ctx.saved_tensors
        units = replace(tensor, scale=torch.ones_like(like)).dequantize(like.dtype)
        gradient = gradient.to(like.dtype)
        if tensor.columns is not None:  # what is kept depends on neither scale nor code
            gradient = gradient.index_fill(1, tensor.columns.long(), 0)
        by_group = to_groups(units.mul_(gradient), tensor.scheme)
        on_scale = by_group.sum(dim=-1).reshape(like.shape)
        if position is None:
            return on_scale, None, None, None, None
        scheme = tensor.scheme
        inside = torch.ops.aten.hardtanh_backward(
            gradient, position.to(gradient.dtype), scheme.qmin - 0.5, scheme.qmax + 0.5
        )
        groups = to_groups(inside, scheme)
        groups = groups * like.reshape(*groups.shape[:-1], 1)
        return on_scale, from_groups(groups, tensor.shape), None, None, None
