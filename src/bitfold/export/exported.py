"""What came out of an export, where it may go, and what the exporters say alike."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.errors import OutputError

__all__ = ["Exported", "Progress", "check_place", "half_scales", "rounded_scales", "unstored"]

Progress = Callable[[int, int, str], None]
"""Called with the number of tensors done, the number of all, and what is being done."""


@dataclass(frozen=True)
class Exported:
    """path, format; bytes on disk; types: how many weights there are of each of the format's types; notes: what the
    user should read."""

    path: Path
    format: str
    bytes: int
    types: dict[str, int]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"path": str(self.path), "notes": list(self.notes)}


def check_place(out: Path, what: str, *, directory: bool, overwrite: bool) -> None:
    """Raises OutputError where `what`, a directory or a file, may not be written at `out`."""
    if out.exists() and out.is_dir() != directory:
        kinds = ("a file", "a directory")
        raise OutputError(
            f"{out} is {kinds[out.is_dir()]}, and {what} is {kinds[directory]}: choose another -o."
        )
    if out.exists() and not overwrite:
        raise OutputError(
            f"{out} is there already: add --overwrite to replace it, or choose another -o."
        )
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise OutputError(
            f"{out} is no model's directory, so it is not replaced: choose another -o, or remove it yourself."
        )
    if not out.parent.is_dir():
        raise OutputError(f"There is no directory {out.parent}: make it, or choose another -o.")


def half_scales(scale: Tensor) -> tuple[Tensor, float]:
    """Scales in half precision, and the largest change relative to one.

    Raises OverflowError for those that are out of its range.
    """
    exact = scale.float()
    half = exact.half()
    if not torch.isfinite(half).all() or (half == 0).logical_and(exact != 0).any():
        raise OverflowError("a scale is out of the range of half precision")
    change = (half.float() - exact).abs() / exact.abs().clamp(min=torch.finfo(torch.float32).tiny)
    return half, float(change.max())


def rounded_scales(worst: float) -> list[str]:
    """The note of scales that half precision changed, by `worst` at most; none where it did not."""
    if not worst:
        return []
    return [f"scales are rounded to half precision, by at most {worst:.1e} of their size"]


def unstored(layers: Sequence[str], bits: str, change: float = 0.0) -> list[str]:
    """The note of weights that a format cannot hold in few bits; none where there are none. change: of a value, by
    which rounding moves it at most, relative to the layer's largest."""
    if not layers:
        return []
    more = f", and {len(layers) - 1} others" if len(layers) > 1 else ""
    moved = f", rounded by at most {change:.1e} of the largest" if change else ""
    return [
        f"{layers[0]}{more}: their values are written in floating point, and take {bits}{moved}"
    ]
