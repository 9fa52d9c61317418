"""SignRound: gradients are the formulas, codes stay next to nearest's, the loss never ends above where it began."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics import TensorScheme, fake_quantize, scale_and_zero, to_groups
from bitfold.ranges import MinMax
from bitfold.rounding import BlockLoss, Layer, Nearest, Signround
from bitfold.rounding.signround import _Rounded

ASYMMETRIC = TensorScheme(bits=3, symmetric=False, granularity="group", group_size=16)
SYMMETRIC = TensorScheme(bits=3, symmetric=True)
SCHEMES = pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC], ids=TensorScheme.describe)


def _layer(scheme: TensorScheme) -> Layer:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(4))
    return Layer(weight, MinMax().limits(to_groups(weight, scheme), scheme), scheme)


def _problem(layer: Layer, spoil_after: int | None = None) -> BlockLoss:
    """The layer's output error on inputs of low rank; NaN from one call on."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(16, 12, 6, generator=generator) @ torch.randn(6, 32, generator=generator)
    calls = [0]

    def loss(weights: dict[str, Tensor], windows: Tensor, low: bool) -> Tensor:
        calls[0] += 1
        x = inputs[windows]
        value = (x @ (weights["w"] - layer.weight).T).square().mean() / (
            x @ layer.weight.T
        ).square().mean()
        spoiled = spoil_after is not None and calls[0] > spoil_after
        return value * torch.nan if spoiled else value

    return BlockLoss(loss, 16, 0, lambda done, total, what: None)


@SCHEMES
def test_without_offset_it_is_fake_quantization(scheme: TensorScheme) -> None:
    layer = _layer(scheme)
    groups = to_groups(layer.weight, scheme)
    expected = fake_quantize(groups, *scale_and_zero(*layer.limits, scheme), scheme)
    found = _Rounded.apply(groups, torch.zeros_like(groups), *layer.limits, scheme)
    torch.testing.assert_close(found, expected)


@SCHEMES
def test_gradients_are_the_formulas(scheme: TensorScheme) -> None:
    torch.manual_seed(0)
    groups = torch.randn(5, 1, 16, dtype=torch.float64)
    offset = (torch.rand_like(groups) - 0.5).requires_grad_()
    low = (groups.amin(-1, keepdim=True) * 0.6).requires_grad_()
    high = (groups.amax(-1, keepdim=True) * 0.5).requires_grad_()
    gradient = torch.randn_like(groups)
    _Rounded.apply(groups, offset, low, high, scheme).backward(gradient)
    steps = scheme.qmax - scheme.qmin
    for row in range(5):
        lo, hi = low[row].item(), high[row].item()
        scale = 2 * max(-lo, hi) / steps if scheme.symmetric else (hi - lo) / steps
        zero = 0 if scheme.symmetric else scheme.qmin - round(lo / scale)
        on_low = on_high = 0.0
        for column in range(16):
            g, w = float(gradient[row, 0, column]), float(groups[row, 0, column])
            u = w / scale + zero + offset[row, 0, column].item()
            inside = scheme.qmin - 0.5 <= u <= scheme.qmax + 0.5
            expected = g * scale if inside else 0.0
            assert float(offset.grad[row, 0, column]) == pytest.approx(expected)
            if inside:
                code = min(max(round(u), scheme.qmin), scheme.qmax)
                slope = (
                    code - zero
                ) - w / scale  # of s (q − z) in s, the rounding passed straight through
                on_low, on_high = on_low - slope * g / steps, on_high + slope * g / steps
            elif u > scheme.qmax:
                on_high += g
            else:
                on_low += g
        if scheme.symmetric:
            both = on_high - on_low
            on_low, on_high = (-both, 0.0) if -lo > hi else (0.0, both)
        assert float(low.grad[row]) == pytest.approx(on_low)
        assert float(high.grad[row]) == pytest.approx(on_high)


@SCHEMES
def test_the_loss_falls_far_below_nearests(scheme: TensorScheme) -> None:
    layer = _layer(scheme)
    block = _problem(layer)
    everything = torch.arange(16)
    nearest = Nearest().solve({"w": layer}, torch.float32).tensors["w"]
    found = Signround(steps=200, batch=8).solve_block({"w": layer}, torch.float32, block)
    before, after = (
        float(block.loss({"w": tensor.dequantize()}, everything, False))
        for tensor in (nearest, found.tensors["w"])
    )
    assert after < 0.5 * before


@SCHEMES
def test_without_clipping_codes_are_those_next_to_nearest(scheme: TensorScheme) -> None:
    layer = _layer(scheme)
    nearest = Nearest().solve({"w": layer}, torch.float32).tensors["w"]
    options = Signround(steps=50, batch=8, clipping=False)
    found = options.solve_block({"w": layer}, torch.float32, _problem(layer)).tensors["w"]
    assert torch.equal(found.scale, nearest.scale)
    difference = (found.codes.int() - nearest.codes.int()).abs()
    assert difference.max() == 1


def test_a_loss_that_is_not_finite_keeps_the_best_and_says_so() -> None:
    layer = _layer(ASYMMETRIC)
    found = Signround(steps=50, batch=8).solve_block(
        {"w": layer}, torch.float32, _problem(layer, 30)
    )
    assert any("not finite" in note for note in found.notes)
    assert torch.isfinite(found.tensors["w"].dequantize()).all()


def test_the_same_seed_gives_the_same_codes() -> None:
    layer = _layer(ASYMMETRIC)
    codes = [
        Signround(steps=20)
        .solve_block({"w": layer}, torch.float32, _problem(layer))
        .tensors["w"]
        .codes
        for _ in range(2)
    ]
    assert torch.equal(*codes)


def test_other_grids_are_refused_by_name() -> None:
    layer = _layer(ASYMMETRIC)
    mxfp4 = TensorScheme(grid="mxfp4", bits=4, granularity="group", group_size=32)
    for scheme in (TensorScheme(grid="fp8_e4m3"), mxfp4):
        other = Layer(layer.weight, layer.limits, scheme)
        with pytest.raises(RecipeError, match=f"down_proj has the grid {scheme.grid}"):
            Signround().solve_block({"mlp.down_proj": other}, torch.float32, _problem(layer))


def test_half_precision_is_not_tried_where_it_is_slow() -> None:
    layer = _layer(ASYMMETRIC)
    block = _problem(layer)
    lows: list[bool] = []

    def loss(weights: Mapping[str, Tensor], windows: Tensor, low: bool) -> Tensor:
        lows.append(low)
        return block.loss(weights, windows, low)

    Signround(steps=4).solve_block(
        {"w": layer}, torch.float32, replace(block, loss=loss, low_is_quick=False)
    )
    assert lows
    assert not any(lows)
