"""Quantize and dequantize against the mathematics, group by group in plain float64."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics import (
    TensorScheme,
    dequantize,
    fake_quantize,
    from_groups,
    quantize,
    scale_and_zero,
    to_groups,
)
from bitfold.numerics.quantize import NF4_LEVELS
from reference import round_group

BITS = range(2, 9)
SIGNS = [
    pytest.param({"symmetric": False}, id="asymmetric"),
    pytest.param({"symmetric": True}, id="symmetric"),
    pytest.param({"symmetric": True, "narrow": True}, id="narrow"),
]
STORED = [None, torch.bfloat16, torch.float16, torch.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def limits(groups: Tensor) -> tuple[Tensor, Tensor]:
    return groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)


def groups_of_all_kinds() -> Tensor:
    """[9, 32] float64: spread over twelve decades, of one sign, constant, zero, with an outlier, and with ties."""
    x = normal(32)
    outlier = torch.where(torch.arange(32) == 5, 1000 * x, x)
    kinds = [x, 1e-6 * x, 1e6 * x, x.abs(), -x.abs(), 0 * x + 0.3, 0 * x - 7, 0 * x, outlier]
    ties = torch.arange(32).double() / 2 - 7.5
    return torch.stack([*kinds, ties, ties + 7.5, ties - 8])


# --- against the mathematics ---


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("bits", BITS)
def test_is_the_mathematics(bits: int, sign: dict[str, bool]) -> None:
    scheme = TensorScheme(bits=bits, **sign)
    groups = groups_of_all_kinds()
    scale, zero = scale_and_zero(*limits(groups), scheme)
    codes = quantize(groups, scale, zero, scheme)
    values = dequantize(codes, scale, zero, scheme)
    assert codes.dtype == torch.int8
    assert (zero is None) == scheme.symmetric
    for row, group in enumerate(groups.tolist()):
        expected = round_group(group, bits, **sign)
        if any(group):
            assert codes[row].tolist() == expected.codes
            assert float(scale[row]) == pytest.approx(expected.scale, rel=1e-15)
            assert zero is None or int(zero[row]) == expected.zero
        assert values[row].tolist() == pytest.approx(expected.values, rel=1e-14, abs=0)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("bits", BITS)
def test_fake_is_there_and_back(bits: int, sign: dict[str, bool]) -> None:
    scheme = TensorScheme(bits=bits, **sign)
    groups = groups_of_all_kinds()
    before = groups.clone()
    scale, zero = scale_and_zero(*limits(groups), scheme)
    there_and_back = dequantize(quantize(groups, scale, zero, scheme), scale, zero, scheme)
    assert torch.equal(fake_quantize(groups, scale, zero, scheme), there_and_back)
    assert torch.equal(groups, before)  # nothing is done in place


def test_the_zero_point_is_added_before_rounding() -> None:
    """To even after the zero-point: 0.5 + 1 → 2; before it, 0.5 → 0 would become 1."""
    scheme = TensorScheme(bits=4, symmetric=False)
    codes = quantize(torch.tensor([[0.5, 1.5]]), torch.ones(1, 1), torch.ones(1, 1), scheme)
    assert codes.tolist() == [[2, 2]]


# --- what always holds ---

floats = st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False)
many_floats = st.lists(floats | st.floats(-1, 1, width=32, allow_subnormal=False), min_size=1)
schemes = st.builds(
    lambda bits, sign: TensorScheme(bits=bits, **sign),
    st.integers(2, 8),
    st.sampled_from([s.values[0] for s in SIGNS]),
)


@given(many_floats, schemes, st.sampled_from(STORED))
@example([0.0, 0.0], TensorScheme(bits=4, symmetric=False), None)
@example([3e38, -3e38], TensorScheme(bits=4, symmetric=False), None)
@example([1e30, 0.0], TensorScheme(bits=4, symmetric=False), torch.float16)
@example([1e-38, 0.0], TensorScheme(bits=8, symmetric=True), torch.bfloat16)
@settings(max_examples=200)
def test_always_finite_within_the_grid_and_half_a_step(
    values: list[float], scheme: TensorScheme, stored: torch.dtype | None
) -> None:
    groups = torch.tensor([values])
    scale, zero = scale_and_zero(*limits(groups), scheme, stored)
    codes = quantize(groups, scale, zero, scheme)
    found = dequantize(codes, scale, zero, scheme)
    assert torch.isfinite(found).all()
    assert scale > 0
    assert scheme.qmin <= int(codes.min())
    assert int(codes.max()) <= scheme.qmax
    if stored is not None:
        assert torch.equal(scale.to(stored).to(scale.dtype), scale)
    # 0 is a value of the grid, always.
    nothing = torch.zeros(1, 1)
    assert not dequantize(quantize(nothing, scale, zero, scheme), scale, zero, scheme).any()
    # Inside the range the error is at most half a step; what lies outside goes to the nearest end.
    s, z = float(scale), 0.0 if zero is None else float(zero)
    low, high = s * (scheme.qmin - z), s * (scheme.qmax - z)
    for x, y in zip(values, found[0].tolist(), strict=True):
        rounding = 1e-5 * max(abs(low), abs(high))
        assert abs(y - min(max(x, low), high)) <= s / 2 + rounding


@given(st.floats(-60000, 60000, width=16).filter(bool), schemes, st.sampled_from(STORED))
@settings(max_examples=100)
def test_a_constant_group_is_exact(
    value: float, scheme: TensorScheme, stored: torch.dtype | None
) -> None:
    groups = torch.full((1, 7), value, dtype=stored or torch.float32).float()
    scale, zero = scale_and_zero(*limits(groups), scheme, stored)
    assert torch.equal(fake_quantize(groups, scale, zero, scheme), groups)


@pytest.mark.parametrize("grid", ["fp8_e4m3", "nf4"])
@pytest.mark.parametrize("value", [0.0, 0.3, -7.0])
def test_a_constant_group_is_exact_on_every_grid(value: float, grid: str) -> None:
    scheme = TensorScheme(grid=grid, bits={"nf4": 4}.get(grid, 8))
    groups = torch.full((1, 7), value)
    scale, zero = scale_and_zero(*limits(groups), scheme)
    assert torch.equal(fake_quantize(groups, scale, zero, scheme), groups)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_codes_are_made_for_the_scale_that_is_stored(stored: torch.dtype) -> None:
    """Codes for the exact scale, kept with the stored one, would be half a step off at the far end."""
    scheme = TensorScheme(bits=8, symmetric=False)
    groups = normal(64, 128).float()
    scale, zero = scale_and_zero(*limits(groups), scheme, stored)
    exact, _ = scale_and_zero(*limits(groups), scheme)
    assert torch.equal(scale, exact.to(stored).float())
    assert (scale != exact).float().mean() > 0.9
    inside = (groups / scale + zero).clamp(scheme.qmin, scheme.qmax) == groups / scale + zero
    error = (fake_quantize(groups, scale, zero, scheme) - groups).abs()
    assert inside.float().mean() > 0.98
    assert (error <= 0.5001 * scale)[inside].all()


# --- grids that are not integers ---


def test_fp8_is_the_nearest_float8() -> None:
    scheme = TensorScheme(grid="fp8_e4m3")
    groups = torch.cat([normal(8, 64), 1e-3 * normal(8, 64, seed=1).exp()]).float()
    scale, zero = scale_and_zero(*limits(groups), scheme)
    assert zero is None
    assert torch.allclose(scale, groups.abs().amax(-1, keepdim=True) / 448)
    codes = quantize(groups, scale, None, scheme)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(codes.float(), (groups / scale).to(torch.float8_e4m3fn).float())
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    distance = ((groups / scale).double().unsqueeze(-1) - every).abs().amin(-1)
    error = ((groups / scale).double() - codes.double()).abs()
    assert torch.allclose(error, distance, atol=1e-12)


@pytest.mark.parametrize(("grid", "bits"), [("fp8_e4m3", 8), ("nf4", 4)])
def test_what_lies_outside_goes_to_the_end(grid: str, bits: int) -> None:
    """float8 has no infinity: what is too large would be NaN."""
    scheme = TensorScheme(grid=grid, bits=bits)
    groups = torch.tensor([[-50.0, -1.0, 0.5, 1.0, 1e6]])
    scale, _ = scale_and_zero(torch.tensor([[-1.0]]), torch.tensor([[1.0]]), scheme)
    found = fake_quantize(groups, scale, None, scheme)
    assert found[0, [0, 1, 3, 4]].tolist() == pytest.approx([-1, -1, 1, 1])


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, appendix E: 8 quantiles below and 9 above zero, which they share, scaled to [−1, 1]."""
    end = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = norm.ppf(np.linspace(0.5, end, 9))
    below = -norm.ppf(np.linspace(0.5, end, 8))[1:]
    levels = np.sort(np.concatenate([above, below])) / norm.ppf(end)
    assert pytest.approx(levels, abs=1e-6) == NF4_LEVELS


