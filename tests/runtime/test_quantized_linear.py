"""A packed linear layer computes what a plain one with the dequantized weight does."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bitfold.export import native
from bitfold.export.layout import LayerEntry, WeightFormat, input_tensors
from bitfold.numerics import CodebookShape, QuantizedTensor, Scheme, TensorScheme, to_groups
from bitfold.numerics.activation import quantize_input
from bitfold.runtime.quantized_linear import QuantizedLinear

OUT, IN = 10, 96
X = torch.randn(2, 7, IN, generator=torch.Generator().manual_seed(1))
STATIC = TensorScheme(bits=8, symmetric=False, granularity="tensor", static=True)


def rounded(scheme: TensorScheme, dtype: torch.dtype) -> QuantizedTensor:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    low, high = torch.aminmax(to_groups(weight, scheme), dim=-1, keepdim=True)
    return QuantizedTensor.from_limits(weight, low, high, scheme, dtype)


def state_of(name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    tensors = native.to_tensors(name, tensor, WeightFormat(native.NAME, ""))
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "notation",
    [
        "w2a16",
        "w3a16g32",
        "w4a16",
        "w4a4g32",
        "w5a8",
        "w8a8",
        "wfp8afp8",
        "wnf4a16",
        "wnf4a8g32",
        "wmxfp4a16",
        "wmxfp4amxfp4",
        "wnvfp4a16",
    ],
)
def test_forward(notation: str, bias: bool, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(notation)
    assert scheme.weight is not None
    tensor = rounded(scheme.weight, dtype)
    layer = QuantizedLinear(IN, OUT, scheme, bias=bias, dtype=dtype)
    extra = {"bias": torch.arange(OUT).to(dtype)} if bias else {}
    layer.load_state_dict(state_of("layer", tensor) | extra)
    x = X.to(dtype)
    seen = x if scheme.activation is None else quantize_input(x, scheme.activation)
    assert torch.equal(layer(x), F.linear(seen, tensor.dequantize(dtype), extra.get("bias")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codebooks(dtype: torch.dtype) -> None:
    shape = CodebookShape(dim=4, entries=40, books=3)
    scheme = Scheme(
        weight=TensorScheme(grid="codebook", bits=2, codebook=shape),
        activation=TensorScheme(bits=8, granularity="token"),
    )
    assert scheme.weight is not None
    assert scheme.activation is not None
    codes = torch.arange(OUT * IN // 4).remainder(40).view(OUT, IN // 4).to(torch.uint8)
    codebook = torch.arange(3 * 40 * 4).remainder(251).sub(125).view(3, 40, 4).to(torch.int8)
    scale = torch.linspace(0.01, 0.02, OUT).view(OUT, 1).to(dtype)
    tensor = QuantizedTensor(codes, scale, None, scheme.weight, codebook=codebook)
    layer = QuantizedLinear(IN, OUT, scheme, bias=False, dtype=dtype)
    layer.load_state_dict(state_of("layer", tensor))
    x = X.to(dtype)
    expected = F.linear(quantize_input(x, scheme.activation), tensor.dequantize(dtype))
    assert torch.equal(layer(x), expected)


def test_static_activation() -> None:
    scheme = Scheme(weight=TensorScheme(bits=4, granularity="tensor"), activation=STATIC)
    entry = LayerEntry(
        scheme,
        IN,
        input_scale=torch.tensor([0.02]),
        input_zero=torch.tensor([-3], dtype=torch.int8),
    )
    tensor = rounded(scheme.weight, torch.float32)
    inputs = {k.removeprefix("layer."): v for k, v in input_tensors("layer", entry).items()}
    layer = QuantizedLinear(IN, OUT, scheme, bias=False)
    layer.load_state_dict(state_of("layer", tensor) | inputs)
    seen = quantize_input(X, STATIC, entry.input_scale, entry.input_zero)
    assert torch.equal(layer(X), F.linear(seen, tensor.dequantize()))
    assert not torch.equal(seen, X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nvfp4_activation(dtype: torch.dtype) -> None:
    """The global scales stay what they are in whatever dtype the layer runs."""
    scheme = Scheme.parse("wnvfp4anvfp4")
    assert scheme.weight is not None
    assert scheme.activation is not None
    at = torch.tensor([2.0**18])
    tensor = replace(rounded(scheme.weight, dtype), global_scale=at)
    inputs = input_tensors("layer", LayerEntry(scheme, IN, input_scale=at))
    assert list(inputs) == ["layer.input_global_scale"]
    layer = QuantizedLinear(IN, OUT, scheme, bias=False, dtype=dtype)
    layer.load_state_dict(state_of("layer", tensor) | {"input_global_scale": at})
    seen = quantize_input(X.to(dtype), scheme.activation, at)
    assert torch.equal(layer(X.to(dtype)), F.linear(seen, tensor.dequantize(dtype)))
    assert not torch.equal(seen, X.to(dtype))


def test_weight_left_alone() -> None:
    scheme = Scheme(activation=TensorScheme(bits=4, granularity="token"))
    layer = QuantizedLinear(IN, OUT, scheme, bias=False)
    weight = torch.randn(OUT, IN)
    layer.load_state_dict({"weight": weight})
    assert torch.equal(layer(X), F.linear(quantize_input(X, scheme.activation), weight))


def test_packed_size_and_description() -> None:
    layer = QuantizedLinear(IN, OUT, Scheme.parse("w3a8g32"), dtype=torch.bfloat16)
    assert layer.weight.numel() * 32 == OUT * IN * 3
    assert "weight=int3 asymmetric, group 32" in repr(layer)
    assert "activation=int8 symmetric, token" in repr(layer)
    assert not [p for p in layer.parameters() if p.requires_grad]
