"""QEP's correction is the least-squares weight on the quantized model's own input, in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold.numerics import TensorScheme, to_groups
from bitfold.ranges import MinMax
from bitfold.rounding import Gptq, Layer, Qep
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
    found = Qep(alpha=1, damping=1e-9).corrected(layer.weight, statistics)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_alpha_is_the_share_of_the_way(alpha: float) -> None:
    layer, statistics, _, _ = _case(8, drift=0.5)
    whole = Qep(alpha=1).corrected(layer.weight, statistics) - layer.weight
    part = Qep(alpha=alpha).corrected(layer.weight, statistics) - layer.weight
    torch.testing.assert_close(part, alpha * whole)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("drift", [0.3, 0.5])
def test_drift_that_outweighs_rounding_is_met_better_than_by_gptq(bits: int, drift: float) -> None:
    layer, statistics, original, given = _case(bits, drift)
    errors = []
    for rounding in (Gptq(), Qep(alpha=1)):
        tensor = rounding.solve({"w": layer}, torch.float64, statistics).tensors["w"]
        difference = original @ layer.weight.T - given @ tensor.dequantize(torch.float64).T
        errors.append(float(difference.square().sum()))
    assert errors[1] < errors[0]


def test_without_drift_it_is_gptq() -> None:
    layer, statistics, _, _ = _case(3, drift=0.0)
    found, gptq = (
        one.solve({"w": layer}, torch.float64, statistics).tensors["w"] for one in (Qep(), Gptq())
    )
    assert torch.equal(found.codes, gptq.codes)
