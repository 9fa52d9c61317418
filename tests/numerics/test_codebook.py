"""What codes of a codebook stand for and what they take, counted by hand."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bitfold.numerics import CodebookShape, QuantizedTensor, TensorScheme, entries_of
from bitfold.numerics.trainable_scale import dequantize_trainable

ROWS, TILES = 6, 8


def quantized(dim: int, entries: int, books: int, dtype: torch.dtype) -> QuantizedTensor:
    """Random codes, entries and scales."""
    generator = torch.Generator().manual_seed(dim * 1000 + entries * 10 + books)
    shape = CodebookShape(dim=dim, entries=entries, books=books)
    return QuantizedTensor(
        torch.randint(0, entries, (ROWS, TILES), generator=generator).to(torch.uint8),
        torch.rand(ROWS, 1, generator=generator).to(dtype),
        None,
        TensorScheme(grid="codebook", bits=2, codebook=shape),
        codebook=torch.randint(-127, 128, (books, entries, dim), generator=generator).to(
            torch.int8
        ),
    )


SIZES = [(1, 4, 1), (2, 16, 4), (3, 5, 2), (4, 256, 1), (4, 200, 8)]


@pytest.mark.parametrize(("dim", "entries", "books"), SIZES)
def test_values(dim: int, entries: int, books: int) -> None:
    tensor = quantized(dim, entries, books, torch.float64)
    assert tensor.codebook is not None
    expected = np.zeros((ROWS, TILES * dim))
    for row in range(ROWS):
        for tile in range(TILES):
            book = tile * books // TILES
            for place in range(dim):
                entry = int(tensor.codebook[book, int(tensor.codes[row, tile]), place])
                expected[row, tile * dim + place] = float(tensor.scale[row]) * entry
    assert tensor.shape == expected.shape
    assert np.array_equal(tensor.dequantize(torch.float64).numpy(), expected)


@pytest.mark.parametrize(("dim", "entries", "books"), SIZES)
def test_bits(dim: int, entries: int, books: int) -> None:
    tensor = quantized(dim, entries, books, torch.bfloat16)
    per_code = {4: 2, 16: 4, 5: 3, 256: 8, 200: 8}[entries]
    bits = ROWS * TILES * per_code + ROWS * 16 + books * entries * dim * 8
    assert tensor.bits == bits
    assert tensor.bits_per_weight == bits / (ROWS * TILES * dim)


@pytest.mark.parametrize(
    "scheme",
    [
        quantized(4, 200, 8, torch.float32).scheme,
        TensorScheme(bits=3, symmetric=False, granularity="group", group_size=4),
        TensorScheme(grid="nf4", bits=4, granularity="channel"),
        TensorScheme(bits=8, granularity="tensor"),
    ],
    ids=TensorScheme.describe,
)
def test_room_is_what_is_made(scheme: TensorScheme) -> None:
    empty = QuantizedTensor.empty((ROWS, 32), scheme, torch.bfloat16, device="meta")
    if scheme.codebook is not None:
        made = quantized(4, 200, 8, torch.bfloat16)
    else:
        limits = (torch.full((1, 1), -1.0), torch.ones(1, 1))
        weight = torch.randn(ROWS, 32)
        if scheme.granularity != "tensor":
            groups = 32 // (scheme.group_size or 32)
            limits = tuple(limit.expand(ROWS, groups, 1) for limit in limits)
        made = QuantizedTensor.from_limits(weight, *limits, scheme, torch.bfloat16)
    assert empty.bits == made.bits
    for part in ("codes", "scale", "zero", "codebook"):
        one, other = getattr(empty, part), getattr(made, part)
        assert (one is None) == (other is None)
        assert one is None or (one.shape, one.dtype) == (other.shape, other.dtype)


def test_entries_keep_the_dtype_of_the_codebook() -> None:
    codebook = torch.arange(12.0, dtype=torch.float64).view(1, 3, 4)
    assert entries_of(torch.tensor([[2, 0]]), codebook).tolist() == [[8, 9, 10, 11, 0, 1, 2, 3]]


def test_scales_are_trained() -> None:
    tensor = quantized(4, 200, 8, torch.bfloat16)
    scale = tensor.scale.double().requires_grad_()
    values = dequantize_trainable(tensor, scale, torch.float64, torch.float64)
    assert torch.equal(values, tensor.dequantize(torch.float64))
    pull = torch.randn(tensor.shape, dtype=torch.float64)
    (values * pull).sum().backward()
    assert scale.grad is not None
    expected = (tensor.units.double() * pull).sum(dim=1, keepdim=True)
    assert torch.allclose(scale.grad, expected, rtol=1e-12)


def test_what_cannot_be() -> None:
    shape = CodebookShape(dim=2, entries=16)
    with pytest.raises(ValidationError, match="codebook goes with grid=codebook"):
        TensorScheme(grid="int", bits=4, codebook=shape)
    with pytest.raises(ValidationError, match="no zero-point"):
        TensorScheme(grid="codebook", bits=4, symmetric=False)
    with pytest.raises(ValidationError):
        CodebookShape(dim=2, entries=257)
