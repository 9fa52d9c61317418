"""Layers whose weights lie in few bits, in operations of PyTorch alone: what `torch.export` writes down of a model.

The arithmetic is that of `QuantizedTensor.dequantize` and `quantize_input`, which are traced, so that a graph computes
what the simulation does.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.export.onnx_integers import in_bytes
from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.numerics.activation import quantize_input

__all__ = ["PackedLinear", "StoredEmbedding", "StoredLinear"]


class _RoundedInput(nn.Module):
    """Of a linear layer: its bias [out], and how its input is rounded, with what was calibrated for that."""

    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_clusters: Tensor | None

    def __init__(
        self,
        bias: Tensor | None,
        activation: TensorScheme | None,
        calibrated: Mapping[str, Tensor],
    ) -> None:
        """calibrated: of the input (`StoredModel.calibrated`)."""
        super().__init__()
        self._activation = activation
        ranges = ("input_scale", "input_share", "input_global_scale")  # a scheme has one of them
        scale = next((calibrated[name] for name in ranges if name in calibrated), None)
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_zero_point", calibrated.get("input_zero_point"))
        self.register_buffer("input_clusters", calibrated.get("input_clusters"))
        self.register_buffer("bias", bias)

    def _rounded(self, x: Tensor) -> Tensor:
        if self._activation is None:
            return x
        point, clusters = self.input_zero_point, self.input_clusters
        return quantize_input(x, self._activation, self.input_scale, point, clusters)


class PackedLinear(_RoundedInput):
    """y = x Ŵᵀ + b, Ŵ [out, in] unpacked for each product.

    Buffers: codes [out, bytes] uint8, of 2, 4 or 8 bits each, the first of a byte in its lowest bits; scale and zero
    [out, groups], and what else a `QuantizedTensor` has.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    global_scale: Tensor | None
    codebook: Tensor | None
    kept: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        value: QuantizedTensor,
        bias: Tensor | None,
        unpacked_in: torch.dtype,
        activation: TensorScheme | None,
        calibrated: Mapping[str, Tensor],
    ) -> None:
        """unpacked_in: the dtype that values are computed in."""
        super().__init__(bias, activation, calibrated)
        self._scheme, self._unpacked_in = value.scheme, unpacked_in
        self._width, self._dtype = value.codes.shape[1], value.codes.dtype
        bits = value.scheme.code_bits
        self.bits = next(n for n in (2, 4, 8) if n >= bits)
        self._half = 1 << (self.bits - 1) if value.scheme.grid == "int" else 0
        codes = value.codes.view(torch.uint8)
        codes = codes + self._half  # a byte: what is below 0 comes round
        self.register_buffer("codes", in_bytes(codes & ((1 << self.bits) - 1), self.bits))
        for name in ("scale", "zero", "global_scale", "codebook", "kept", "columns"):
            self.register_buffer(name, getattr(value, name))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] float32 → [..., out]"""
        return F.linear(self._rounded(x), self._weight().to(x.dtype), self.bias)

    def _weight(self) -> Tensor:
        """[out, in]"""
        codes = self.codes
        if self.bits < 8:
            places = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=codes.device)
            codes = (codes.unsqueeze(-1) >> places) & ((1 << self.bits) - 1)
            codes = codes.flatten(1)[:, : self._width]
        codes = codes - self._half
        value = QuantizedTensor(
            codes.view(self._dtype),
            self.scale,
            self.zero,
            self._scheme,
            global_scale=self.global_scale,
            codebook=self.codebook,
            kept=self.kept,
            columns=self.columns,
        )
        return value.dequantize(self._unpacked_in)


class StoredLinear(_RoundedInput):
    """A linear layer whose weight stays in the dtype of its checkpoint, and may be an embedding's too."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: Tensor | None,
        activation: TensorScheme | None,
        calibrated: Mapping[str, Tensor],
    ) -> None:
        super().__init__(bias, activation, calibrated)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] float32 → [..., out]"""
        return F.linear(self._rounded(x), self.weight.to(x.dtype), self.bias)


class StoredEmbedding(nn.Module):
    """Rows of a matrix that stays in the dtype of its checkpoint, as float32."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length] int64 → [batch, length, hidden]"""
        return F.embedding(tokens, self.weight).float()
