"""Packing loses nothing, wastes nothing, and is compressed-tensors' own."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfold.numerics import pack, packed_width, unpack


def random_codes(bits: int, rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 131), st.integers(0, 999))
@settings(max_examples=100)
def test_packing(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(bits, rows, columns, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, packed_width(columns, bits))
    assert torch.equal(words, pack_to_int32(codes, bits))
    back = unpack(words, bits, columns)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_large_weight(bits: int) -> None:
    """It is worked on in pieces."""
    codes = random_codes(bits, 9, 65_537, seed=2)
    words = pack(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack(words, bits, 65_537), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_layout(bits: int) -> None:
    """Code i is bits [i·b, (i+1)·b) of one long number, least significant first."""
    codes = random_codes(bits, 1, 77, seed=1)
    number = sum(
        (code + (1 << (bits - 1))) << (i * bits) for i, code in enumerate(codes[0].tolist())
    )
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(packed_width(77, bits))]
    assert [word & 0xFFFFFFFF for word in pack(codes, bits)[0].tolist()] == words
    assert number >> (32 * len(words)) == 0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("end", ["lowest", "highest"])
def test_codes_at_the_ends_of_the_grid(bits: int, end: str) -> None:
    code = -(1 << (bits - 1)) if end == "lowest" else (1 << (bits - 1)) - 1
    codes = torch.full((2, 45), code, dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, bits), bits, 45), codes)


@pytest.mark.parametrize(
    ("columns", "bits", "words"), [(32, 3, 3), (33, 3, 4), (128, 4, 16), (1, 2, 1), (7, 8, 2)]
)
def test_no_bit_is_wasted(columns: int, bits: int, words: int) -> None:
    assert packed_width(columns, bits) == words
