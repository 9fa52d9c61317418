"""Inputs of quick forms: of any strides, and with infinities and NaN in a token, which stay its own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bitfold.numerics import QuantizedTensor, TensorScheme, fake_quantize, to_groups
from bitfold.runtime.quick_int8 import THREE_DIGITS_UP_TO, Int8Linear
from bitfold.runtime.quick_outer import HalfLinear, no_half

WIDTH, OUT = 64, 20
# Codes of 5 bits: on no processor do sums of two products in 16 bits overflow.
WEIGHT = TensorScheme(bits=5)
SCALE = torch.tensor([0.05])
TOKEN = {"bits": 8, "granularity": "token"}
ACTIVATIONS = {
    "values": None,
    "symmetric codes": TensorScheme.model_validate(TOKEN),
    "codes": TensorScheme.model_validate(TOKEN | {"symmetric": False}),
    "static codes": TensorScheme(bits=8, granularity="tensor", static=True),
}
FORMS = [*ACTIVATIONS, "half"]

pytestmark = pytest.mark.skipif(
    no_half(torch.ones(1, 1)) is not None or not hasattr(torch.ops.onednn, "qlinear_prepack"),
    reason="this PyTorch has none of the products",
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quick(form: str) -> nn.Module:
    weight = random(OUT, WIDTH)
    if form == "half":
        return HalfLinear(weight.bfloat16(), random(OUT, seed=3))
    low, high = torch.aminmax(to_groups(weight, WEIGHT), dim=-1, keepdim=True)
    tensor = QuantizedTensor.from_limits(weight, low, high, WEIGHT, torch.bfloat16)
    scale = SCALE if form == "static codes" else None
    return Int8Linear(tensor, ACTIVATIONS[form], random(OUT, seed=3), scale)


STRIDES: dict[str, Callable[[int], Tensor]] = {
    "transposed": lambda tokens: random(WIDTH, tokens, seed=1).T,
    "of heads": lambda tokens: random(2, WIDTH, tokens, seed=1).transpose(1, 2),
    "expanded tokens": lambda tokens: random(1, WIDTH, seed=1).expand(tokens, WIDTH),
    "expanded channels": lambda tokens: random(tokens, 1, seed=1).expand(tokens, WIDTH),
    "every second channel": lambda tokens: random(tokens, 2 * WIDTH, seed=1)[:, ::2],
    "a part of the channels": lambda tokens: random(tokens, 3 * WIDTH, seed=1)[:, 5 : 5 + WIDTH],
    "every third token": lambda tokens: random(3 * tokens, WIDTH, seed=1)[1::3],
    "one channel on in memory": lambda tokens: random(tokens * WIDTH + 1, seed=1)[1:].view(tokens, WIDTH),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, THREE_DIGITS_UP_TO + 3])
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("form", FORMS)
def test_any_strides(form: str, strides: str, tokens: int, dtype: torch.dtype) -> None:
    """The same numbers as of the same input laid out plainly, and the input is left as it was."""
    layer, x = quick(form), STRIDES[strides](tokens)
    if dtype == torch.bfloat16:
        # A copy of another dtype keeps strides that leave nothing out.
        x = x.bfloat16()
    before = x.clone()
    found, wanted = layer(x), layer(x.clone(memory_format=torch.contiguous_format))
    assert found.shape == (*x.shape[:-1], OUT)
    assert found.dtype == dtype
    assert torch.equal(found, wanted)
    assert torch.equal(x, before)
    alone = layer(x.reshape(-1, WIDTH)[0])
    # More tokens than eight have two digits in place of three; bfloat16 rounds what comes out.
    assert torch.allclose(found.reshape(-1, OUT)[0].float(), alone.float(), rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("tokens", [3, THREE_DIGITS_UP_TO + 3])
@pytest.mark.parametrize("form", ["values", "symmetric codes", "codes", "half"])
def test_what_is_not_finite_stays_so_and_with_its_token(form: str, tokens: int, odd: float) -> None:
    """As in the plain product, no number of the token is finite; and no other token sees it."""
    layer, x = quick(form), random(tokens, WIDTH, seed=1)
    clean = layer(x)
    x[1, 7] = odd
    found = layer(x)
    assert not torch.isfinite(found[1]).any()
    others = torch.arange(tokens) != 1
    assert torch.equal(found[others], clean[others])
    if form == "half":
        plain = x @ random(OUT, WIDTH).bfloat16().float().T + random(OUT, seed=3)
        assert torch.equal(found[1].nan_to_num(0, 1, -1), plain[1].nan_to_num(0, 1, -1))


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf])
def test_a_static_range_clips_infinities(odd: float) -> None:
    """As the simulation does: they become the range's ends."""
    layer, x = quick("static codes"), random(3, WIDTH, seed=1)
    x[1, 7] = odd
    activation = ACTIVATIONS["static codes"]
    assert activation is not None
    seen = fake_quantize(x, SCALE, None, activation)
    assert torch.isfinite(seen).all()
    assert torch.equal(layer(x), layer(seen))


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_has_no_half(dtype: torch.dtype, odd: float) -> None:
    weight = torch.ones(5, 8, dtype=dtype)
    assert no_half(weight) is None
    weight[3, 2] = odd
    assert no_half(weight) == "its values are not all finite"
