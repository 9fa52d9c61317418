"""Learned codebooks: the size of one, what its codes stand for, and the code of what is nearest.

In weights a code stands for `dim` adjacent weights of a row at once, and is the index of an entry: a vector of `dim`
integers of 8 bits, in units of the row's scale. Runs of adjacent columns have codebooks of their own, all of one size.
"""

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

__all__ = [
    "ENTRY_LIMIT",
    "CodebookShape",
    "book_of_tiles",
    "entries_of",
    "nearest_entries",
    "quantize_values",
]

ENTRY_LIMIT = 127
"""Largest magnitude in an entry."""
# So many distances are held at once.
_DISTANCES = 2**24
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
    def shape(self) -> tuple[int, int, int]:
        """[books, entries, dim]"""
        return self.books, self.entries, self.dim

    @property
    def numbers(self) -> int:
        """Numbers in all entries."""
        return self.books * self.entries * self.dim


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


def nearest_entries(points: Tensor, books: Tensor, metric: Tensor | None = None) -> Tensor:
    """Indices [tiles, rows] of the nearest entries of points [tiles, rows, dim].

    books: [books, entries, dim]; each serves equally many tiles, one book after the other. metric: of each tile
    [tiles, dim, dim]; None: the usual one.
    """
    tiles, rows, _ = points.shape
    book = book_of_tiles(tiles, books.shape[0], points.device)
    found = torch.empty(tiles, rows, dtype=torch.long, device=points.device)
    for part in torch.arange(tiles).split(max(1, _DISTANCES // (rows * books.shape[1]))):
        entries, given = books[book[part]], points[part]
        measured = entries if metric is None else entries @ metric[part]
        own = (measured * entries).sum(dim=-1).unsqueeze(1)
        distances = torch.baddbmm(own, given, measured.transpose(-1, -2), alpha=-2)
        found[part] = distances.argmin(dim=-1)
    return found


def quantize_values(x: Tensor, codebook: Tensor) -> Tensor:
    """Values [batch, heads, tokens, head_dim], each run of `dim` dimensions of a head replaced by its nearest entry.

    codebook: [heads · head_dim / dim, entries, dim], floating point; distances are in float32 at least. Gradients are
    passed straight through.
    """
    quantized: Tensor = _Values.apply(x, codebook)
    return quantized


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(0, 1).flatten(1)  # [batch · tokens, heads · head_dim]
        points = rows.unflatten(1, (-1, codebook.shape[-1])).transpose(0, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        codes = nearest_entries(points.to(wide), codebook.to(wide)).T
        found = entries_of(codes, codebook.to(x.dtype))
        batch, heads, tokens, _ = x.shape
        return found.unflatten(0, (batch, tokens)).unflatten(2, (heads, -1)).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None
