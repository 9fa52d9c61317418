"""The command line's options of mixed precision."""

from pathlib import Path

import pytest

from bitfold.allocation import Mixed
from bitfold.errors import RecipeError
from bitfold.report.mixed import mixed_options

NOTHING = (None, None, None, False, None, None)


def test_read() -> None:
    assert mixed_options(*NOTHING) is None
    assert mixed_options("8,4, 3", "128,64", "kind", True, 4, Path("t.json")) == Mixed(
        bits=(8, 4, 3),
        group_sizes=(128, 64),
        per="kind",
        fuse=False,
        windows=4,
        table=Path("t.json"),
    )
    assert mixed_options("8", None, None, False, None, None) == Mixed(bits=(8,))


@pytest.mark.parametrize("text", ["", "8;4", "four", "4,", "3.5"])
def test_no_numbers(text: str) -> None:
    with pytest.raises(RecipeError, match="--candidates takes whole numbers"):
        mixed_options(text, *NOTHING[1:])
