"""Learned codebooks: the size of one, and what its codes stand for.

A code stands for `dim` adjacent weights of a row at once, and is the index of an entry: a vector of `dim` integers of 8
bits, in units of the row's scale. Runs of adjacent columns have codebooks of their own, all of one size.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

__all__ = ["ENTRY_LIMIT", "CodebookShape", "book_of_tiles", "entries_of"]

ENTRY_LIMIT = 127
"""Largest magnitude in an entry."""
_LEAST_CODE_BITS = 2
_MOST_CODE_BITS = 8


class CodebookShape(BaseModel):
    """dim: values that one code stands for. entries: of each codebook. books: codebooks of a weight, of equally many
    adjacent columns each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int = Field(ge=1)
    entries: int = Field(ge=2, le=2**_MOST_CODE_BITS)
    books: int = Field(default=1, ge=1)

    @property
    def code_bits(self) -> int:
        """Bits of a code.

        >>> CodebookShape(dim=4, entries=224).code_bits
        8
        """
        return max(_LEAST_CODE_BITS, (self.entries - 1).bit_length())

    @property
    def bits(self) -> int:
        """Bits of all entries."""
        return self.books * self.entries * self.dim * 8


def book_of_tiles(tiles: int, books: int, device: torch.device | None = None) -> Tensor:
    """The number of the codebook [tiles] of each code of a row."""
    return torch.arange(tiles, device=device) // (tiles // books)


def entries_of(codes: Tensor, codebook: Tensor) -> Tensor:
    """What codes [out, tiles] stand for, [out, tiles · dim], in the dtype of the codebook [books, entries, dim].

    >>> entries_of(torch.tensor([[1, 0]]), torch.tensor([[[1, 2], [3, 4]]]))
    tensor([[3, 4, 1, 2]])
    """
    books, entries, _ = codebook.shape
    start = book_of_tiles(codes.shape[1], books, codes.device) * entries
    return codebook.flatten(0, 1)[codes.long() + start].flatten(1)
