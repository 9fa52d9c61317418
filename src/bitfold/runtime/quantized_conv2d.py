"""A convolution that keeps its weight packed, and unpacks it whenever it runs."""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfold.export.layout import input_scale_name
from bitfold.numerics import QuantizedTensor, Scheme
from bitfold.numerics.activation import quantize_input
from bitfold.runtime.quantized_linear import QuantizedLinear, state_of

__all__ = ["QuantizedConv2d"]


class QuantizedConv2d(QuantizedLinear):
    """`nn.Conv2d` whose state is that of a `QuantizedLinear` with a weight [out, channels · height · width].

    The input is quantized, in one static range, before it is padded; padding is 0 then, which every grid has.
    """

    def __init__(
        self,
        scheme: Scheme,
        *,
        shape: tuple[int, ...],
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        padding: tuple[int, ...] = (0, 0, 0, 0),
        padding_mode: str = "zeros",
        groups: int = 1,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """shape: of the weight, [out, in / groups, height, width]. padding: left, right, top and bottom."""
        columns = shape[1] * shape[2] * shape[3]
        super().__init__(columns, shape[0], scheme, bias=bias, dtype=dtype, device=device)
        self.shape, self.stride, self.dilation, self.groups = tuple(shape), stride, dilation, groups
        self.padding, self.padding_mode = tuple(padding), padding_mode

    @classmethod
    def of(
        cls,
        weight: QuantizedTensor | Tensor,
        scheme: Scheme,
        bias: Tensor | None,
        calibrated: Mapping[str, Tensor] | None = None,
        **geometry: Any,
    ) -> Self:
        """The layer of a weight that is there, [out, columns] quantized or in its own shape; geometry: as `__init__`
        takes it."""
        matrix = weight if isinstance(weight, QuantizedTensor) else weight.flatten(1)
        like = matrix.scale if isinstance(matrix, QuantizedTensor) else matrix
        has: dict[str, Any] = {"bias": bias is not None}
        has |= {"dtype": like.dtype, "device": like.device} | geometry
        layer = cls(scheme, **has)
        layer.load_state_dict(state_of(matrix, bias, calibrated or {}))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] → the same of the output."""
        if self.scheme.activation is not None:
            scale = getattr(self, input_scale_name(self.scheme.activation))
            x = quantize_input(x, self.scheme.activation, scale, self.input_zero_point)
        if any(self.padding):
            x = F.pad(
                x, self.padding, "constant" if self.padding_mode == "zeros" else self.padding_mode
            )
        weight = self.dequantize(x.dtype).view(self.shape)
        return F.conv2d(x, weight, self.bias, self.stride, 0, self.dilation, self.groups)
