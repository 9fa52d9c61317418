"""The columns of the largest inputs are kept, everything else is nearest's, and the bits are honest."""

import pytest
import torch
from torch import Tensor

from bitfold.numerics import QuantizedTensor, TensorScheme, to_groups
from bitfold.numerics.trainable_scale import dequantize_trainable
from bitfold.ranges import MinMax
from bitfold.rounding import Layer, Nearest, Salient
from bitfold.statistics import InputStatistics

ROWS, COLUMNS = 12, 64
SCHEME = TensorScheme(bits=3, symmetric=False, granularity="group", group_size=16)
BF16 = torch.bfloat16


def _solved(
    share: float, scheme: TensorScheme = SCHEME, seed: int = 0
) -> tuple[QuantizedTensor, QuantizedTensor, Tensor, Tensor]:
    """Rounded by salient and to nearest, the weight, and inputs of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    inputs = torch.randn(200, COLUMNS, generator=generator)
    inputs *= (1.5 * torch.randn(COLUMNS, generator=generator)).exp()
    statistics = InputStatistics(Salient.needs, 200)
    statistics.update(inputs)
    layers = {"w": Layer(weight, MinMax().limits(to_groups(weight, scheme), scheme), scheme)}
    kept = Salient(share=share).solve(layers, BF16, statistics).tensors["w"]
    return kept, Nearest().solve(layers, BF16).tensors["w"], weight, inputs


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.05, 3), (0.5, 32)])
@pytest.mark.parametrize(
    "scheme", [SCHEME, TensorScheme(grid="nf4", bits=4)], ids=TensorScheme.describe
)
def test_the_reference(share: float, count: int, scheme: TensorScheme) -> None:
    found, nearest, weight, inputs = _solved(share, scheme)
    means = [float(inputs[:, column].abs().mean()) for column in range(COLUMNS)]
    largest = sorted(range(COLUMNS), key=lambda column: -means[column])[:count]
    assert found.columns is not None
    assert found.columns.tolist() == sorted(largest)
    expected = nearest.dequantize()
    for column in largest:
        expected[:, column] = weight[:, column].bfloat16().float()
    assert torch.equal(found.dequantize(), expected)
    assert found.bits == nearest.bits + count * (ROWS * 16 + 32)


def test_the_output_is_nearer_than_nearest() -> None:
    """In expectation: over many weights and inputs, and in nearly all of them."""
    errors = []
    for seed in range(30):
        found, nearest, weight, inputs = _solved(0.05, seed=seed)
        errors.append(
            [float((inputs @ (t.dequantize() - weight).T).square().sum()) for t in (found, nearest)]
        )
    mine, theirs = torch.tensor(errors).unbind(1)
    assert mine.sum() < 0.6 * theirs.sum()
    assert (mine <= theirs).sum() >= 29


def test_what_is_kept_has_no_part_in_the_scales() -> None:
    tensor = _solved(0.05)[0]
    assert tensor.columns is not None
    scale = tensor.scale.float().requires_grad_()
    position = tensor.codes.float().requires_grad_()
    values = dequantize_trainable(tensor, scale, torch.float32, torch.float32, position)
    assert torch.equal(values, tensor.dequantize())
    values[:, tensor.columns.long()].sum().backward()
    assert scale.grad is not None
    assert position.grad is not None
    assert not scale.grad.any()
    assert not position.grad.any()
