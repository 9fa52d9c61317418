"""How large a codebook may be within the bits that integers of a scheme take, and which size promises the least error.

The error of the best codebook of N entries for normally distributed vectors of d values is, for large N,

    D(d, N) = 2π G_d ((d + 2) / d)^((d + 2) / 2) N^(−2/d)

(Zador 1982, IEEE Trans. Inform. Theory 28; G_d the normalised second moment of a cell, Conway and Sloane 1982). So
among what the budget holds the least D is taken; what is left over buys columns codebooks of their own.
"""

import math

import torch

from bitfold.numerics import CodebookShape

__all__ = ["best_shape", "codebook_bits"]

# G_d of the best lattice known.
_CELL = {1: 1 / 12, 2: 0.0801875, 3: 0.0785433, 4: 0.0766032, 6: 0.0742437, 8: 0.0716821}
_CODE_BITS = range(2, 9)


def codebook_bits(shape: tuple[int, int], codebook: CodebookShape, scale_dtype: torch.dtype) -> int:
    """Bits that a weight [out, in] takes with a scale for every row: codes, scales and entries."""
    beside = _code_and_scale_bits(shape, codebook.dim, codebook.code_bits, scale_dtype)
    return beside + codebook.numbers * 8


def best_shape(
    shape: tuple[int, int],
    budget: int,
    scale_dtype: torch.dtype,
    dim: int | None = None,
    books: int | None = None,
) -> CodebookShape | None:
    """The size of the least expected error that takes at most `budget` bits; None where there is none.

    dim, books: where they are given.
    """
    columns = shape[1]
    sizes = []
    for width in _CELL if dim is None else (dim,):
        if columns % width or (columns // width) % (books or 1):
            continue
        for code_bits in _CODE_BITS:
            taken = _code_and_scale_bits(shape, width, code_bits, scale_dtype)
            room = (budget - taken) // (width * 8 * (books or 1))
            entries = min(1 << code_bits, room)
            if entries > 1 << (code_bits - 1):
                sizes.append(CodebookShape(dim=width, entries=entries, books=books or 1))
    if not sizes:
        return None
    best = min(sizes, key=_expected_error)
    tiles = columns // best.dim
    while books is None and tiles % (2 * best.books) == 0:
        more = best.model_copy(update={"books": 2 * best.books})
        if codebook_bits(shape, more, scale_dtype) > budget:
            break
        best = more
    return best


def _code_and_scale_bits(
    shape: tuple[int, int], dim: int, code_bits: int, scale_dtype: torch.dtype
) -> int:
    rows, columns = shape
    return rows * (columns // dim) * code_bits + rows * scale_dtype.itemsize * 8


def _expected_error(codebook: CodebookShape) -> float:
    """D(d, N) of values of variance 1."""
    dim, cell = codebook.dim, _CELL.get(codebook.dim, _CELL[8])
    spread = 2 * math.pi * cell * ((dim + 2) / dim) ** ((dim + 2) / 2)
    return float(spread * codebook.entries ** (-2 / dim))