def test_nf4_is_the_nearest_level() -> None:
    scheme = TensorScheme(grid="nf4", bits=4)
    groups = normal(8, 64).float()
    scale, _ = scale_and_zero(*limits(groups), scheme)
    values = dequantize(quantize(groups, scale, None, scheme), scale, None, scheme)
    for group, found in zip(groups.tolist(), values.tolist(), strict=True):
        levels = [level * max(map(abs, group)) for level in NF4_LEVELS]
        nearest = [min(levels, key=lambda level: abs(level - x)) for x in group]
        assert found == pytest.approx(nearest, rel=1e-5, abs=1e-7)


# --- which elements share a scale ---


def shares(granularity: str, group_size: int | None, row: int, column: int) -> object:
    """Two elements of a matrix share a scale where this is equal."""
    return {
        "tensor": 0,
        "channel": row,
        "token": row,
        "group": (row, column // (group_size or 1)),
    }[granularity]


@pytest.mark.parametrize(
    ("granularity", "size"),
    [("tensor", None), ("channel", None), ("token", None), ("group", 4), ("group", 3)],
)
def test_granularity(granularity: str, size: int | None) -> None:
    x = normal(5, 12)
    scheme = TensorScheme(bits=4, granularity=granularity, group_size=size)
    groups = to_groups(x, scheme)
    scale, _ = scale_and_zero(*limits(groups), scheme)
    found = from_groups(scale.expand_as(groups), x.shape)
    for row in range(5):
        for column in range(12):
            mine = shares(granularity, size, row, column)
            largest = max(
                abs(float(x[i, j]))
                for i in range(5)
                for j in range(12)
                if shares(granularity, size, i, j) == mine
            )
            assert float(found[row, column]) == pytest.approx(largest / 7.5, rel=1e-15)
    assert torch.equal(from_groups(groups, x.shape), x)


def test_a_token_of_an_activation_is_its_last_axis() -> None:
    x = normal(2, 3, 5, 8)
    assert to_groups(x, TensorScheme(granularity="token")).shape == (2, 3, 5, 1, 8)
    groups = to_groups(x, TensorScheme(granularity="group", group_size=4))
    assert torch.equal(groups[1, 2, 3, 1], x[1, 2, 3, 4:])


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(RecipeError, match="5 does not divide 12"):
        to_groups(torch.zeros(2, 12), TensorScheme(granularity="group", group_size=5))
