"""Packed keys and values: the numbers of fake quantization, in the bytes that arithmetic says."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitfold.numerics import (
    TensorScheme,
    fake_quantize_dynamic,
    fake_quantize_static,
    unpack,
)
from bitfold.runtime.packed_heads import Coding, PackedHeads, can_pack
from bitfold.runtime.token_groups import full_tokens, quantize_groups
from reference import round_tensor

BATCH, HEADS, SIZE = 2, 3, 32
KINDS: dict[str, dict[str, Any]] = {
    "token": {"granularity": "token"},
    "group": {"granularity": "group", "group_size": 16},
    "channel of tokens": {"granularity": "channel", "group_size": 8},
    "tensor": {"granularity": "tensor", "static": True},
    "head": {"granularity": "head", "static": True},
    "channel": {"granularity": "channel", "static": True},
}
SHAPES = {"tensor": (1, 1, 1), "head": (HEADS, 1, 1), "channel": (HEADS, 1, SIZE)}


def coding(kind: str, bits: int, *, symmetric: bool = False) -> Coding:
    scheme = TensorScheme(bits=bits, symmetric=symmetric, **KINDS[kind])
    if not scheme.static:
        return Coding(scheme)
    generator = torch.Generator().manual_seed(5)
    scale = (torch.rand(SHAPES[kind], generator=generator) + 0.5) * 5 / 2**bits
    zero = torch.randint(-1, 2, SHAPES[kind], generator=generator).to(torch.int8)
    return Coding(scheme, scale, None if symmetric else zero)


def heads(
    tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32, size: int = SIZE
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, HEADS, tokens, size, generator=generator).to(dtype)


def simulated(x: Tensor, how: Coding) -> Tensor:
    """By the functions of the attention."""
    scheme = how.scheme
    assert scheme is not None
    if scheme.static:
        assert how.scale is not None
        return fake_quantize_static(x, how.scale, how.zero, scheme)
    if not scheme.groups_tokens:
        return fake_quantize_dynamic(x, scheme)
    full = full_tokens(x.shape[2], how.tokens)
    done = quantize_groups(x[:, :, :full], scheme, fake_quantize_dynamic)
    return torch.cat([done, x[:, :, full:]], 2)


def stored(x: Tensor, how: Coding, portions: list[int]) -> PackedHeads:
    packed = PackedHeads(how, x)
    for part in x.split(portions, dim=2):
        packed.append(part)
    return packed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_numbers_of_fake_quantization_to_the_bit(
    kind: str, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    x, how = heads(29, dtype=dtype), coding(kind, bits, symmetric=symmetric)
    packed = stored(x, how, [11, 1, 1, 16])
    assert packed.tokens == 29
    assert torch.equal(packed.read(), simulated(x, how))
    assert packed.read().dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_back_in_portions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, how = heads(61), coding(kind, 3)
    monkeypatch.setattr("bitfold.runtime.packed_heads._NUMBERS", 7 * BATCH * HEADS * SIZE)
    assert torch.equal(stored(x, how, [50, 11]).read(), simulated(x, how))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(sorted(KINDS)))
def test_portions_make_no_difference(portions: list[int], kind: str) -> None:
    x, how = heads(sum(portions), seed=sum(portions)), coding(kind, 3)
    found, whole = stored(x, how, portions), stored(x, how, [sum(portions)])
    assert torch.equal(found.read(), whole.read())
    assert found.nbytes == whole.nbytes


@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4, 6, 8]))
def test_codes_are_inside_the_grid_and_errors_below_half_a_step(seed: int, bits: int) -> None:
    """Half a step of float64 loops' own error; all of it where the rounded zero-point shifts an end."""
    x = heads(8, seed=seed, dtype=torch.float64)
    how = coding("channel of tokens", bits)
    packed = stored(x, how, [8])
    assert packed.codes is not None
    codes = unpack(packed.codes.flatten(0, 2).view(torch.int32), bits, SIZE)
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    expected = round_tensor(x.transpose(-1, -2).numpy(), 8, bits, symmetric=False)
    np.testing.assert_allclose(packed.read().transpose(-1, -2).numpy(), expected, atol=1e-12)
    assert packed.scale is not None
    assert packed.zero is not None
    step = packed.scale.transpose(-1, -2)  # [batch, heads, head_dim, 1]
    zero = packed.zero.transpose(-1, -2).double()
    values = x.transpose(-1, -2)
    low, high = step * (-(2 ** (bits - 1)) - zero), step * (2 ** (bits - 1) - 1 - zero)
    error = (packed.read().transpose(-1, -2) - values.clamp(low, high)).abs()
    assert bool((error <= step / 2 * (1 + 1e-9)).all())


