"""mxfp4 and nvfp4 against their definitions in plain float64 loops, and what makes them exact in bfloat16."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfold.numerics import (
    QuantizedTensor,
    TensorScheme,
    dequantize,
    fake_quantize,
    quantize,
    scale_and_zero,
    sharing_global_scale,
    to_groups,
)
from bitfold.numerics.fp4 import fp4_codes, fp4_values, global_scale, round_to_fp4, scale_parts
from bitfold.numerics.straight_through import fake_quantize_trainable
from reference import minifloats, nearest_minifloat

E2M1 = minifloats(2, 1, bias=1, count=8)
E4M3 = minifloats(4, 3, bias=7, count=127)  # the last code is not a number
MXFP4 = TensorScheme(grid="mxfp4", bits=4, granularity="group", group_size=32)
NVFP4 = TensorScheme(grid="nvfp4", bits=4, granularity="group", group_size=16)
by_grid = pytest.mark.parametrize("scheme", [MXFP4, NVFP4], ids=["mxfp4", "nvfp4"])


def test_the_formats_by_hand() -> None:
    assert E2M1 == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (E4M3[1], E4M3[-1]) == (2.0**-9, 448)


def weight(rows: int = 12, columns: int = 96, seed: int = 0) -> Tensor:
    """Rows of all kinds, float64: normal, heavy-tailed, tiny, huge, of one sign, constant, zero, with one outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    x[1] = x[1] ** 5
    x[2] *= 1e-6
    x[3] *= 300
    x[4] = x[4].abs()
    x[5] = -0.7
    x[6] = 0
    x[7, 5] = 40
    return x


def limits(x: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
    groups = to_groups(x, scheme)
    return groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)


def rounded(x: Tensor, scheme: TensorScheme) -> QuantizedTensor:
    return QuantizedTensor.from_limits(x, *limits(x, scheme), scheme, torch.float32)


def scale_by_hand(largest: list[float], scheme: TensorScheme) -> list[float]:
    """Of every group of a tensor, by search where the package calculates."""
    if scheme.grid == "mxfp4":
        fits = [[e for e in range(-127, 126) if 3.5 <= m / 2.0**e < 7] for m in largest]
        return [2.0 ** (e[0] if e else -127) for e in fits]
    at = next(g for g in (2.0**e for e in range(100, -127, -1)) if g * max(largest) / 6 <= 448)
    codes = [nearest_minifloat(at * (m / 6), E4M3) for m in largest]
    return [(E4M3[code] or 0.125) / at for code in codes]


def value_by_hand(x: float, scale: float) -> float:
    return math.copysign(scale * E2M1[nearest_minifloat(abs(x) / scale, E2M1)], x)


