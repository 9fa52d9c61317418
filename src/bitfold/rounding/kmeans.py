"""k-means in which every point has a metric of its own: what a codebook is learned by.

    minimise over entries c and codes k:    Σ_{t,r} w_r (x_tr − c_k(t,r)) M_t (x_tr − c_k(t,r))ᵀ

Points are tiles t of columns times rows r. A step gives every point its nearest entry, and every entry the weighted
least-squares optimum of its points: the sum never increases.
"""

import torch
from torch import Tensor

from bitfold.numerics.codebook import book_of_tiles, nearest_entries

__all__ = ["first_entries", "kmeans", "kmeans_objective"]

# Of an entry's mean metric: keeps its least squares solvable where inputs do not reach.
_RIDGE = 1e-7


def first_entries(points: Tensor, books: int, entries: int) -> Tensor:
    """Where k-means begins: points [tiles, rows, dim] at even distances from each other, [books, entries, dim]."""
    by_book = points.unflatten(0, (books, -1)).flatten(1, 2)
    even = torch.arange(entries, device=points.device) * by_book.shape[1] // entries
    return by_book[:, even]


def kmeans(points: Tensor, metric: Tensor, weight: Tensor, books: Tensor, steps: int) -> Tensor:
    """Entries after so many steps from `books` [books, entries, dim]; arguments as of `kmeans_objective`.

    An entry that no point is nearest to stays where it is.
    """
    count, entries, dim = books.shape
    tiles, rows, _ = points.shape
    start = book_of_tiles(tiles, count, points.device).unsqueeze(1) * entries
    pulls = ((points @ metric) * weight.unsqueeze(-1)).flatten(0, 1)
    eye = torch.eye(dim, dtype=points.dtype, device=points.device)
    for _ in range(steps):
        codes = nearest_entries(points, books, metric)
        mass = points.new_zeros(tiles, entries)
        mass.scatter_add_(1, codes, weight.expand(tiles, rows))
        per_book = (part.unflatten(0, (count, -1)) for part in (mass, metric))
        left = torch.einsum("btk,btij->bkij", *per_book).flatten(0, 1)
        right = points.new_zeros(count * entries, dim)
        right.index_add_(0, (codes + start).flatten(), pulls)
        size = left.diagonal(dim1=1, dim2=2).mean(dim=1)
        empty = (size <= 0)[:, None]
        left = left + eye * torch.where(empty[:, 0], 1.0, _RIDGE * size)[:, None, None]
        right = right + _RIDGE * size.unsqueeze(1) * books.flatten(0, 1)
        found = torch.linalg.solve(left, right)
        books = torch.where(empty, books.flatten(0, 1), found).unflatten(0, (count, entries))
    return books


def kmeans_objective(
    points: Tensor, metric: Tensor, weight: Tensor, books: Tensor, codes: Tensor
) -> Tensor:
    """The sum above. points: [tiles, rows, dim]; metric: [tiles, dim, dim]; weight: of the rows [rows]; codes [tiles,
    rows]."""
    book = book_of_tiles(points.shape[0], books.shape[0], points.device)
    difference = points - books[book.unsqueeze(1), codes]
    return (((difference @ metric) * difference).sum(dim=-1) * weight).sum()
