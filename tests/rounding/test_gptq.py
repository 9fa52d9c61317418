"""GPTQ is the textbook's, in float64; it never does worse than nearest on its own objective, row by row."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold.numerics import QuantizedTensor, TensorScheme, scale_and_zero, to_groups
from bitfold.numerics.quantize import NF4_LEVELS
from bitfold.ranges import MinMax
from bitfold.rounding import Gptq, Layer, Nearest
from bitfold.rounding.gptq import moment_root, rounded_in_order
from reference import minifloats

SCHEMES = [
    TensorScheme(bits=3, symmetric=False, granularity="group", group_size=16),
    TensorScheme(bits=4, symmetric=True),
    TensorScheme(bits=2, symmetric=False),
    TensorScheme(bits=8, granularity="tensor"),
]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=TensorScheme.describe)
OTHERS = [
    TensorScheme(grid="nf4", bits=4, granularity="group", group_size=16),
    TensorScheme(grid="fp8_e4m3"),
    TensorScheme(grid="mxfp4", bits=4, granularity="group", group_size=32),
    TensorScheme(grid="nvfp4", bits=4, granularity="group", group_size=16),
]
by_every_scheme = pytest.mark.parametrize("scheme", SCHEMES + OTHERS, ids=TensorScheme.describe)
ROWS, COLUMNS = 12, 64
# The values that codes of the other grids stand for, times their scale.
LEVELS = {
    "nf4": NF4_LEVELS,
    "fp8_e4m3": [sign * x for sign in (1, -1) for x in minifloats(4, 3, bias=7, count=127)],
    "mxfp4": [sign * x for sign in (1, -1) for x in minifloats(2, 1, bias=1, count=8)],
}
LEVELS["nvfp4"] = LEVELS["mxfp4"]


def _layer(scheme: TensorScheme, seed: int = 0) -> tuple[Layer, Tensor]:
    """A weight and a second moment of strongly correlated inputs, both float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, 8, generator=generator, dtype=torch.float64) @ mixing[:8]
    inputs += 0.3 * torch.randn(400, COLUMNS, generator=generator, dtype=torch.float64)
    limits = MinMax().limits(to_groups(weight, scheme), scheme)
    return Layer(weight, limits, scheme), inputs.T @ inputs / 400


def _errors(weight: Tensor, tensor: QuantizedTensor, gram: Tensor) -> Tensor:
    difference = weight - tensor.dequantize(torch.float64)
    return ((difference @ gram) * difference).sum(dim=1)


def _textbook(layer: Layer, gram: np.ndarray, damping: float, order: list[int]) -> np.ndarray:
    """Optimal brain quantization in a fixed order with the inverse of what is left formed anew for every column."""
    weight = layer.weight.numpy().copy()
    scheme = layer.scheme
    scale, zero = (
        None if one is None else one.flatten(1).numpy()
        for one in scale_and_zero(*layer.limits, scheme, torch.float64)
    )
    assert scale is not None
    width = weight.shape[1] // scale.shape[1]
    damped = gram + damping * np.diag(gram).mean() * np.eye(len(gram))
    values = np.zeros(weight.shape)
    left = list(order)
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        column = left[0]
        step = scale[:, column // width]
        if scheme.grid == "int":
            z = 0 if zero is None else zero[:, column // width]
            code = np.clip(np.round(weight[:, column] / step + z), scheme.qmin, scheme.qmax)
            values[:, column] = step * (code - z)
        else:
            stood_for = np.outer(step, LEVELS[scheme.grid])
            nearest = np.abs(stood_for - weight[:, [column]]).argmin(axis=1)
            values[:, column] = stood_for[np.arange(len(stood_for)), nearest]
        error = (weight[:, column] - values[:, column]) / inverse[0, 0]
        weight[:, left[1:]] -= np.outer(error, inverse[0, 1:])
        left = left[1:]
    return values


@by_every_scheme
@pytest.mark.parametrize("order", ["activation", "none"])
@pytest.mark.parametrize("block", [5, 128])
def test_the_textbook(scheme: TensorScheme, order: str, block: int) -> None:
    layer, gram = _layer(scheme)
    factor = moment_root(gram, 0.01, by_activation=order == "activation")
    found = rounded_in_order(layer, torch.float64, factor, block)
    columns = list(range(COLUMNS))
    if order == "activation":
        columns.sort(key=lambda j: -float(gram[j, j]))
    expected = _textbook(layer, gram.numpy(), 0.01, columns)
    assert np.allclose(found.dequantize(torch.float64).numpy(), expected, rtol=1e-12, atol=1e-12)


@by_every_scheme
@pytest.mark.parametrize("seed", range(3))
def test_no_row_is_worse_than_nearest(scheme: TensorScheme, seed: int) -> None:
    layer, gram = _layer(scheme, seed)
    nearest = Nearest().solve({"w": layer}, torch.float64).tensors["w"]
    found = Gptq().solve_with({"w": layer}, torch.float64, gram).tensors["w"]
    before, after = (_errors(layer.weight, tensor, gram) for tensor in (nearest, found))
    assert (after <= before + 1e-12).all()
    if scheme.bits < 8:
        assert float(after.sum()) < 0.8 * float(before.sum())


@by_every_scheme
def test_with_a_diagonal_second_moment_it_is_nearest(scheme: TensorScheme) -> None:
    layer, _ = _layer(scheme)
    gram = torch.diag(torch.rand(COLUMNS, dtype=torch.float64) + 0.1)
    gram[7, 7] = gram[30, 30] = 0  # no input reaches these columns
    nearest = Nearest().solve({"w": layer}, torch.float64).tensors["w"]
    found = Gptq(keep_better=False).solve_with({"w": layer}, torch.float64, gram).tensors["w"]
    assert torch.equal(found.codes, nearest.codes)


def test_layers_that_share_an_input_are_solved_as_alone() -> None:
    (first, gram), (second, _) = _layer(SCHEMES[0]), _layer(SCHEMES[1], seed=5)
    together = Gptq().solve_with({"a": first, "b": second}, torch.float64, gram).tensors
    for name, layer in (("a", first), ("b", second)):
        alone = Gptq().solve_with({name: layer}, torch.float64, gram).tensors[name]
        assert torch.equal(together[name].codes, alone.codes)


def test_a_singular_second_moment_is_damped_more_and_says_so() -> None:
    layer, _ = _layer(SCHEMES[1])
    inputs = torch.randn(2, COLUMNS)
    gram = 1e6 * inputs.T @ inputs  # of rank 2, in float32
    found = Gptq(damping=1e-12).solve_with({"q_proj": layer}, torch.float32, gram)
    assert torch.isfinite(found.tensors["q_proj"].dequantize()).all()
    assert len(found.notes) == 1
    assert "q_proj" in found.notes[0]
    assert "damped" in found.notes[0]


def test_inputs_that_are_all_zero() -> None:
    layer, _ = _layer(SCHEMES[0])
    nearest = Nearest().solve({"w": layer}, torch.float64).tensors["w"]
    found = Gptq().solve_with({"w": layer}, torch.float64, torch.zeros(COLUMNS, COLUMNS).double())
    assert torch.equal(found.tensors["w"].codes, nearest.codes)