@by_grid
def test_codes_scales_and_values_are_those_of_the_definition(scheme: TensorScheme) -> None:
    x = weight()
    tensor = rounded(x, scheme)
    groups = to_groups(x, scheme)
    largest = groups.abs().amax(-1).flatten().tolist()
    scales = scale_by_hand(largest, scheme)
    found, _ = scale_and_zero(*limits(x, scheme), scheme)
    assert found.flatten().tolist() == scales
    values = to_groups(tensor.dequantize(torch.float64), scheme).flatten(0, 1)
    for group, scale, value in zip(groups.flatten(0, 1), scales, values, strict=True):
        assert value.tolist() == [value_by_hand(v, scale) for v in group.tolist()]
    stood_for = [*E2M1, *(-number for number in E2M1)]
    assert fp4_values(tensor.codes, torch.float64).flatten().tolist() == [
        stood_for[code] for code in tensor.codes.flatten().tolist()
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_and_ties(dtype: torch.dtype) -> None:
    """Every number, every midpoint, their neighbours, and what lies beyond, of both signs."""
    middles = [(a + b) / 2 for a, b in pairwise(E2M1)]
    points = torch.tensor([*E2M1, *middles, 0.1, 5.9, 7, 100], dtype=dtype)
    far = torch.tensor(math.inf, dtype=dtype)
    points = torch.cat([points, points.nextafter(far), points.nextafter(-far).clamp(min=0)])
    points = torch.cat([points, -points])
    expected = [value_by_hand(x, 1.0) for x in points.tolist()]
    before = points.clone()
    assert round_to_fp4(points).tolist() == expected
    assert round_to_fp4(points).dtype == dtype
    assert fp4_values(fp4_codes(points), dtype).tolist() == expected
    assert not (fp4_codes(points) == 8).any()  # one zero is enough
    assert torch.equal(points, before)


@by_grid
@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**40])
def test_what_can_be_represented_is_left_as_it_is(scheme: TensorScheme, scale: float) -> None:
    size = scheme.group_size
    assert size is not None
    levels = torch.tensor([*E2M1, *(-x for x in E2M1)] * (size // 16), dtype=torch.float64)
    steps = torch.tensor([1.0, 4.0, 0.25] if scheme is MXFP4 else [1.0, 1.125, 0.3125])
    x = scale * levels * steps.double()[:, None]
    assert torch.equal(rounded(x, scheme).dequantize(torch.float64), x)
    assert torch.equal(fake_quantize_trainable(x, scheme), x)


floats = st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False)
few = st.lists(floats | st.floats(-1, 1, width=32), min_size=32, max_size=32)


@given(st.lists(few, min_size=1, max_size=3), st.sampled_from([MXFP4, NVFP4]))
@example([[0.0] * 32], MXFP4)
@example([[0.0] * 32], NVFP4)
@example([[3e38, -3e38] * 16, [1e-38] * 32], MXFP4)
@example([[3e38, -3e38] * 16, [1e-38] * 32], NVFP4)
@settings(max_examples=150)
def test_always_finite_and_nothing_is_lost_in_storage(
    values: list[list[float]], scheme: TensorScheme
) -> None:
    x = torch.tensor(values)
    scale, zero = scale_and_zero(*limits(x, scheme), scheme)
    groups = to_groups(x, scheme)
    assert zero is None
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()
    tensor = rounded(x, scheme)
    found = tensor.dequantize()
    assert torch.isfinite(found).all()
    codes = quantize(groups, scale, None, scheme)
    assert int(codes.max()) < 16
    assert torch.equal(found, dequantize(codes, scale, None, scheme).reshape(x.shape))
    assert torch.equal(found, fake_quantize(groups, scale, None, scheme).reshape(x.shape))
    # Zero stays zero, and nothing changes its sign.
    assert not found[x == 0].any()
    assert (found * x >= 0).all()
    # In bfloat16, in which loaders unpack, it is the same to the bit.
    assert torch.equal(tensor.dequantize(torch.bfloat16).float(), found)


def test_stored_scales() -> None:
    x = weight().float()
    mx, nv = rounded(x, MXFP4), rounded(x, NVFP4)
    assert (mx.scale.dtype, mx.global_scale) == (torch.float8_e8m0fnu, None)
    assert nv.scale.dtype == torch.float8_e4m3fn
    assert nv.global_scale is not None
    assert nv.global_scale.dtype == torch.float32
    assert math.frexp(float(nv.global_scale))[0] == 0.5  # a power of two
    # The largest scale fills E4M3 to the last factor of two.
    assert 224 <= float(nv.scale.float().max()) <= 448


@pytest.mark.parametrize("largest", [1e-38, 1e-30, 0.3, 2688.0, 2689.0, 1e30, 3e38])
def test_the_global_scale_keeps_scales_within_e4m3(largest: float) -> None:
    at = global_scale(torch.tensor([largest, largest / 3]))
    assert float(at) * largest / 6 <= 448
    assert float(at) * largest / 6 > 224 or float(at) == 2.0**100


def test_a_group_far_below_the_others_vanishes() -> None:
    """Its scale is less than half of E4M3's smallest number."""
    x = torch.full((1, 32), 1.0)
    x[0, 16:] = 2.0**-19
    found = rounded(x, NVFP4).dequantize()
    assert not found[0, 16:].any()
    assert found[0, :16].all()


def test_layers_that_share_an_input_share_a_global_scale() -> None:
    first, second = rounded(weight().float(), NVFP4), rounded(weight(seed=1).float() / 5, NVFP4)
    other = rounded(weight().float(), MXFP4)
    assert first.global_scale is not None
    assert second.global_scale is not None
    assert not torch.equal(first.global_scale, second.global_scale)
    shared = sharing_global_scale({"q": first, "k": second, "v": other})
    q, k = shared["q"], shared["k"]
    assert torch.equal(q.global_scale, k.global_scale)
    assert q.global_scale.data_ptr() != k.global_scale.data_ptr()  # files hold tensors of their own
    assert shared["v"] is other
    for before, after in ((first, q), (second, k)):
        assert torch.equal(before.dequantize(), after.dequantize())
        assert torch.equal(before.codes, after.codes)


def test_a_global_scale_that_would_lose_something_is_not_shared() -> None:
    first, second = rounded(weight().float(), NVFP4), rounded(weight(seed=1).float() / 1e5, NVFP4)
    shared = sharing_global_scale({"q": first, "k": second})
    assert torch.equal(shared["k"].dequantize(), second.dequantize())
    assert shared["k"] is second


def test_other_grids_keep_the_storages_dtype() -> None:
    stored, at = scale_parts(torch.ones(2, 1), TensorScheme(), torch.bfloat16)
    assert (stored.dtype, at) == (torch.bfloat16, None)


@by_grid
def test_gradients_pass_straight_through(scheme: TensorScheme) -> None:
    x = weight().requires_grad_()
    upstream = weight(seed=3)
    found = fake_quantize_trainable(x, scheme)
    found.backward(upstream)
    expected = rounded(x.detach(), scheme).dequantize(torch.float64)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x.grad, upstream)
