"""The command line's options of mixed precision, read."""

from pathlib import Path
from typing import Any

from bitfold.allocation.options import Mixed
from bitfold.errors import RecipeError

__all__ = ["mixed_options"]


def mixed_options(
    bits: str | None,
    group_sizes: str | None,
    per: str | None,
    unfused: bool,
    windows: int | None,
    table: Path | None,
) -> Mixed | None:
    """How bits are looked for; None where nothing is said of it."""
    given: dict[str, Any] = {
        "bits": _numbers("--candidates", bits),
        "group_sizes": _numbers("--group-sizes", group_sizes),
        "per": per,
        "fuse": False if unfused else None,
        "windows": windows,
        "table": table,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return Mixed(**given) if given else None


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Whole numbers separated by commas.

    Raises RecipeError for anything else.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(
            f"{option} takes whole numbers separated by commas, not '{text}': write for example 8,4,3."
        ) from error
