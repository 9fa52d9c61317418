"""A linear layer with a scale for each channel, as products of bytes that are summed exactly (`int8_product.py`).

With VNNI they take half of bfloat16's time and, for single tokens, run at the speed of the memory.

* Quantized inputs are such bytes themselves: their codes, made by the simulation's arithmetic, plus 128.
* Inputs that are not quantized are fixed-point numbers of 24 bits, multiples of about 2^−23 of the token's largest
  value, in three digits: three rows instead of one, which a single token gets for nothing. Longer prompts have two
  digits, which takes as long as bfloat16's product, and 2^−15 of the largest.

The rest is in float32:  y = s_x s_w (Σ a c − z_x Σ c − z_w Σ (a − z_x)),  codes a of the input and c of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitfold.numerics import QuantizedTensor, Scheme, TensorScheme
from bitfold.numerics.quantize import dynamic_scale_and_zero, quantize, to_groups
from bitfold.runtime.int8_product import MIDDLE, BytesWeight, no_products

__all__ = ["Int8Linear", "no_int8"]

THREE_DIGITS_UP_TO = 8
"""Tokens: 24 rows take 2048 · 5632 weights 0.9 ms, 16 rows 0.7, and one 0.35."""


def no_int8(scheme: Scheme) -> str | None:
    """Why a weight of a scheme cannot be run so; None if it can."""
    weight, activation = scheme.weight, scheme.activation
    if weight is None or weight.grid != "int" or weight.kept:
        return "only weights that are all integers have a quick form"
    if weight.granularity not in ("channel", "tensor"):
        return "products of bytes have one scale for a channel, and these have one for a group"
    if activation is not None and not _sums_up(activation):
        return f"inputs in {activation.describe()} have no one scale and zero-point for a token"
    return no_products()


def _sums_up(scheme: TensorScheme) -> bool:
    if scheme.grid != "int":
        return False
    return scheme.granularity == ("tensor" if scheme.static else "token")


class Int8Linear(nn.Module):
    """The product with a quantized weight [out, in] that `no_int8` has nothing against.

    The weight is the product's own, a byte for each, and travels with no state dict. scale: [out] float32; sums: [out]
    float32, Σ c; zero: [out] float32, or None.
    """

    scale: Tensor
    sums: Tensor
    zero: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None

    def __init__(
        self,
        tensor: QuantizedTensor,
        activation: TensorScheme | None,
        bias: Tensor | None,
        input_scale: Tensor | None = None,
        input_zero: Tensor | None = None,
    ) -> None:
        """bias: [out], in any dtype. input_scale: [1], input_zero: [1] int8, of a static activation; input_scale is the
        share of its range that a clipped one has."""
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.activation = activation
        codes, zero = tensor.codes, tensor.zero
        if zero is not None and tensor.scheme.bits < 8:
            codes, zero = codes - zero, None  # fits into a byte
        self.register_buffer("scale", _rows(tensor.scale, self.out_features))
        self.register_buffer("zero", None if zero is None else _rows(zero, self.out_features))
        self.register_buffer("sums", codes.sum(dim=1, dtype=torch.int32).float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero", input_zero)
        self._weight = BytesWeight(codes)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in the dtype of x."""
        rows = x.reshape(-1, self.in_features)
        found = self._of_values(rows) if self.activation is None else self._of_codes(rows)
        if self.bias is not None:
            found += self.bias
        return found.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _of_codes(self, rows: Tensor) -> Tensor:
        assert self.activation is not None
        if self.input_scale is None or self.activation.clipped:
            tokens = to_groups(rows, self.activation)
            scale, zero = dynamic_scale_and_zero(tokens, self.activation, self.input_scale)
            scale, zero = scale.flatten(1), None if zero is None else zero.flatten(1)
        else:
            scale = self.input_scale.to(rows.dtype)
            zero = None if self.input_zero is None else self.input_zero.to(rows.dtype)
        codes = quantize(rows, scale, zero, self.activation)
        found = self._weight.product(codes.view(torch.uint8) ^ MIDDLE)
        if zero is not None:
            found -= zero.float() * self.sums
        if self.zero is not None:
            of_token = codes.sum(dim=1, keepdim=True, dtype=torch.int32).float()
            if zero is not None:
                of_token -= self.in_features * zero.float()
            found -= of_token * self.zero
        return found.mul_(scale.float()).mul_(self.scale)

    def _of_values(self, rows: Tensor) -> Tensor:
        rows = rows.float().contiguous()
        digits = 3 if len(rows) <= THREE_DIGITS_UP_TO else 2
        integer = torch.int32 if digits == 3 else torch.int16
        # Digits −128 … 127 are bytes less 128: with 128 added to every digit they are the bytes of one integer.
        middle = sum(MIDDLE << (8 * place) for place in range(digits))
        # Float32 may round a quotient up by one.
        step = rows.abs().amax(dim=1, keepdim=True) / (256**digits - 8 - middle)
        step = step.clamp_(min=torch.finfo(torch.float32).tiny)
        fixed = (rows / step).round_()
        whole = (fixed.to(torch.int32) + middle).to(integer)
        places = whole.view(torch.uint8).unflatten(1, (self.in_features, -1))[..., :digits]
        found = self._weight.product(places.permute(2, 0, 1).flatten(0, 1)).unflatten(
            0, (digits, -1)
        )
        total = found[0]
        for place in range(1, digits):
            total = total.add_(found[place], alpha=2 ** (8 * place))
        if self.zero is not None:
            total -= fixed.sum(dim=1, keepdim=True) * self.zero
        return total.mul_(step).mul_(self.scale)

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}"]
        parts += [f"activation={self.activation.describe()}"] if self.activation else []
        return ", ".join(parts)


def _rows(per_row: Tensor, rows: int) -> Tensor:
    """[out, 1], or [1, 1] of a tensor, as [out] float32."""
    return per_row.float().flatten().expand(rows).contiguous()
