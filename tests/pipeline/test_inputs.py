"""What is calibrated of inputs: against the mathematics, cluster by cluster."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bitfold.models.llama import LLAMA
from bitfold.numerics import Scheme, TensorScheme, channel_clusters
from bitfold.pipeline.inputs import input_quantizers
from bitfold.ranges import RANGES, MinMax
from bitfold.statistics import InputStatistics
from reference import round_group

LAST = "mlp.down_proj"


def stream() -> Tensor:
    x = torch.randn(5000, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 3] *= 50
    x[:, 8:14] *= torch.tensor([9.0, 9.1, 9.2, -20, 21, 22], dtype=torch.float64)
    x[:, 20:30] = x[:, 20:30].abs()
    x[1, 0] = 400  # what a sample of rows does not see
    return x


def measured(x: Tensor) -> InputStatistics:
    statistics = InputStatistics(frozenset({"rows", "channels"}), len(x))
    statistics.update(x)
    return statistics


def activation(**fields: Any) -> TensorScheme:
    return TensorScheme(**{"bits": 4, "symmetric": False, "static": True} | fields)


@pytest.mark.parametrize("clusters", [None, 6])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_static_range_is_that_of_the_clusters_values(
    clusters: int | None, symmetric: bool
) -> None:
    granularity = "tensor" if clusters is None else "cluster"
    scheme = activation(clusters=clusters, granularity=granularity, symmetric=symmetric)
    x = stream()
    found = input_quantizers(
        {LAST: Scheme(activation=scheme)}, LLAMA, {LAST: measured(x)}, MinMax(), torch.float32
    )[LAST]
    labels = torch.zeros(40, dtype=torch.uint8)
    if clusters is None:
        assert found.clusters is None
    else:
        labels = channel_clusters(x.amin(dim=0), x.amax(dim=0), clusters)
        assert torch.equal(found.clusters, labels)
    assert found.scale.shape == (clusters or 1,)
    assert found.scale.dtype == torch.float32
    for cluster in labels.unique().tolist():
        exact = round_group(x[:, labels == cluster].flatten().tolist(), 4, symmetric=symmetric)
        assert float(found.scale[cluster]) == pytest.approx(exact.scale, rel=1e-6)
        assert symmetric or int(found.zero[cluster]) == exact.zero
    assert (found.zero is None) == symmetric


def test_a_range_by_error_is_found_in_each_cluster() -> None:
    """The least squared error of the sample, with the extremes of the whole in it."""
    scheme = activation(clusters=6, granularity="cluster")
    x, mse = stream(), RANGES["mse"]()
    statistics = measured(x)
    by_mse = input_quantizers(
        {LAST: Scheme(activation=scheme)}, LLAMA, {LAST: statistics}, mse, torch.float64
    )[LAST]
    by_minmax = input_quantizers(
        {LAST: Scheme(activation=scheme)}, LLAMA, {LAST: statistics}, MinMax(), torch.float64
    )[LAST]
    rows = statistics.rows
    errors = [(quantizer(rows) - rows).square().sum(dim=0) for quantizer in (by_mse, by_minmax)]
    for cluster in by_mse.clusters.unique().tolist():
        inside = by_mse.clusters == cluster
        assert errors[0][inside].sum() <= errors[1][inside].sum()
    assert errors[0].sum() < 0.8 * errors[1].sum()


def test_fewer_ranges_than_clusters() -> None:
    """What no channel is in has a scale all the same, and it is a number."""
    x = torch.ones(10, 40, dtype=torch.float64)
    scheme = activation(clusters=6, granularity="cluster")
    found = input_quantizers(
        {LAST: Scheme(activation=scheme)}, LLAMA, {LAST: measured(x)}, MinMax(), torch.float16
    )[LAST]
    assert (found.scale > 0).all()
    assert torch.equal(found(x), x)


def test_layers_of_one_input_share_what_is_found() -> None:
    clusters = Scheme(activation=activation(clusters=6, granularity="cluster", static=False))
    plain = Scheme(activation=TensorScheme(granularity="token"))
    names = LLAMA.inputs[0]
    schemes = {names[0]: clusters, names[1]: clusters, names[2]: plain, LAST: Scheme()}
    found = input_quantizers(
        schemes, LLAMA, {names[0]: measured(stream())}, MinMax(), torch.float32
    )
    assert found[names[0]] is found[names[1]]
    assert found[names[0]].scale is None
    assert found[names[0]].clusters is not None
    assert found[names[2]].clusters is None
    assert LAST not in found