@pytest.mark.parametrize("size", [16, 80])
@pytest.mark.parametrize("kind", ["token", "group", "channel of tokens", "head"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_bytes(kind: str, bits: int, size: int) -> None:
    """Rows of codes are as long as they have to be, to the byte."""
    tokens, how = 27, coding(kind, bits)
    x = heads(tokens, dtype=torch.bfloat16, size=size)
    packed = stored(x, how, [20, 7])
    assert torch.equal(packed.read(), simulated(x, how))
    full = full_tokens(tokens, how.tokens)
    scales = {"token": full, "group": full * size // 16, "channel of tokens": full // 8 * size}
    rows = BATCH * HEADS
    expected = rows * full * math.ceil(size * bits / 8)  # codes
    expected += rows * scales.get(kind, 0) * (2 + 1)  # scales in bfloat16, zero-points in int8
    expected += rows * (tokens - full) * size * 2  # what is not packed yet
    assert packed.nbytes == expected


@pytest.mark.parametrize("kind", ["token", "channel of tokens", "head"])
def test_forgetting(kind: str) -> None:
    x, how = heads(29), coding(kind, 4)
    first = stored(x, how, [29])
    dropped = first.drop_first(13)
    assert dropped == full_tokens(13, how.tokens)
    assert torch.equal(first.read(), simulated(x, how)[:, :, dropped:])
    last = stored(x, how, [29])
    last.drop_last(2)
    assert torch.equal(last.read(), simulated(x, how)[:, :, :27])
    last.drop_last(
        9
    )  # into a group that was full: what is left of it stays at its quantized values
    assert torch.equal(last.read(), simulated(x, how)[:, :, :18])
    last.append(x[:, :, 18:])
    assert last.tokens == 29
    assert torch.equal(last.read()[:, :, :16], simulated(x, how)[:, :, :16])
    last.drop_last(29)
    assert last.tokens == 0


def test_what_is_left_alone() -> None:
    x = heads(9)
    packed = stored(x, Coding(), [4, 5])
    assert torch.equal(packed.read(), x)
    assert packed.nbytes == x.nbytes
    assert packed.drop_first(4) == 4
    assert torch.equal(packed.read(), x[:, :, 4:])


def test_no_view_keeps_a_pass_in_memory() -> None:
    packed = stored(heads(1001), coding("channel of tokens", 2), [1001])
    for part in (packed.codes, packed.scale, packed.zero, packed.rest):
        assert part is not None
        assert part.untyped_storage().nbytes() <= max(2 * part.nbytes, 64)


def test_batches_change() -> None:
    x, how = heads(13), coding("channel of tokens", 3)
    packed = stored(x, how, [13])
    packed.change(lambda part: part.index_select(0, torch.tensor([1, 1, 0])))
    assert torch.equal(packed.read(), simulated(x, how)[[1, 1, 0]])


def test_grids_it_has_no_codes_for() -> None:
    assert can_pack(None)
    assert can_pack(TensorScheme(bits=3, granularity="token"))
    assert not can_pack(TensorScheme(grid="nf4", bits=4, granularity="token"))
