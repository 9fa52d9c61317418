"""QEP's correction is the least-squares weight on the quantized model's own input, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold.corrections import Qep
from bitfold.numerics import QuantizedTensor, TensorScheme, to_groups
from bitfold.ranges import MinMax
from bitfold.rounding import Gptaq, Gptq, Layer
from bitfold.statistics import InputStatistics

ROWS, COLUMNS, TOKENS = 10, 32, 500


def _case(bits: int, drift: float) -> tuple[Layer, InputStatistics, Tensor, Tensor]:
    """A weight; inputs x of the original and x̂ of the quantized model, which drifted from it."""
    generator = torch.Generator().manual_seed(bits)
    draw = {"generator": generator, "dtype": torch.float64}
    weight = torch.randn(ROWS, COLUMNS, **draw)
    original = torch.randn(TOKENS, COLUMNS, **draw) @ torch.randn(COLUMNS, COLUMNS, **draw)
    given = original + drift * torch.randn(TOKENS, COLUMNS, **draw) * original.std()
    statistics = InputStatistics(frozenset({"gram", "cross"}), TOKENS)
    statistics.update(given, original)
    scheme = TensorScheme(bits=bits, symmetric=False)
    return (
        Layer(weight, MinMax().limits(to_groups(weight, scheme), scheme), scheme),
        statistics,
        original,
        given,
    )


def test_before_rounding_it_is_least_squares() -> None:
    layer, statistics, original, given = _case(8, drift=0.5)
    target = (original @ layer.weight.T).numpy()
    expected = np.linalg.lstsq(given.numpy(), target, rcond=None)[0].T
    found = Qep(alpha=1, damping=1e-9).apply(layer.weight, layer.scheme, statistics)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_alpha_is_the_share_of_the_way(alpha: float) -> None:
    layer, statistics, _, _ = _case(8, drift=0.5)
    whole = Qep(alpha=1).apply(layer.weight, layer.scheme, statistics) - layer.weight
    part = Qep(alpha=alpha).apply(layer.weight, layer.scheme, statistics) - layer.weight
    torch.testing.assert_close(part, alpha * whole)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("drift", [0.3, 0.5])
def test_drift_that_outweighs_rounding_is_met_better_than_by_gptq(bits: int, drift: float) -> None:
    layer, statistics, original, given = _case(bits, drift)
    gptq = Gptq().solve({"w": layer}, torch.float64, statistics).tensors["w"]
    gptaq = Gptaq().solve({"w": layer}, torch.float64, statistics).tensors["w"]
    corrected = replace(layer, weight=Qep(alpha=1).apply(layer.weight, layer.scheme, statistics))
    qep = Gptq().solve({"w": corrected}, torch.float64, statistics).tensors["w"]

    def error(tensor: QuantizedTensor) -> float:
        difference = original @ layer.weight.T - given @ tensor.dequantize(torch.float64).T
        return float(difference.square().sum())

    assert error(qep) < error(gptq)
    assert error(gptaq) < error(gptq)


def test_without_drift_nothing_is_corrected() -> None:
    layer, statistics, _, _ = _case(3, drift=0.0)
    torch.testing.assert_close(Qep().apply(layer.weight, layer.scheme, statistics), layer.weight)
    found, gptq = (
        one.solve({"w": layer}, torch.float64, statistics).tensors["w"] for one in (Gptaq(), Gptq())
    )
    assert torch.equal(found.codes, gptq.codes)
