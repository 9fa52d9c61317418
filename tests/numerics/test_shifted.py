"""The grid of imported weights whose groups have a number of their own added."""

import pytest
import torch
from pydantic import ValidationError

from bitfold.errors import RecipeError
from bitfold.numerics import QuantizedTensor, Scheme, TensorScheme
from bitfold.rounding.nearest import Nearest

SCHEME = TensorScheme(grid="shifted", bits=4, granularity="group", group_size=2)


def weight(dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    return QuantizedTensor(
        torch.tensor([[0, 15, 3, 4]], dtype=torch.uint8),
        torch.tensor([[0.5, 2.0]], dtype=dtype),
        None,
        SCHEME,
        shift=torch.tensor([[-1.25, 0.75]], dtype=dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_values_counted_by_hand(dtype: torch.dtype) -> None:
    values = weight().dequantize(dtype)
    assert values.dtype == dtype
    assert values.tolist() == [[-1.25, 6.25, 6.75, 8.75]]


def test_bits_count_the_shifts() -> None:
    assert weight(torch.float16).bits == 4 * 4 + 2 * 16 + 2 * 16


def test_empty_has_the_same_parts() -> None:
    made, empty = weight(), QuantizedTensor.empty((1, 4), SCHEME, torch.float32)
    assert empty.shift is not None
    assert made.shift is not None
    assert empty.shift.shape == made.shift.shape
    assert empty.codes.dtype == made.codes.dtype


def test_it_is_said() -> None:
    assert SCHEME.describe() == "int4 shifted, group 2"
    assert Scheme(weight=SCHEME).notation == "w4a16g2"


def test_it_is_only_read() -> None:
    with pytest.raises(RecipeError, match="only read from others' files"):
        Nearest().stored_as("a", SCHEME, (1, 4), torch.float32)
    with pytest.raises(ValidationError, match="only imported and trained weights have"):
        Scheme(activation=TensorScheme(grid="shifted", bits=4, granularity="token"))
    with pytest.raises(ValidationError, match="no zero-point"):
        TensorScheme(grid="shifted", bits=4, symmetric=False)
