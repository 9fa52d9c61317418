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
        {LAST: Scheme(activation=scheme)}, LLAMA, {LAST: measured(x)}, {}, MinMax(), torch.float32
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
        {LAST: Scheme(activation=scheme)}, LLAMA, {LAST: statistics}, {}, mse, torch.float64
    )[LAST]
    by_minmax = input_quantizers(
        {LAST: Scheme(activation=scheme)}, LLAMA, {LAST: statistics}, {}, MinMax(), torch.float64
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
        {LAST: Scheme(activation=scheme)}, LLAMA, {LAST: measured(x)}, {}, MinMax(), torch.float16
    )[LAST]
    assert (found.scale > 0).all()
    assert torch.equal(found(x), x)


def test_layers_of_one_input_share_what_is_found() -> None:
    clusters = Scheme(activation=activation(clusters=6, granularity="cluster", static=False))
    plain = Scheme(activation=TensorScheme(granularity="token"))
    names = LLAMA.inputs[0]
    schemes = {names[0]: clusters, names[1]: clusters, names[2]: plain, LAST: Scheme()}
    found = input_quantizers(
        schemes, LLAMA, {names[0]: measured(stream())}, {}, MinMax(), torch.float32
    )
    assert found[names[0]] is found[names[1]]
    assert found[names[0]].scale is None
    assert found[names[0]].clusters is not None
    assert found[names[2]].clusters is None
    assert LAST not in found


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_clipped_range_is_the_share_of_least_output_error(bits: int) -> None:
    """Of all shares that are tried, on the outputs of all that read the input; of 8 bits it clips nothing."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 40, dtype=torch.float64, generator=generator)
    names = LLAMA.inputs[0]
    weights = {
        f"{name}.weight": torch.randn(6, 40, dtype=torch.float64, generator=generator)
        for name in names
    }
    scheme = TensorScheme(bits=bits, symmetric=False, granularity="token", clipped=True)
    found = input_quantizers(
        dict.fromkeys(names, Scheme(activation=scheme)),
        LLAMA,
        {names[0]: measured(x)},
        weights,
        MinMax(),
        torch.float64,
    )
    assert found[names[0]] is found[names[1]]
    share = found[names[0]].scale
    assert share is not None

    def error(quantized: torch.Tensor) -> float:
        outputs = [(quantized - x) @ weight.T for weight in weights.values()]
        return float(sum(output.square().sum() for output in outputs))

    def clipped_to(share: float) -> torch.Tensor:
        low, high = share * x.amin(dim=1, keepdim=True), share * x.amax(dim=1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        zero = torch.round(scheme.qmin - low / step)
        codes = torch.clamp(torch.round(x / step + zero), scheme.qmin, scheme.qmax)
        return step * (codes - zero)

    tried = [1 - 0.02 * step for step in range(26)]
    best = min(tried, key=lambda one: error(clipped_to(one)))
    assert float(share) == pytest.approx(best)
    assert torch.allclose(found[names[0]](x), clipped_to(best), atol=1e-9)
    assert (best < 1) == (bits < 8)
