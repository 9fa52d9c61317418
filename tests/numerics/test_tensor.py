"""A quantized weight: what it stands for, and how many bits it takes."""

import pytest
import torch
from torch import Tensor

from bitfold.numerics import QuantizedTensor, TensorScheme, to_groups
from reference import round_tensor


def weight(rows: int = 6, columns: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


def rounded(
    x: Tensor, scheme: TensorScheme, scale_dtype: torch.dtype = torch.float64
) -> QuantizedTensor:
    groups = to_groups(x, scheme)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return QuantizedTensor.from_limits(x, low, high, scheme, scale_dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("granularity", "group"), [("tensor", None), ("channel", None), ("group", 32), ("group", 3)]
)
def test_values(granularity: str, group: int | None, symmetric: bool, bits: int) -> None:
    x = weight()
    scheme = TensorScheme(bits=bits, symmetric=symmetric, granularity=granularity, group_size=group)
    tensor = rounded(x, scheme)
    size = {"tensor": x.numel(), "channel": 96, "group": group}[granularity]
    assert size is not None
    assert tensor.shape == x.shape == tensor.codes.shape
    assert tensor.scale.shape == ((1, 1) if granularity == "tensor" else (6, 96 // size))
    assert tensor.zero is None if symmetric else tensor.zero.shape == tensor.scale.shape
    expected = torch.from_numpy(round_tensor(x.numpy(), size, bits, symmetric=symmetric))
    torch.testing.assert_close(tensor.dequantize(torch.float64), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_stored_is_all_there_is(stored: torch.dtype) -> None:
    """The codes were made for the scale as it is stored: the error stays within half a stored step, off the ends."""
    x = weight().float()
    tensor = rounded(x, TensorScheme(bits=4, symmetric=False), stored)
    assert tensor.scale.dtype == stored
    assert tensor.zero is not None
    assert tensor.zero.dtype == torch.int8
    by_hand = (tensor.codes.float() - tensor.zero.float()) * tensor.scale.float()
    assert torch.equal(tensor.dequantize(), by_hand)
    inside = (tensor.codes > -8) & (tensor.codes < 7)
    assert ((by_hand - x).abs() <= 0.501 * tensor.scale.float())[inside].all()


COUNTED = {
    # [8, 256]: codes, scales, zero-points
    "int4 asymmetric g128 bf16": (8 * 256 * 4 + 16 * 16 + 16 * 4, 4 + (16 + 4) / 128),
    "int3 asymmetric g64 bf16": (8 * 256 * 3 + 32 * 16 + 32 * 3, 3 + (16 + 3) / 64),
    "int4 symmetric channel f32": (8 * 256 * 4 + 8 * 32, 4 + 32 / 256),
    "int8 asymmetric tensor f16": (8 * 256 * 8 + 16 + 8, 8 + 24 / 2048),
    "fp8 channel bf16": (8 * 256 * 8 + 8 * 16, 8 + 16 / 256),
    "nf4 g64 bf16": (8 * 256 * 4 + 32 * 16, 4 + 16 / 64),
    "mxfp4 g32 bf16": (8 * 256 * 4 + 64 * 8, 4 + 8 / 32),
    "nvfp4 g16 f32": (8 * 256 * 4 + 128 * 8 + 32, 4 + 8 / 16 + 32 / 2048),
}
SCHEMES = {
    "int4 asymmetric g128 bf16": {"bits": 4, "symmetric": False, "group_size": 128},
    "int3 asymmetric g64 bf16": {"bits": 3, "symmetric": False, "group_size": 64},
    "int4 symmetric channel f32": {"bits": 4},
    "int8 asymmetric tensor f16": {"symmetric": False, "granularity": "tensor"},
    "fp8 channel bf16": {"grid": "fp8_e4m3"},
    "nf4 g64 bf16": {"grid": "nf4", "bits": 4, "group_size": 64},
    "mxfp4 g32 bf16": {"grid": "mxfp4", "bits": 4, "group_size": 32},
    "nvfp4 g16 f32": {"grid": "nvfp4", "bits": 4, "group_size": 16},
}
STORED = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@pytest.mark.parametrize("name", COUNTED)
def test_bits_are_those_counted_by_hand(name: str) -> None:
    fields = SCHEMES[name]
    granularity = {"granularity": "group"} if "group_size" in fields else {}
    scheme = TensorScheme.model_validate(fields | granularity)
    tensor = rounded(weight(8, 256).float(), scheme, STORED[name.rpartition(" ")[2]])
    bits, per_weight = COUNTED[name]
    assert tensor.bits == bits
    assert tensor.bits_per_weight == pytest.approx(per_weight, rel=1e-12)
