"""Clusters of channels: k-means against plain loops, and quantization in them against one range after another."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold.numerics import TensorScheme, channel_clusters, fake_quantize_dynamic, over_clusters
from reference import round_group

Point = tuple[float, float]


def squared(a: Point, b: Point) -> float:
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2


def nearest(point: Point, centres: list[Point]) -> int:
    return min(range(len(centres)), key=lambda i: (squared(point, centres[i]), i))


def reference_clusters(minimum: list[float], maximum: list[float], count: int) -> list[int]:
    """Lloyd's k-means from points far apart, until nothing moves; numbered by the width of the centres."""
    points = [(min(low, 0.0), max(high, 0.0)) for low, high in zip(minimum, maximum, strict=True)]
    distinct = sorted(set(points))
    centres = [max(distinct, key=lambda p: squared(p, (0.0, 0.0)))]
    while len(centres) < min(count, len(distinct)):
        centres.append(max(distinct, key=lambda p: min(squared(p, c) for c in centres)))
    labels: list[int] = []
    while labels != (labels := [nearest(point, centres) for point in points]):
        for i in range(len(centres)):
            if own := [p for p, label in zip(points, labels, strict=True) if label == i]:
                centres[i] = tuple(np.mean(own, axis=0))
    by_width = sorted(range(len(centres)), key=lambda i: centres[i][1] - centres[i][0])
    return [by_width.index(label) for label in labels]


def ranges(channels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ranges of channels of which a tenth are outliers; some are alike, some do not reach 0."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.rand(2, channels, generator=generator, dtype=torch.float64)
    width[:, :: max(2, channels // 4)] *= 30
    low, high = -width[0], width[1]
    low[1::7], high[1::7] = 0.3, 0.5
    return low, high


@pytest.mark.parametrize("channels", [1, 3, 40, 200])
@pytest.mark.parametrize("count", [2, 5, 32])
@pytest.mark.parametrize("seed", [0, 1])
def test_they_are_the_reference(channels: int, count: int, seed: int) -> None:
    low, high = ranges(channels, seed)
    found = channel_clusters(low, high, count)
    assert found.dtype == torch.uint8
    assert found.tolist() == reference_clusters(low.tolist(), high.tolist(), count)


def test_another_order_of_channels_finds_the_same() -> None:
    low, high = ranges(200, 2)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    found = channel_clusters(low, high, 16)
    assert torch.equal(channel_clusters(low[order], high[order], 16), found[order])


def test_outliers_stand_alone() -> None:
    low, high = -torch.rand(64), torch.rand(64)
    low[5], high[17] = -80, 70
    found = channel_clusters(low, high, 8).tolist()
    assert found.count(found[5]) == found.count(found[17]) == 1
    assert {found[5], found[17]} == {6, 7}  # the widest are the last


def test_extremes_of_clusters_contain_0() -> None:
    values = torch.tensor([[1.0, -2, 3, 4], [-1, -1, -3, 5]])
    clusters = torch.tensor([0, 0, 2, 0], dtype=torch.uint8)
    assert over_clusters(values, clusters, 3, "amin").tolist() == [[-2, 0, 0], [-1, 0, -3]]
    assert over_clusters(values, clusters, 3, "amax").tolist() == [[4, 0, 3], [5, 0, 0]]


def in_turn(x: np.ndarray, clusters: list[int], scheme: TensorScheme) -> np.ndarray:
    """Each cluster of each row (of all of them where static) rounded in a range of its own."""
    rounded = np.empty_like(x)
    rows = [slice(None)] if scheme.static else [slice(i, i + 1) for i in range(len(x))]
    for row in rows:
        for cluster in set(clusters):
            inside = [i for i, label in enumerate(clusters) if label == cluster]
            part = x[row][:, inside]
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            values = round_group(
                part.flatten().tolist(),
                scheme.bits,
                symmetric=scheme.symmetric,
                limits=(low, high),
            ).values
            rounded[row, inside] = np.array(values).reshape(part.shape)
    return rounded


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (4, False), (8, True)])
@pytest.mark.parametrize("given", [False, True])
def test_quantization_is_one_range_after_another(
    static: bool, bits: int, symmetric: bool, given: bool
) -> None:
    scheme = TensorScheme(
        bits=bits, symmetric=symmetric, granularity="cluster", clusters=6, static=static
    )
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 5, 24, generator=generator, dtype=torch.float64)
    x[..., 3] *= 40
    rows = x.flatten(0, 1)
    clusters = channel_clusters(rows.amin(dim=0), rows.amax(dim=0), 6)
    before = x.clone()
    found = fake_quantize_dynamic(x, scheme, clusters=clusters if given else None)
    assert torch.equal(x, before)
    expected = in_turn(rows.numpy(), clusters.tolist(), scheme).reshape(x.shape)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zeros_and_halves_are_what_they_were(dtype: torch.dtype) -> None:
    scheme = TensorScheme(bits=4, symmetric=False, granularity="cluster", clusters=3)
    x = torch.zeros(2, 7, dtype=dtype)
    x[0, 4] = 15
    x[1, 2] = -15
    clusters = torch.tensor([0, 0, 1, 1, 1, 2, 2], dtype=torch.uint8)
    found = fake_quantize_dynamic(x, scheme, clusters=clusters)
    assert found.dtype == dtype
    assert torch.equal(found, x)
