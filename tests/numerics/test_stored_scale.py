"""Scales in the precision of the formats that will hold them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bitfold.numerics import QuantizedTensor, TensorScheme, to_groups
from bitfold.numerics.stored_scale import block_steps, storable_scale

HALF = TensorScheme(bits=4, granularity="group", group_size=32, scales="half")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def in_blocks(bits: int) -> TensorScheme:
    return TensorScheme(bits=bits, granularity="group", group_size=16, scales="blocks")


@given(st.integers(-40, 20), st.sampled_from(DTYPES), st.integers(0, 10**6))
def test_half_scales_are_in_both(exponent: int, storage: torch.dtype, seed: int) -> None:
    scale = torch.rand(64, 1, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    stored = storable_scale(scale, storage, HALF)
    assert (stored > 0).all()
    assert torch.equal(stored.to(storage).float(), stored)
    assert torch.equal(stored.half().float(), stored)
    normal = (scale > 2.0**-14) & (scale < 60000)
    error = ((stored - scale).abs() / scale)[normal]
    assert (error <= (2.0**-8 if storage == torch.bfloat16 else 2.0**-11)).all()


@pytest.mark.parametrize("bits", [2, 3, 6])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_scales_in_blocks_are_small_integers_times_one(bits: int, spread: float) -> None:
    """Held against the textbook in Python's numbers: s is what rounds nearest, d no further than its digits up."""
    scheme, most = in_blocks(bits), {2: 15, 3: 31, 6: 127}[bits]
    scale = torch.exp(spread * torch.randn(6, 32, dtype=torch.float64)) * 1e-3
    stored = storable_scale(scale, torch.bfloat16, scheme)
    assert torch.equal(stored.bfloat16().double(), stored)
    assert torch.equal(storable_scale(scale[..., None], None, scheme)[..., 0], stored)
    found = block_steps(stored, scheme)
    assert found is not None
    d, steps = found
    assert torch.equal((d * steps).reshape(scale.shape), stored)
    assert torch.equal(steps, steps.round())
    assert 1 <= steps.min() <= steps.max() <= most
    digits = 8 - most.bit_length()
    for row in range(6):
        for block in range(2):
            part = scale[row, 16 * block : 16 * block + 16].tolist()
            exact = max(part) / most
            ulp = 2.0 ** (math.floor(math.log2(exact)) + 1 - digits)
            unit = math.ceil(exact / ulp) * ulp
            nearest = [min(max(round(one / unit), 1), most) * unit for one in part]
            assert stored[row, 16 * block : 16 * block + 16].tolist() == nearest


def test_scales_that_are_in_no_blocks() -> None:
    assert block_steps(torch.rand(2, 16) + 0.5, in_blocks(3)) is None


@settings(deadline=None)
@given(st.sampled_from([2, 3, 6]), st.sampled_from(DTYPES), st.integers(0, 10**6))
def test_weights_are_rounded_to_the_scales_that_are_stored(
    bits: int, storage: torch.dtype, seed: int
) -> None:
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(seed))
    scheme = in_blocks(bits)
    groups = to_groups(weight, scheme)
    limits = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    tensor = QuantizedTensor.from_limits(weight, *limits, scheme, storage)
    assert block_steps(tensor.scale, scheme) is not None
    per_weight = tensor.scale.double().repeat_interleave(16, dim=1)
    best = (weight.double() / per_weight).round().clamp(scheme.qmin, scheme.qmax) * per_weight
    error = (tensor.dequantize(torch.float64) - weight).square().sum()
    assert error <= (best - weight).square().sum() * (1 + 1e-6)


def test_impossible_precisions_are_refused() -> None:
    with pytest.raises(ValidationError, match="symmetric integers of 2, 3 or 6 bits"):
        TensorScheme(bits=4, granularity="group", group_size=16, scales="blocks")
    with pytest.raises(ValidationError, match="has scales of its own"):
        TensorScheme(grid="mxfp4", bits=4, granularity="group", group_size=32, scales="half")
