"""A linear layer that keeps its weight packed, and unpacks it whenever it runs."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.export.layout import WeightFormat, input_buffers, input_scale_name
from bitfold.export.native import NAME, to_tensors, unpack_weight
from bitfold.numerics import QuantizedTensor, Scheme, TensorScheme, packed_width
from bitfold.numerics.activation import quantize_input

__all__ = ["QuantizedLinear", "state_of"]

_SCALES = ("input_scale", "input_global_scale", "input_share")


class QuantizedLinear(nn.Module):
    """`nn.Linear` whose state is the tensors of bitfold's own format (`bitfold.export.native`).

    The weight is dequantized in the dtype of x, and x is quantized before it where the
    scheme has an activation, exactly as in the simulation. Where the scheme leaves the weight
    alone, `weight` is [out, in].
    """

    weight: Tensor
    weight_scale: Tensor
    weight_global_scale: Tensor | None
    input_scale: Tensor | None
    input_global_scale: Tensor | None
    input_share: Tensor | None
    input_zero_point: Tensor | None
    input_clusters: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        dtype = torch.get_default_dtype() if dtype is None else dtype

        def buffer(name: str, shape: tuple[int, ...] | None, dtype: torch.dtype) -> None:
            empty = None if shape is None else torch.zeros(shape, dtype=dtype, device=device)
            self.register_buffer(name, empty)

        if (weight := scheme.weight) is None:
            buffer("weight", (out_features, in_features), dtype)
        else:
            scales = _scale_shape(weight, out_features, in_features)
            zeros = None if weight.symmetric else (packed_width(scales[0], weight.bits), scales[1])
            words = packed_width(in_features // weight.values_per_code, weight.code_bits)
            books = weight.codebook
            buffer("weight", (out_features, words), torch.int32)
            buffer("weight_shape", (2,), torch.int64)
            buffer("weight_scale", scales, torch.uint8 if weight.fp4 else dtype)
            buffer("weight_global_scale", (1,) if weight.grid == "nvfp4" else None, torch.float32)
            buffer("weight_zero_point", zeros, torch.int32)
            entries = None if books is None else books.shape
            buffer("weight_codebook", entries, torch.int8)
            buffer("weight_shift", scales if weight.grid == "shifted" else None, dtype)
            buffer("weight_kept", (out_features, weight.kept) if weight.kept else None, dtype)
            buffer("weight_columns", (weight.kept,) if weight.kept else None, torch.int32)
        inputs = input_buffers(scheme.activation, in_features, dtype, device)
        for name in (*_SCALES, "input_zero_point", "input_clusters"):
            self.register_buffer(name, inputs.get(name))
        empty = torch.zeros(out_features, dtype=dtype, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @classmethod
    def of(
        cls,
        weight: QuantizedTensor | Tensor,
        scheme: Scheme,
        bias: Tensor | None,
        calibrated: Mapping[str, Tensor] | None = None,
    ) -> "QuantizedLinear":
        """The layer of a weight [out, in] that is there: quantized, or plain where the scheme leaves it alone.

        bias: [out]. calibrated: what is stored of its inputs, such as input_scale.
        """
        out_features, in_features = weight.shape
        like = weight.scale if isinstance(weight, QuantizedTensor) else weight
        layer = cls(
            in_features,
            out_features,
            scheme,
            bias=bias is not None,
            dtype=like.dtype,
            device=like.device,
        )
        layer.load_state_dict(state_of(weight, bias, calibrated or {}))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]"""
        if self.scheme.activation is not None:
            scale = getattr(self, input_scale_name(self.scheme.activation))
            x = quantize_input(
                x, self.scheme.activation, scale, self.input_zero_point, self.input_clusters
            )
        return F.linear(x, self.dequantize(x.dtype), self.bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, [out, in]."""
        if self.scheme.weight is None:
            return self.weight
        tensor = unpack_weight(self.get_buffer, self.scheme.weight, self.in_features)
        return tensor.dequantize(dtype)

    def extra_repr(self) -> str:
        weight, activation = self.scheme.weight, self.scheme.activation
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}"]
        parts += [f"bias={self.bias is not None}"]
        parts += [f"weight={weight.describe()}"] if weight else []
        parts += [f"activation={activation.describe()}"] if activation else []
        return ", ".join(parts)


def state_of(
    weight: QuantizedTensor | Tensor, bias: Tensor | None, calibrated: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state dict of a layer of a weight [out, in]."""
    state = {"weight": weight} if isinstance(weight, Tensor) else {}
    if isinstance(weight, QuantizedTensor):
        named = to_tensors("", weight, WeightFormat(NAME, ""))
        state = {name.removeprefix("."): value for name, value in named.items()}
    state |= {} if bias is None else {"bias": bias}
    return {name: value.detach() for name, value in {**state, **calibrated}.items()}


def _scale_shape(scheme: TensorScheme, out_features: int, in_features: int) -> tuple[int, int]:
    if scheme.granularity == "tensor":
        return 1, 1
    return out_features, in_features // (scheme.group_size or in_features)
