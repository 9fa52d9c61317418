"""Values are those that loaders compute, to the bit; gradients are those of the formula."""

import pytest
import torch

from bitfold.numerics import QuantizedTensor, TensorScheme, to_groups
from bitfold.numerics.quantize import NF4_LEVELS
from bitfold.numerics.trainable_scale import as_stored, dequantize_trainable

SCHEMES = {
    "group": TensorScheme(bits=3, symmetric=False, granularity="group", group_size=8),
    "channel": TensorScheme(bits=4, symmetric=False),
    "tensor": TensorScheme(bits=4, symmetric=False, granularity="tensor"),
    "symmetric": TensorScheme(bits=2, granularity="group", group_size=16),
    "nf4": TensorScheme(grid="nf4", bits=4, granularity="group", group_size=8),
    "fp8": TensorScheme(grid="fp8_e4m3"),
}


def quantized(scheme: TensorScheme, storage: torch.dtype) -> QuantizedTensor:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    limits = torch.aminmax(to_groups(weight, scheme), dim=-1, keepdim=True)
    return QuantizedTensor.from_limits(weight, *limits, scheme, storage)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("computed_in", [torch.bfloat16, torch.float32])
def test_values_are_those_of_loaders(
    name: str, storage: torch.dtype, computed_in: torch.dtype
) -> None:
    tensor = quantized(SCHEMES[name], storage)
    moved = as_stored(tensor.scale.float() * 1.0371, storage)
    found = dequantize_trainable(tensor, moved, computed_in, torch.float32)
    stored = QuantizedTensor(tensor.codes, moved.to(storage), tensor.zero, tensor.scheme)
    assert torch.equal(found, stored.dequantize(computed_in).float())


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    scheme = SCHEMES[name]
    tensor = quantized(scheme, torch.float64)
    gradient = torch.randn(6, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine, plain = (tensor.scale.clone().requires_grad_() for _ in range(2))
    dequantize_trainable(tensor, mine, torch.float64, torch.float64).backward(gradient)

    codes = to_groups(tensor.codes, scheme)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    units = levels[codes.long()] if scheme.grid == "nf4" else codes.double()
    if tensor.zero is not None:
        units = units - tensor.zero.double().reshape(*codes.shape[:-1], 1)
    values = (units * plain.reshape(*codes.shape[:-1], 1)).reshape(6, 32)
    values.backward(gradient)
    assert mine.grad is not None
    assert torch.allclose(mine.grad, plain.grad, rtol=1e-13, atol=1e-13)


def test_rounding_to_storage_passes_gradients_straight_through() -> None:
    x = torch.tensor([1.001, 2.0, -3.3], requires_grad=True)
    rounded = as_stored(x, torch.bfloat16)
    assert torch.equal(rounded, x.detach().bfloat16().float())
    rounded.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0, 3.0]))
