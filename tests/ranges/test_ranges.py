"""Every range against its own objective, computed in plain float64 loops."""

from math import log

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold.numerics import TensorScheme, fake_quantize, scale_and_zero
from bitfold.ranges import RANGES, Range
from bitfold.ranges.kl import Kl
from bitfold.ranges.mse import Mse
from bitfold.ranges.output_error import OutputError
from bitfold.ranges.percentile import Percentile
from reference import round_group

SCHEMES = [
    TensorScheme(bits=2, symmetric=False),
    TensorScheme(bits=3, symmetric=True, narrow=True),
    TensorScheme(bits=4, symmetric=False),
    TensorScheme(bits=4, symmetric=True),
    TensorScheme(bits=8, symmetric=False),
]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=TensorScheme.describe)
FP4 = [
    TensorScheme(grid="mxfp4", bits=4, granularity="group", group_size=32),
    TensorScheme(grid="nvfp4", bits=4, granularity="group", group_size=16),
]


def groups_of_all_kinds(size: int = 32) -> Tensor:
    """[11, size] float64: normal, heavy-tailed, uniform, of one sign, constant, zero, one outlier."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3, size, dtype=torch.float64, generator=generator)
    uniform = torch.rand(1, size, dtype=torch.float64, generator=generator) - 0.3
    outlier = torch.where(torch.arange(size) == 3, -20.0, normal[:1])
    kinds = [normal, normal**3, uniform, normal[:1].abs(), -normal[:1].abs(), outlier]
    return torch.cat([*kinds, torch.full((1, size), 0.7, dtype=torch.float64), 0 * uniform])


def gram_of(size: int, seed: int = 1) -> Tensor:
    """E[xxᵀ] of inputs of very different size that go together."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, size, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(size, size, dtype=torch.float64, generator=generator)
    x = x * torch.rand(size, dtype=torch.float64, generator=generator).exp() ** 3
    return x.T @ x / 200


def rounded(group: list[float], limits: tuple[float, float], scheme: TensorScheme) -> list[float]:
    if limits[0] == limits[1]:  # constant groups are exact within their own limits
        return round_group([limits[0]] * len(group), 8, symmetric=True).values
    sign = {"symmetric": scheme.symmetric, "narrow": scheme.narrow}
    return round_group(group, scheme.bits, limits=limits, **sign).values


def power_error(group: list[float], found: list[float], power: float) -> float:
    return sum(abs(y - x) ** power for x, y in zip(group, found, strict=True))


def shrinkages(group: list[float], smallest: float, steps: int) -> list[tuple[float, float]]:
    ratios = [1 - (1 - smallest) * i / (steps - 1) for i in range(steps)]
    return [(min(group) * ratio, max(group) * ratio) for ratio in ratios]


# --- what all have in common ---


@pytest.mark.parametrize("scheme", SCHEMES + FP4, ids=TensorScheme.describe)
@pytest.mark.parametrize("name", RANGES)
def test_limits_lie_within_the_values(name: str, scheme: TensorScheme) -> None:
    groups = groups_of_all_kinds().unsqueeze(0)
    low, high = RANGES[name]().limits(groups, scheme, gram_of(groups.shape[1] * 32))
    assert low.shape == high.shape == (*groups.shape[:-1], 1)
    assert (low >= groups.amin(-1, keepdim=True).clamp(max=0)).all()
    assert (high <= groups.amax(-1, keepdim=True).clamp(min=0)).all()


@by_scheme
@pytest.mark.parametrize("name", RANGES)
def test_constant_groups_stay_exact(name: str, scheme: TensorScheme) -> None:
    groups = torch.full((1, 3, 16), -0.7)
    groups[0, 1] = 0.0
    limits = RANGES[name]().limits(groups, scheme, gram_of(48).float())
    scale, zero = scale_and_zero(*limits, scheme)
    assert torch.equal(fake_quantize(groups, scale, zero, scheme), groups)


def test_minmax_is_the_span() -> None:
    groups = groups_of_all_kinds()
    low, high = RANGES["minmax"]().limits(groups, SCHEMES[0])
    assert low.flatten().tolist() == [min(group) for group in groups.tolist()]
    assert high.flatten().tolist() == [max(group) for group in groups.tolist()]


# --- mse ---


