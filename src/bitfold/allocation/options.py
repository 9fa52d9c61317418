"""What may be asked of mixed precision: a budget, and how bits are looked for."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bitfold.errors import RecipeError

__all__ = ["Budget", "Mixed", "parse_bytes"]

BITS = (16, 8, 6, 5, 4, 3, 2)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """What a result may take at most; None is no limit, and at least one is given.

    bits: mean bits per weight of the quantized matrices, scales and zero-points counted. bytes: of all files of the
    artifact. seconds: of all layers together, by the table of latencies.
    """

    bits: float | None = None
    bytes: int | None = None
    seconds: float | None = None

    @classmethod
    def make(
        cls,
        bits: float | None = None,
        fit: str | int | None = None,
        latency: float | None = None,
    ) -> "Budget | None":
        """The budget of `--bits`, `--fit` and `--latency`; None where none is given.

        Raises RecipeError for what is no positive number or size.
        """
        for name, value in (("bits", bits), ("latency", latency)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise RecipeError(f"--{name} takes a positive number, not {value}: give another.")
        size = None if fit is None else parse_bytes(fit)
        if bits is None and size is None and latency is None:
            return None
        return cls(bits, size, latency)


@dataclass(frozen=True)
class Mixed:
    """How bits are looked for.

    bits: of the candidates, 16 leaves a matrix alone. group_sizes: of the candidates; without any see `candidates`.
    per: one choice for every layer, or for every kind of operator in all blocks. fuse: layers that share an input
    (q, k, v; gate, up), which engines run as one, share a choice. windows, length: how much calibration text the
    sensitivities are measured on. table: a JSON file of measured latencies.
    """

    bits: tuple[int, ...] = BITS
    group_sizes: tuple[int, ...] = ()
    per: Literal["layer", "kind"] = "layer"
    fuse: bool = True
    windows: int = 8
    length: int = 256
    table: Path | None = None

    def __post_init__(self) -> None:
        """Raises RecipeError for options that cannot be."""
        odd = [bits for bits in self.bits if bits != 16 and not 2 <= bits <= 8]
        if odd or not self.bits:
            raise RecipeError(
                f"The candidates' bits are {list(self.bits)}: give some of 2 to 8, and 16 to leave layers alone."
            )
        if any(size < 2 for size in self.group_sizes):
            raise RecipeError(
                f"The candidates' group sizes are {list(self.group_sizes)}: each must be at least 2."
            )
        if self.per not in ("layer", "kind"):
            raise RecipeError(f"Bits are found per layer or per kind, not per '{self.per}'.")
        for name in ("windows", "length"):
            if getattr(self, name) < (2 if name == "length" else 1):
                raise RecipeError(
                    f"Sensitivities cannot be measured on {name}={getattr(self, name)}: give more."
                )


def parse_bytes(size: str | int) -> int:
    """Bytes of a size as people write it.

    >>> parse_bytes("3.5GB"), parse_bytes("512 MiB"), parse_bytes(1000)
    (3500000000, 536870912, 1000)

    Raises RecipeError for what is no size.
    """
    match = _SIZE.fullmatch(str(size).strip())
    if match is None or not float(match[1]):
        raise RecipeError(f"The size '{size}' cannot be read: write for example 3.5GB or 512MiB.")
    unit = (match[2] or "").lower()
    return int(float(match[1]) * (_UNITS | _BINARY)[unit])
