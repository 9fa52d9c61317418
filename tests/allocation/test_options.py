"""Budgets and options of mixed precision, and what cannot be asked."""

import pytest

from bitfold.allocation import Budget, Mixed
from bitfold.allocation.options import parse_bytes
from bitfold.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3.5GB", 3_500_000_000),
        ("3.5 gb", 3_500_000_000),
        ("512MiB", 2**29),
        ("7k", 7000),
        ("1.5T", 1_500_000_000_000),
        ("123456", 123456),
        (99, 99),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "3,5GB", "-1MB", "0", "3 XB", "1e9", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(RecipeError, match="cannot be read: write for example"):
        parse_bytes(text)


def test_budgets() -> None:
    assert Budget.make() is None
    assert Budget.make(bits=3.25, fit="1MB", latency=0.5) == Budget(3.25, 1_000_000, 0.5)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="--bits takes a positive number"):
            Budget.make(bits=wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": ()},
        {"bits": (4, 9)},
        {"bits": (1,)},
        {"group_sizes": (1,)},
        {"per": "block"},
        {"windows": 0},
        {"length": 1},
    ],
)
def test_impossible_options(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        Mixed(**wrong)
