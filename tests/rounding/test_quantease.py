"""QuantEase is coordinate descent: the textbook's loop in float64, and no turn makes a row worse."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold.numerics import QuantizedTensor, TensorScheme, to_groups
from bitfold.ranges import MinMax
from bitfold.rounding import Gptq, Layer, Nearest, Quantease, quantease
from bitfold.rounding.gptq import moment_root
from bitfold.rounding.quantease import _with_codes, _with_scales, refined
from bitfold.statistics import InputStatistics

ROWS, COLUMNS = 10, 32
SCHEMES = [
    TensorScheme(bits=3, symmetric=False, granularity="group", group_size=16),
    TensorScheme(bits=2, symmetric=False),
    TensorScheme(bits=4, symmetric=True),
    TensorScheme(bits=4, granularity="tensor"),
    TensorScheme(grid="nf4", bits=4, granularity="group", group_size=16),
    TensorScheme(grid="fp8_e4m3"),
    TensorScheme(grid="mxfp4", bits=4, granularity="group", group_size=32),
    TensorScheme(grid="nvfp4", bits=4, granularity="group", group_size=16),
]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=TensorScheme.describe)


def _problem(scheme: TensorScheme, seed: int = 0) -> tuple[Layer, InputStatistics]:
    """A weight and correlated inputs, both float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    inputs = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(6, COLUMNS, generator=generator, dtype=torch.float64)
    inputs += 0.3 * torch.randn(300, COLUMNS, generator=generator, dtype=torch.float64)
    statistics = InputStatistics(frozenset({"gram"}), 300)
    statistics.update(inputs)
    return Layer(weight, MinMax().limits(to_groups(weight, scheme), scheme), scheme), statistics


def _errors(weight: Tensor, tensor: QuantizedTensor, moment: Tensor) -> Tensor:
    difference = weight - tensor.dequantize(torch.float64)
    return torch.einsum("oi,ij,oj->o", difference, moment, difference)


def _damped(statistics: InputStatistics) -> Tensor:
    gram = statistics.gram
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


@by_scheme
@pytest.mark.parametrize("seed", [0, 1])
def test_no_row_is_worse_than_gptq_and_the_whole_is_better(scheme: TensorScheme, seed: int) -> None:
    layer, statistics = _problem(scheme, seed)
    made = [
        rounding.solve({"a": layer}, torch.float64, statistics).tensors["a"]
        for rounding in (Gptq(), Quantease(rounds=1), Quantease())
    ]
    gptq, one, four = (_errors(layer.weight, tensor, _damped(statistics)) for tensor in made)
    assert (one <= gptq * (1 + 1e-9)).all()
    assert (four <= one * (1 + 1e-9)).all()
    if (
        scheme.granularity != "tensor"
    ):  # of few columns and one scale GPTQ's codes may be a local optimum already
        assert one.sum() < 0.99 * gptq.sum()
    codes = made[2].codes
    if scheme.grid == "int":
        assert scheme.qmin <= int(codes.min()) <= int(codes.max()) <= scheme.qmax
    assert made[2].zero is None or torch.equal(made[2].zero, made[0].zero)


@pytest.mark.parametrize("block", [1, 5, 32])
@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=TensorScheme.describe)
def test_codes_are_those_of_plain_coordinate_descent(scheme: TensorScheme, block: int) -> None:
    """With scales that stay: for every column all codes are tried, and the whole error is computed anew for each."""
    layer, statistics = _problem(scheme)
    moment = _damped(statistics)
    begun = Nearest().solve({"a": layer}, torch.float64).tensors["a"]
    steps = begun.scale.expand(ROWS, -1).numpy()
    zeros = np.zeros_like(steps) if begun.zero is None else begun.zero.expand(ROWS, -1).numpy()
    codes, weight, h = begun.codes.numpy().astype(int), layer.weight.numpy(), moment.numpy()
    order = [
        int(j) for j in torch.argsort(statistics.gram.diagonal(), descending=True, stable=True)
    ]
    width = COLUMNS // steps.shape[1]
    group = np.arange(COLUMNS) // width
    every = np.arange(scheme.qmin, scheme.qmax + 1)
    for row in range(ROWS):
        for j in order:
            tried = np.repeat(codes[row][None], len(every), axis=0)
            tried[:, j] = every
            d = weight[row] - steps[row][group] * (tried - zeros[row][group])
            codes[row, j] = every[np.argmin(np.einsum("ki,ij,kj->k", d, h, d))]
    found = _with_codes(begun, layer.weight, moment, torch.tensor(order).split(block))
    assert np.array_equal(found.codes.numpy(), codes)