@by_scheme
@pytest.mark.parametrize("power", [2.0, 2.4, 1.0])
def test_mse_is_the_best_shrinkage(power: float, scheme: TensorScheme) -> None:
    groups = groups_of_all_kinds()
    part = Mse(power=power, smallest=0.3, steps=15)
    low, high = part.limits(groups, scheme)
    chosen = zip(groups.tolist(), low.flatten().tolist(), high.flatten().tolist(), strict=True)
    for group, *limits in chosen:
        errors = [
            power_error(group, rounded(group, candidate, scheme), power)
            for candidate in shrinkages(group, 0.3, 15)
        ]
        found = power_error(group, rounded(group, (limits[0], limits[1]), scheme), power)
        assert found <= errors[0] * (1 + 1e-12)  # never worse than min-max
        assert found == pytest.approx(min(errors), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("scheme", FP4, ids=TensorScheme.describe)
def test_mse_of_4_bit_floating_point_is_the_best_shrinkage(scheme: TensorScheme) -> None:
    """Of a tensor whose groups hang together by the global scale: what the search saw is what comes out."""
    generator = torch.Generator().manual_seed(7)
    tails = torch.randn(100, scheme.group_size or 0, dtype=torch.float64, generator=generator) ** 3
    groups = torch.cat([groups_of_all_kinds(scheme.group_size or 0), tails])

    def errors(low: Tensor, high: Tensor) -> Tensor:
        scale, zero = scale_and_zero(low, high, scheme)
        return (fake_quantize(groups, scale, zero, scheme) - groups).square().sum(dim=-1)

    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    ratios = [1 - 0.6 * i / 30 for i in range(31)]
    tried = torch.stack([errors(low * ratio, high * ratio) for ratio in ratios])
    found = errors(*Mse(smallest=0.4, steps=31).limits(groups, scheme))
    assert (found <= tried[0]).all()
    torch.testing.assert_close(found, tried.amin(dim=0), rtol=1e-6, atol=1e-12)
    assert (found < 0.9 * tried[0]).any()


# --- output error ---


@by_scheme
def test_output_error_is_the_best_shrinkage(scheme: TensorScheme) -> None:
    size, count = 16, 4
    generator = torch.Generator().manual_seed(2)
    groups = torch.randn(5, count, size, dtype=torch.float64, generator=generator) ** 3
    gram = gram_of(size * count)

    def error(group: list[float], found: list[float], index: int) -> float:
        """δ G_gg δᵀ"""
        delta = [y - x for x, y in zip(group, found, strict=True)]
        start = index * size
        return sum(
            delta[i] * float(gram[start + i, start + j]) * delta[j]
            for i in range(size)
            for j in range(size)
        )

    low, high = OutputError(smallest=0.4, steps=13).limits(groups, scheme, gram)
    for row in range(5):
        for index in range(count):
            group = groups[row, index].tolist()
            errors = [
                error(group, rounded(group, limits, scheme), index)
                for limits in shrinkages(group, 0.4, 13)
            ]
            limits = (float(low[row, index]), float(high[row, index]))
            found = error(group, rounded(group, limits, scheme), index)
            assert found <= errors[0] * (1 + 1e-9)
            assert found == pytest.approx(min(errors), rel=1e-4)


# --- percentile ---


@pytest.mark.parametrize("p", [99.9, 99.0, 90.0, 100.0])
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_percentile_is_numpys(interpolation: str, p: float) -> None:
    groups = groups_of_all_kinds(101)
    low, high = Percentile(p=p, interpolation=interpolation).limits(groups, SCHEMES[0])
    expected = np.percentile(groups.numpy(), [100 - p, p], axis=-1, method=interpolation)
    assert low.flatten().tolist() == pytest.approx(expected[0].tolist(), rel=1e-9)
    assert high.flatten().tolist() == pytest.approx(expected[1].tolist(), rel=1e-9)


def test_percentile_of_more_values_than_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are done in parts; a row too long is thinned out evenly."""
    monkeypatch.setattr("bitfold.ranges.percentile._LARGEST", 4000)
    generator = torch.Generator().manual_seed(3)
    many = torch.randn(70, 100, generator=generator)
    low, high = Percentile(p=95).limits(many, SCHEMES[0])
    expected = np.percentile(many.double().numpy(), [5, 95], axis=-1)
    np.testing.assert_allclose(torch.cat([low, high], 1).T.numpy(), expected, rtol=1e-5)
    long = torch.randn(1, 39_999, generator=generator)
    low, high = Percentile(p=95).limits(long, SCHEMES[0])
    assert float(low) == pytest.approx(-1.645, abs=0.1)
    assert float(high) == pytest.approx(1.645, abs=0.1)


# --- KL divergence ---


def divergence(group: list[float], ratio: float, scheme: TensorScheme, bins: int) -> float:
    """KL(P ‖ Q) of the histogram, cut to `ratio` of its width around zero."""
    low, high = min(0.0, *group), max(0.0, *group)
    if scheme.symmetric:
        low, high = -max(-low, high), max(-low, high)
    counts = [0] * bins
    for x in group:
        counts[min(int((x - low) / (high - low) * bins), bins - 1)] += 1
    centres = [low + (i + 0.5) * (high - low) / bins for i in range(bins)]
    inside = [i for i in range(bins) if low * ratio <= centres[i] < high * ratio]
    p = [0.0] * bins
    for i in range(bins):
        p[min(max(i, inside[0]), inside[-1])] += counts[i]
    step = (high - low) * ratio / 2**scheme.bits
    levels: dict[int, list[int]] = {}
    for i in inside:
        level = min(int((centres[i] - low * ratio) / step), 2**scheme.bits - 1)
        levels.setdefault(level, []).append(i)
    q = [0.0] * bins
    for members in levels.values():
        filled = [i for i in members if counts[i]]
        for i in filled:
            q[i] = sum(counts[j] for j in members) / len(filled)
    total_p, total_q = sum(p), max(sum(q), 1.0)
    # A bin that holds only what was cut off has no q: a floor keeps the divergence finite.
    return sum(
        x / total_p * log(x / total_p / max(y / total_q, 1e-6))
        for x, y in zip(p, q, strict=True)
        if x
    )


@by_scheme
def test_kl_is_the_least_divergence(scheme: TensorScheme) -> None:
    bins, smallest, steps = 64, 0.4, 11
    groups = torch.cat([groups_of_all_kinds(200)[:-2], groups_of_all_kinds(200)[:3] ** 5])
    low, high = Kl(bins=bins, smallest=smallest, steps=steps).limits(groups, scheme)
    ratios = [1 - (1 - smallest) * i / (steps - 1) for i in range(steps)]
    for index, group in enumerate(groups.tolist()):
        by_ratio = {ratio: divergence(group, ratio, scheme, bins) for ratio in ratios}
        ratio = float(high[index]) / max(group) if max(group) else 1.0
        assert float(low[index]) == pytest.approx(min(group) * ratio, rel=1e-5)
        nearest = min(ratios, key=lambda candidate: abs(candidate - ratio))
        assert ratio == pytest.approx(nearest, rel=1e-5)
        assert by_ratio[nearest] <= by_ratio[1.0] + 1e-5  # never worse than min-max
        assert by_ratio[nearest] == pytest.approx(min(by_ratio.values()), rel=1e-3, abs=1e-5)


# --- what they are for ---


@pytest.mark.parametrize(
    "part", [Mse(), Kl(), Percentile(p=99)], ids=lambda part: type(part).__name__
)
def test_a_heavy_tail_is_clipped(part: Range) -> None:
    generator = torch.Generator().manual_seed(4)
    normal = torch.randn(8, 4096, generator=generator)
    tail = normal**3
    scheme = TensorScheme(bits=4)
    ratio = part.limits(tail, scheme)[1] / tail.amax(-1, keepdim=True)
    assert (ratio < 0.75).all()
    limits = part.limits(tail, scheme)
    scale, zero = scale_and_zero(*limits, scheme)
    whole, _ = scale_and_zero(tail.amin(-1, keepdim=True), tail.amax(-1, keepdim=True), scheme)
    error = (fake_quantize(tail, scale, zero, scheme) - tail).square().mean()
    naive = (fake_quantize(tail, whole, None, scheme) - tail).square().mean()
    if not isinstance(part, Percentile):
        assert error < naive


@pytest.mark.parametrize("part", [Mse(), Kl()], ids=lambda part: type(part).__name__)
def test_a_gaussian_in_8_bits_hardly_is(part: Range) -> None:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(16, 128, generator=generator)
    ratio = part.limits(normal, TensorScheme(bits=8))[1] / normal.amax(-1, keepdim=True)
    assert (ratio > 0.9).all()
