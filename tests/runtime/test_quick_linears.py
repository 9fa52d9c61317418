"""Quick forms of linear layers: the float64 product with the dequantized weight, within what they state."""

import pytest
import torch
from torch import Tensor

from bitfold.numerics import (
    QuantizedTensor,
    Scheme,
    TensorScheme,
    fake_quantize,
    fake_quantize_dynamic,
    to_groups,
)
from bitfold.runtime import quick_int4, quick_int8
from bitfold.runtime.compiled import DISABLED, forget_kernels
from bitfold.runtime.quick_int4 import Int4Linear, dequantized_from, int4_kernel, no_int4
from bitfold.runtime.quick_int8 import THREE_DIGITS_UP_TO, Int8Linear, no_int8
from bitfold.runtime.quick_outer import ROWS, CastEmbedding, HalfLinear, no_half

ROUNDOFF = 2.0**-8
"""Of bfloat16: the largest relative error of rounding to it."""
FEW = Scheme(weight=TensorScheme(bits=4, granularity="group", group_size=32))
BYTES = Scheme(weight=TensorScheme(bits=8))

needs_int4 = pytest.mark.skipif(
    no_int4(FEW, (64, 64), torch.bfloat16) is not None, reason="no 4-bit product on this machine"
)
needs_int8 = pytest.mark.skipif(
    no_int8(BYTES) is not None, reason="no exact products of bytes on this machine"
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(scheme: TensorScheme, rows: int, columns: int) -> QuantizedTensor:
    # Off the middle, so that zero-points are not all near 0.
    weight = random(rows, columns) + random(rows, 1, seed=2)
    low, high = torch.aminmax(to_groups(weight, scheme), dim=-1, keepdim=True)
    return QuantizedTensor.from_limits(weight, low, high, scheme, torch.bfloat16)


def with_outlier(tokens: int, columns: int) -> Tensor:
    x = random(2, tokens, columns, seed=1)
    x[..., 3] *= 30
    return x


@needs_int4
@pytest.mark.parametrize("tokens", [1, 3, dequantized_from() // 2 - 1, dequantized_from() // 2])
@pytest.mark.parametrize("rows", [64, 200, 1100])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group"),
    [(4, 32), (4, 64), (4, 128), (4, 256), (4, 512), (4, None), (3, 128), (2, 32), (2, None)],
)
def test_int4(bits: int, group: int | None, symmetric: bool, rows: int, tokens: int) -> None:
    granularity = {"granularity": "group", "group_size": group} if group else {}
    scheme = TensorScheme.model_validate({"bits": bits, "symmetric": symmetric} | granularity)
    tensor = rounded(scheme, rows, 512)
    assert no_int4(Scheme(weight=scheme), (rows, 512), tensor.scale.dtype) is None
    bias = random(rows, seed=3)
    linear, weight = Int4Linear(tensor, bias), tensor.dequantize(torch.float64)
    x = with_outlier(tokens, 512)
    found, wanted = linear(x), x.double() @ weight.T + bias
    assert found.dtype == torch.float32
    assert found.shape == (2, tokens, rows)
    # What comes out is rounded once; so is an input of more tokens than are split, and each weight of a long prompt.
    size = x.double().abs() @ weight.abs().T
    every = (
        0 if 2 * tokens <= quick_int4.SPLIT_UP_TO else 1 if 2 * tokens < dequantized_from() else 2
    )
    rest = 2 * ROUNDOFF**2 if every == 0 else ROUNDOFF * every
    bound = ROUNDOFF * (wanted - bias).abs() + (rest + 2e-6) * size
    assert ((found - wanted).abs() <= bound * 1.01).all()
    assert torch.equal(linear.dequantize(torch.bfloat16), tensor.dequantize(torch.bfloat16))


@pytest.mark.skipif(int4_kernel().library is None, reason=int4_kernel().why)
@pytest.mark.parametrize("block", [64, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [64, 200, 1100])
def test_compiled_weights_are_those_of_the_passes(
    rows: int, symmetric: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, in either processor's layout, in several threads too."""

    def pack(codes: Tensor) -> Tensor:
        blocks = (codes.int() + 8).view(-1, block, codes.shape[1]).transpose(1, 2)
        packed = blocks[..., : block // 2] | (blocks[..., block // 2 :] << 4)
        return packed.to(torch.uint8).reshape(len(codes), -1)

    monkeypatch.setattr(quick_int4, "_block", lambda: block)
    monkeypatch.setattr(quick_int4, "_pack", pack)
    scheme = TensorScheme(bits=4, symmetric=symmetric, granularity="group", group_size=64)
    tensor = rounded(scheme, rows, 2048)
    tensor.scale[::7] *= 1e-38  # products that are subnormal, and 0
    linear, x = Int4Linear(tensor, None), random(64, 2048)
    found = []
    for disabled in ("", "1"):
        monkeypatch.setenv(DISABLED, disabled)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        forget_kernels()
        found.append((linear.dequantize(torch.bfloat16), linear(x)))
    monkeypatch.undo()
    forget_kernels()
    assert torch.equal(found[0][0], tensor.dequantize(torch.bfloat16))
    assert torch.equal(found[1][0], found[0][0])
    assert (found[0][1] - found[1][1]).abs().max() <= 0.02 * found[0][1].abs().max()


@needs_int4
def test_int4_in_bfloat16_is_closer_than_products_in_bfloat16() -> None:
    scheme = TensorScheme(bits=4, symmetric=False, granularity="group", group_size=128)
    tensor = rounded(scheme, 256, 1024)
    linear, weight = Int4Linear(tensor, None), tensor.dequantize(torch.float64)
    x = random(5, 1024).bfloat16()
    wanted = x.double() @ weight.T
    found = linear(x)
    assert found.dtype == torch.bfloat16
    plain = x @ tensor.dequantize(torch.bfloat16).T
    assert (found - wanted).norm() < (plain - wanted).norm()


@needs_int8
@pytest.mark.parametrize("tokens", [1, THREE_DIGITS_UP_TO // 2, THREE_DIGITS_UP_TO])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 6, 5])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_int8_of_values(granularity: str, bits: int, symmetric: bool, tokens: int) -> None:
    scheme = TensorScheme.model_validate(
        {"bits": bits, "symmetric": symmetric, "granularity": granularity}
    )
    tensor, bias = rounded(scheme, 75, 130), random(75, seed=3)
    linear, weight = Int8Linear(tensor, None, bias), tensor.dequantize(torch.float64)
    x = with_outlier(tokens, 130)
    x[0, 0] = 0
    found, wanted = linear(x), x.double() @ weight.T + bias
    largest = x.double().abs().amax(dim=-1, keepdim=True)
    step = 2.0**-23 if 2 * tokens <= THREE_DIGITS_UP_TO else 2.0**-15
    # Half a step at every input; and float32, of all that is added up.
    size = weight.abs().sum(dim=1) * largest
    assert ((found - wanted).abs() <= step * size + 4e-6 * size + 1e-6 * bias.abs()).all()


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("notation", ["w8a8", "w8a6", "w4a8", "w4a4"])
def test_int8_of_codes(notation: str, symmetric: bool, tokens: int, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(notation)
    assert scheme.weight is not None
    assert scheme.activation is not None
    weight_scheme = scheme.weight.model_copy(update={"symmetric": symmetric})
    tensor = rounded(weight_scheme, 75, 130)
    linear = Int8Linear(tensor, scheme.activation, None)
    x = with_outlier(tokens, 130).to(dtype)
    found = linear(x)
    assert found.dtype == dtype
    if dtype == torch.bfloat16:
        assert torch.isfinite(found).all()
        return
    seen = fake_quantize_dynamic(x, scheme.activation).double()
    wanted = seen @ tensor.dequantize(torch.float64).T
    size = seen.abs() @ tensor.dequantize(torch.float64).abs().T
    assert ((found - wanted).abs() <= 1e-5 * size).all()


@needs_int8
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_of_static_codes(symmetric: bool) -> None:
    activation = TensorScheme(bits=8, symmetric=symmetric, granularity="tensor", static=True)
    tensor = rounded(TensorScheme(bits=8, symmetric=False), 20, 64)
    scale = torch.tensor([0.05])
    zero = None if symmetric else torch.tensor([-17], dtype=torch.int8)
    linear = Int8Linear(tensor, activation, None, scale, zero)
    x = random(3, 64)
    seen = fake_quantize(x, scale, None if zero is None else zero.float(), activation).double()
    wanted = seen @ tensor.dequantize(torch.float64).T
    assert (linear(x) - wanted).norm() <= 1e-5 * wanted.norm()


@needs_int8
def test_int8_of_clipped_codes() -> None:
    activation = TensorScheme(bits=4, symmetric=False, granularity="token", clipped=True)
    tensor = rounded(TensorScheme(bits=4), 20, 64)
    assert no_int8(Scheme(weight=tensor.scheme, activation=activation)) is None
    share, x = torch.tensor([0.8]), random(3, 64)
    seen = fake_quantize_dynamic(x, activation, share=share).double()
    wanted = seen @ tensor.dequantize(torch.float64).T
    found = Int8Linear(tensor, activation, None, share)(x)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@needs_int8
def test_sums_of_bytes_are_exact() -> None:
    """At the extremes too, where processors that add in 16 bits saturate."""
    codes = torch.full((16, 1024), -128, dtype=torch.int8)
    tensor = QuantizedTensor(codes, torch.ones(16, 1), None, TensorScheme(bits=8))
    linear = Int8Linear(tensor, TensorScheme(bits=8, granularity="token"), None)
    x = torch.full((2, 1024), -127.5)
    assert torch.equal(linear(x), torch.full((2, 16), 128.0 * 128 * 1024))


def test_what_has_no_form() -> None:
    """A reason each, in words."""
    group = {"granularity": "group", "group_size": 16}
    odd = Scheme(weight=TensorScheme.model_validate({"bits": 4} | group))
    assert "multiples of 32" in str(no_int4(odd, (64, 64), torch.bfloat16))
    assert "float16" in str(no_int4(FEW, (64, 64), torch.float16))
    assert "no quantized inputs" in str(no_int4(Scheme.parse("w4a8g32"), (64, 64), torch.bfloat16))
    assert "at most 4 bits" in str(no_int4(Scheme.parse("w5a16g32"), (64, 64), torch.bfloat16))
    for notation in ("wnf4a16", "wfp8a16", "wmxfp4a16"):
        assert "all integers" in str(no_int4(Scheme.parse(notation), (64, 64), torch.bfloat16))
        assert "all integers" in str(no_int8(Scheme.parse(notation)))
    assert "one for a group" in str(no_int8(Scheme.parse("w8a16g32")))
    assert "no one scale" in str(no_int8(Scheme.parse("w8afp8")))


def test_unknown_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not as it was measured is not used."""
    monkeypatch.setattr(quick_int4, "_block", lambda: None)
    monkeypatch.setattr(quick_int8, "no_products", lambda: "they are not exact here")
    assert "layout" in str(no_int4(FEW, (64, 64), torch.bfloat16))
    assert "not exact" in str(no_int8(BYTES))


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e5, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype: torch.dtype, factor: float) -> None:
    weight = (random(ROWS + 7, 33) * min(factor, 1e3 if dtype == torch.float16 else factor)).to(
        dtype
    )
    if (reason := no_half(weight)) is not None:
        pytest.skip(reason)
    bias, x = random(len(weight), seed=3), random(2, 3, 33, seed=1)
    wanted = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    found = HalfLinear(weight, None)(x)
    assert ((found - wanted).abs() <= 2e-6 * size).all()
    both = HalfLinear(weight.float(), bias)(x)
    assert torch.equal(both, found + bias)


def test_half_takes_no_more_than_16_bits() -> None:
    assert no_half(random(5, 8)) is not None


def test_an_embedding_in_its_own_dtype() -> None:
    table = random(11, 4).bfloat16()
    found = CastEmbedding(table, torch.float32)(torch.tensor([[3, 10]]))
    assert torch.equal(found, table[[3, 10]].float()[None])
