"""A codebook never takes more bits than the integers it stands in for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfold.numerics import CodebookShape, QuantizedTensor, TensorScheme, to_groups
from bitfold.rounding.codebook_size import best_shape, codebook_bits

W2G64 = TensorScheme(bits=2, symmetric=False, granularity="group", group_size=64)


def _integers(shape: tuple[int, int], scheme: TensorScheme, dtype: torch.dtype) -> int:
    weight = torch.zeros(shape)
    low, high = torch.aminmax(to_groups(weight, scheme), dim=-1, keepdim=True)
    return QuantizedTensor.from_limits(weight, low, high, scheme, dtype).bits


@given(
    st.integers(2, 8),
    st.sampled_from([None, 16, 32, 64]),
    st.booleans(),
    st.sampled_from([16, 48, 128, 1024]),
    st.sampled_from([64, 192, 256, 320]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([None, 1, 2, 4]),
    st.sampled_from([None, 1, 2]),
)
def test_within_the_bits_of_the_integers(
    bits: int,
    group: int | None,
    symmetric: bool,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    dim: int | None,
    books: int | None,
) -> None:
    scheme = TensorScheme(
        bits=bits,
        symmetric=symmetric,
        granularity="channel" if group is None else "group",
        group_size=group,
    )
    budget = _integers((rows, columns), scheme, dtype)
    found = best_shape((rows, columns), budget, dtype, dim, books)
    if found is None:
        return
    stored = TensorScheme(grid="codebook", bits=bits, codebook=found)
    tensor = QuantizedTensor.empty((rows, columns), stored, dtype)
    assert codebook_bits((rows, columns), found, dtype) == tensor.bits <= budget
    assert (found.dim, found.books) == (dim or found.dim, books or found.books)
    assert columns % (found.dim * found.books) == 0


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # 2.28125 bits of 128 · 256 are 74752: 65536 of codes, 2048 of scales, 7168 of 224 entries of 32 bits.
        ((128, 256), CodebookShape(dim=4, entries=224)),
        ((256, 256), CodebookShape(dim=4, entries=256)),
        # 55296 bits beside the codes, 12288 of them of scales: five codebooks of 8192, so four.
        ((768, 256), CodebookShape(dim=4, entries=256, books=4)),
        # Of 576 bits 512 are the scales': 2 bits a weight leave room for 8 numbers.
        ((32, 64), CodebookShape(dim=1, entries=4, books=2)),
    ],
)
def test_by_hand(shape: tuple[int, int], expected: CodebookShape) -> None:
    assert best_shape(shape, _integers(shape, W2G64, torch.bfloat16), torch.bfloat16) == expected


def test_more_bits_buy_more() -> None:
    """Three bits are 64 entries of two values, four 256."""
    shape, half = (768, 768), torch.bfloat16
    for bits, entries in ((3, 64), (4, 256)):
        scheme = TensorScheme(bits=bits, granularity="group", group_size=128)
        found = best_shape(shape, _integers(shape, scheme, half), half)
        assert found is not None
        assert (found.dim, found.entries) == (2, entries)


def test_without_room_for_scales_codes_are_shorter() -> None:
    """A scheme of one scale in all leaves nothing beside two bits a weight: 128 entries of four take 1.75."""
    scheme = TensorScheme(bits=2, granularity="tensor")
    shape, half = (256, 256), torch.bfloat16
    budget = _integers(shape, scheme, half)
    assert budget == 2 * 256 * 256 + 16
    assert best_shape(shape, budget, half) == CodebookShape(dim=4, entries=128, books=2)


def test_an_option_is_obeyed_or_refused() -> None:
    budget = _integers((128, 256), W2G64, torch.bfloat16)
    assert best_shape((128, 256), budget, torch.bfloat16, 2) == CodebookShape(
        dim=2, entries=16, books=16
    )
    # 7168 bits are left for eight codebooks with codes of 8 bits, 15360 with 7: 60 entries each; with 6, 64 fit.
    assert best_shape((128, 256), budget, torch.bfloat16, 4, 8) == CodebookShape(
        dim=4, entries=64, books=8
    )
    assert best_shape((128, 256), 2 * 128 * 256 + 16, torch.bfloat16, 1) is None
    assert best_shape((128, 256), budget, torch.bfloat16, 7) is None
    assert best_shape((128, 256), budget, torch.bfloat16, 2, 3) is None