def test_scales_are_each_the_best_while_the_others_stay() -> None:
    """The last group's scale is the least-squares one: moving it a little either way is worse."""
    scheme = SCHEMES[0]
    layer, statistics = _problem(scheme)
    moment = _damped(statistics)
    begun = Nearest().solve({"a": layer}, torch.float64).tensors["a"]
    moved = _with_scales(begun, layer.weight, moment, torch.float64)
    least = _errors(layer.weight, moved, moment)
    assert (least <= _errors(layer.weight, begun, moment) * (1 + 1e-12)).all()
    for factor in (0.999, 1.001):
        scale = moved.scale.clone()
        scale[:, -1] *= factor
        assert (_errors(layer.weight, replace(moved, scale=scale), moment) > least).all()


def test_what_is_stored_is_what_was_decided_about() -> None:
    """Scales come out in the dtype of storage, and the error is of those."""
    layer, statistics = _problem(SCHEMES[1])
    tensor = Quantease().solve({"a": layer}, torch.bfloat16, statistics).tensors["a"]
    assert tensor.scale.dtype == torch.bfloat16
    gptq = Gptq().solve({"a": layer}, torch.bfloat16, statistics).tensors["a"]
    moment = _damped(statistics)
    before, after = (_errors(layer.weight, one, moment) for one in (gptq, tensor))
    assert (after <= before * (1 + 1e-9)).all()
    assert after.sum() < before.sum()


def test_no_rounds_are_gptq() -> None:
    layer, statistics = _problem(SCHEMES[0])
    gptq, none = (
        rounding.solve({"a": layer}, torch.float64, statistics).tensors["a"]
        for rounding in (Gptq(), Quantease(rounds=0))
    )
    assert torch.equal(gptq.codes, none.codes)
    assert torch.equal(gptq.scale, none.scale)


def test_a_weight_of_zeros_stays_and_rows_do_not_depend_on_each_other() -> None:
    scheme = SCHEMES[0]
    layer, statistics = _problem(scheme)
    factor = moment_root(statistics.gram, 0.01, by_activation=True)

    def found(weight: Tensor) -> QuantizedTensor:
        limits = MinMax().limits(to_groups(weight, scheme), scheme)
        begun = Nearest().solve({"a": Layer(weight, limits, scheme)}, torch.float64).tensors["a"]
        return refined(begun, weight, factor.moment, factor.order.split(8), torch.float64, 3)

    assert not found(torch.zeros_like(layer.weight)).dequantize(torch.float64).any()
    every = found(layer.weight).dequantize(torch.float64)
    for row in range(ROWS):
        alone = found(layer.weight[row : row + 1]).dequantize(torch.float64)
        torch.testing.assert_close(alone[0], every[row])


def test_scales_as_they_are_stored_make_no_row_worse() -> None:
    """Scales of eight bits of mantissa come to rest beside the best ones."""
    layer, statistics = _problem(SCHEMES[0])
    moment = _damped(statistics)
    tensor = Gptq().solve({"a": layer}, torch.bfloat16, statistics).tensors["a"]
    errors = [_errors(layer.weight, tensor, moment)]
    for _ in range(10):
        tensor = _with_scales(tensor, layer.weight, moment, torch.bfloat16)
        errors.append(_errors(layer.weight, tensor, moment))
        assert (errors[-1] <= errors[-2] * (1 + 1e-12)).all()
    assert errors[-1].sum() < errors[0].sum()


def test_it_stops_once_a_turn_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, statistics = _problem(SCHEMES[0])
    turns = 0
    real = quantease._with_codes

    def counted(*arguments: Any) -> QuantizedTensor:
        nonlocal turns
        turns += 1
        return real(*arguments)

    monkeypatch.setattr(quantease, "_with_codes", counted)
    Quantease(rounds=1000).solve({"a": layer}, torch.bfloat16, statistics)
    assert 1 < turns < 1000
