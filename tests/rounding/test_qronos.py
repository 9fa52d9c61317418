"""Qronos is its own definition: after every code all that is left is refitted by least squares; in float64."""

import numpy as np
import pytest
import torch

from bitfold.numerics import TensorScheme, to_groups
from bitfold.ranges import MinMax
from bitfold.rounding import Gptq, Layer, Nearest, Qronos
from bitfold.statistics import InputStatistics

ROWS, COLUMNS, TOKENS = 7, 24, 400


def _case(scheme: TensorScheme) -> tuple[Layer, InputStatistics, np.ndarray, np.ndarray]:
    """A weight; inputs of the original and, drifted from them, of the quantized model [tokens, columns]."""
    draw = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
    weight = torch.randn(ROWS, COLUMNS, **draw)
    original = torch.randn(TOKENS, COLUMNS, **draw) @ torch.randn(COLUMNS, COLUMNS, **draw)
    given = original + 0.2 * torch.randn(TOKENS, COLUMNS, **draw) * original.std()
    statistics = InputStatistics(frozenset({"gram", "cross"}), TOKENS)
    statistics.update(given, original)
    layer = Layer(weight, MinMax().limits(to_groups(weight, scheme), scheme), scheme)
    return layer, statistics, original.numpy(), given.numpy()


@pytest.mark.parametrize("order", ["activation", "none"])
@pytest.mark.parametrize(
    "scheme",
    [
        TensorScheme(bits=3, symmetric=False, granularity="group", group_size=8),
        TensorScheme(bits=4),
    ],
    ids=TensorScheme.describe,
)
def test_the_definition(scheme: TensorScheme, order: str) -> None:
    layer, statistics, original, given = _case(scheme)
    reference = Nearest().solve({"w": layer}, torch.float64).tensors["w"]
    width = COLUMNS // reference.scale.shape[1]
    weight = layer.weight.numpy()
    columns = list(range(COLUMNS))
    if order == "activation":
        columns.sort(key=lambda j: -float(statistics.gram[j, j]))
    target = weight @ original.T  # [rows, tokens]
    codes, values = np.zeros((ROWS, COLUMNS), int), weight.copy()

    def settle(column: int, wanted: np.ndarray) -> None:
        scale = reference.scale.numpy()[:, column // width]
        zero = (
            0 if reference.zero is None else reference.zero.numpy()[:, column // width].astype(int)
        )
        codes[:, column] = np.clip(np.round(wanted / scale + zero), scheme.qmin, scheme.qmax)
        values[:, column] = scale * (codes[:, column] - zero)

    first, left = columns[0], columns[1:]
    others = target - weight[:, left] @ given[:, left].T
    settle(first, others @ given[:, first] / (given[:, first] @ given[:, first]))
    while left:
        done = [c for c in columns if c not in left]
        rest = target - values[:, done] @ given[:, done].T
        fitted = np.linalg.lstsq(given[:, left], rest.T, rcond=None)[0].T
        settle(left[0], fitted[:, 0])
        left = left[1:]
    found = Qronos(damping=1e-10, order=order).solve({"w": layer}, torch.float64, statistics)
    assert np.array_equal(found.tensors["w"].codes.numpy().astype(int), codes)


def test_the_originals_output_is_met_better_than_by_gptq() -> None:
    layer, statistics, original, given = _case(TensorScheme(bits=4, symmetric=False))
    errors = []
    for rounding in (Gptq(), Qronos()):
        tensor = rounding.solve({"w": layer}, torch.float64, statistics).tensors["w"]
        output = given @ tensor.dequantize(torch.float64).numpy().T
        errors.append(float(((original @ layer.weight.numpy().T - output) ** 2).sum()))
    assert errors[1] < errors[0]
