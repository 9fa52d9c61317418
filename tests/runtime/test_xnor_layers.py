"""Layers of signs against the same product in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.runtime.xnor_layers import XnorConv2d, XnorLinear, filter_scale


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).double()


def close(found: Tensor, wanted: Tensor) -> bool:
    """As far as float32 goes, of what is added up."""
    return bool(((found - wanted).abs() <= 1e-6 * (wanted.abs() + 1)).all())


@pytest.mark.parametrize("scaled_input", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(scaled: bool, scaled_input: bool, biased: bool) -> None:
    weight, x = random(70, 130), random(2, 3, 130, seed=1)
    x[0, 0] = 0
    bias = random(70, seed=2) if biased else None
    scale = filter_scale(weight) if scaled else None
    wanted = sign(x) @ sign(weight).T
    if scaled:
        wanted = wanted * weight.double().abs().mean(dim=1)
    if scaled_input:
        wanted = wanted * x.double().abs().mean(dim=-1, keepdim=True)
    if bias is not None:
        wanted = wanted + bias
    layer = XnorLinear(weight, bias, scale=scale, scaled_input=scaled_input)
    assert close(layer(x), wanted)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x[:0]).shape == (0, 3, 70)


@pytest.mark.parametrize("scaled_input", [False, True])
@pytest.mark.parametrize(
    ("channels", "kernel", "options"),
    [
        (3, (3, 3), {}),
        (64, (3, 3), {"padding": 1}),
        (70, (1, 1), {}),
        (1, (5, 3), {"padding": (2, 0), "stride": 2}),
        (20, (3, 3), {"padding": 2, "dilation": 2, "stride": (2, 1)}),
        (5, (2, 3), {"padding": "same"}),
        (5, (3, 3), {"padding": "valid"}),
    ],
)
def test_conv(
    channels: int, kernel: tuple[int, int], options: dict[str, object], scaled_input: bool
) -> None:
    weight, x = random(10, channels, *kernel), random(2, channels, 9, 8, seed=1)
    bias, scale = random(10, seed=2), filter_scale(weight)
    # Not by calling sign on a padded input: what pads is 0.
    wanted = F.conv2d(sign(x), sign(weight), **options)
    wanted = wanted * weight.double().abs().mean(dim=(1, 2, 3))[:, None, None]
    if scaled_input:
        box = torch.full((1, 1, *kernel), 1 / (kernel[0] * kernel[1]), dtype=torch.float64)
        wanted = wanted * F.conv2d(x.double().abs().mean(dim=1, keepdim=True), box, **options)
    wanted = wanted + bias[:, None, None]
    layer = XnorConv2d(weight, bias, scale=scale, scaled_input=scaled_input, **options)
    assert close(layer(x), wanted)
    # Another size, after what the first one's padding adds is known.
    other = random(1, channels, 7, 11, seed=3)
    plain = XnorConv2d(weight, **options)
    assert close(plain(x), F.conv2d(sign(x), sign(weight), **options))
    assert close(plain(other), F.conv2d(sign(other), sign(weight), **options))


def test_what_is_loaded_is_what_runs() -> None:
    """Also after the first forward pass has arranged another weight."""
    x = random(4, 65)
    first, second = (XnorLinear(random(9, 65, seed=seed)) for seed in (1, 2))
    wanted = second(x)
    assert not torch.equal(first(x), wanted)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), wanted)
    assert torch.equal(copy.deepcopy(first)(x), wanted)


def test_bits_are_what_is_stored() -> None:
    state = XnorLinear(random(128, 1024), scale=torch.ones(128)).state_dict()
    assert state["words"].numel() * 64 == 128 * 1024
    assert sorted(state) == ["scale", "words"]


def test_what_cannot_be() -> None:
    with pytest.raises(RecipeError, match="one for each channel"):
        XnorLinear(random(3, 4), scale=torch.ones(2))
    with pytest.raises(RecipeError, match="4 features"):
        XnorLinear(random(3, 4))(random(2, 5))
    with pytest.raises(RecipeError, match=r"\[out, in, height, width\]"):
        XnorConv2d(random(3, 4))
    with pytest.raises(RecipeError, match="'some'"):
        XnorConv2d(random(3, 4, 1, 1), padding="some")
    with pytest.raises(RecipeError, match="smaller than"):
        XnorConv2d(random(3, 4, 3, 3))(random(1, 4, 2, 9))
    with pytest.raises(RecipeError, match="4 channels"):
        XnorConv2d(random(3, 4, 3, 3))(random(1, 3, 9, 9))
