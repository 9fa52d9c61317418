"""Quantized inputs are what compressed-tensors computes at run time, to the bit."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics import TensorScheme
from bitfold.numerics.activation import quantize_input

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", rows())
def test_mxfp4_is_compressed_tensors(kind: str, dtype: torch.dtype) -> None:
    """Not in float16, in which mxfp4's smallest scales do not exist: there is no artifact that needs it."""
    x = rows()[kind].to(dtype)
    others = {"strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": torch.uint8}
    args = QuantizationArgs(num_bits=4, type="float", **others)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    scheme = TensorScheme(grid="mxfp4", bits=4, granularity="group", group_size=32)
    before = x.clone()
    ours = quantize_input(x, scheme)
    assert ours.dtype == dtype
    assert torch.equal(ours, fake_quantize(x, scale, zero, args))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", rows())
@pytest.mark.parametrize("at", [1.0, 448 * 6 / 4.5, 2.0**17])
def test_nvfp4_is_compressed_tensors(kind: str, at: float, dtype: torch.dtype) -> None:
    """With global scales that fit, that leave scales below E4M3's numbers, and above them."""
    x = rows()[kind].to(dtype)
    others = {"strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
    args = QuantizationArgs(
        num_bits=4, type="float", scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.int8, **others
    )
    global_scale = torch.tensor([at])
    scale, zero = compute_dynamic_scales_and_zp(
        x, args, torch.nn.Identity(), global_scale=global_scale
    )
    scheme = TensorScheme(grid="nvfp4", bits=4, granularity="group", group_size=16)
    before = x.clone()
    ours = quantize_input(x, scheme, global_scale)
    assert ours.dtype == dtype
    assert torch.equal(ours, fake_quantize(x, scale, zero, args, global_scale=global_scale))
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
    nvfp4 = TensorScheme(grid="nvfp4", bits=4, granularity="group", group_size=16)
    with pytest.raises(RecipeError, match="global scale"):
        quantize_input(torch.ones(2, 16), nvfp4)
