"""Quantized inputs are what compressed-tensors computes at run time, to the bit."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics import TensorScheme
from bitfold.runtime.activation import quantize_input

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [
    ("int", 8, True),
    ("int", 8, False),
    ("int", 4, True),
    ("int", 4, False),
    ("int", 3, False),
    ("int", 2, False),
    ("fp8_e4m3", 8, True),
]


def rows() -> dict[str, Tensor]:
    """Kinds of tokens, [4, 256, 64] each."""
    x = torch.randn(4, 256, 64, generator=torch.Generator().manual_seed(0))
    spread = x * torch.logspace(-4, 4, 256)[:, None]
    return {
        "spread": spread,
        "positive": spread.abs(),
        "negative": -spread.abs(),
        "shifted": x + torch.linspace(-9, 9, 256)[:, None],
        "constant": torch.linspace(-3, 3, 256)[:, None].expand(4, 256, 64),
        "zero": torch.zeros(4, 256, 64),
        "one outlier": torch.where(torch.arange(64) == 5, 1000 * x, x),
        "underflow": 1e-38 * x,
    }


def arguments(grid: str, bits: int, symmetric: bool, **others: object) -> QuantizationArgs:
    kind = "int" if grid == "int" else "float"
    return QuantizationArgs(num_bits=bits, type=kind, symmetric=symmetric, **others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("kind", rows())
def test_dynamic_is_compressed_tensors(
    kind: str, grid: str, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    x = rows()[kind].to(dtype)
    granularities = {
        "token": TensorScheme(grid=grid, bits=bits, symmetric=symmetric, granularity="token"),
        "group": TensorScheme(
            grid=grid, bits=bits, symmetric=symmetric, granularity="group", group_size=16
        ),
        "tensor": TensorScheme(grid=grid, bits=bits, symmetric=symmetric, granularity="tensor"),
    }
    for strategy, scheme in granularities.items():
        args = arguments(
            grid, bits, symmetric, strategy=strategy, dynamic=True, group_size=scheme.group_size
        )
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
        before = x.clone()
        ours = quantize_input(x, scheme)
        assert ours.dtype == dtype
        assert torch.equal(ours, fake_quantize(x, scale, zero, args))
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "bits", "symmetric"), GRIDS)
def test_static_is_compressed_tensors(
    grid: str, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    scheme = TensorScheme(
        grid=grid, bits=bits, symmetric=symmetric, granularity="tensor", static=True
    )
    scale = torch.tensor([0.37], dtype=dtype)
    zero = None if symmetric else torch.tensor([1 - 2 ** (bits - 2)], dtype=torch.int8)
    args = arguments(grid, bits, symmetric, strategy="tensor")
    for x in rows().values():
        expected = fake_quantize(x.to(dtype), scale, zero, args)
        assert torch.equal(quantize_input(x.to(dtype), scheme, scale, zero), expected)


def test_static_needs_its_range() -> None:
    symmetric = TensorScheme(granularity="tensor", static=True)
    with pytest.raises(RecipeError, match="calibrate"):
        quantize_input(torch.ones(2, 4), symmetric)
    asymmetric = symmetric.model_copy(update={"symmetric": False})
    with pytest.raises(RecipeError, match="zero-point"):
        quantize_input(torch.ones(2, 4), asymmetric, torch.ones(1))
