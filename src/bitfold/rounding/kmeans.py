"""k-means in which every point has a metric of its own: what a codebook is learned by.

    minimise over entries c and codes k:    Σ_{t,r} w_r (x_tr − c_k(t,r)) M_t (x_tr − c_k(t,r))ᵀ

Points are tiles t of columns times rows r. A step gives every point its nearest entry, and every entry the weighted
least-squares optimum of its points: the sum never increases.
"""

import torch
from torch import Tensor

from bitfold.numerics.codebook import book_of_tiles

__all__ = ["kmeans", "kmeans_objective", "nearest_entries"]

# So many distances are held at once.
_DISTANCES = 2**24
# Of an entry's mean metric: keeps its least squares solvable where inputs do not reach.
_RIDGE = 1e-7


def nearest_entries(points: Tensor, metric: Tensor, books: Tensor) -> Tensor:
    """Indices [tiles, rows] of the nearest entries of points [tiles, rows, dim] in the metric [tiles, dim, dim].

    books: [books, entries, dim]; each serves equally many tiles, one book after the other.
    """
    tiles, rows, _ = points.shape
    book = book_of_tiles(tiles, books.shape[0], points.device)
    found = torch.empty(tiles, rows, dtype=torch.long, device=points.device)
    for part in torch.arange(tiles).split(max(1, _DISTANCES // (rows * books.shape[1]))):
        entries, m = books[book[part]], metric[part]
        own = ((entries @ m) * entries).sum(dim=-1).unsqueeze(1)
        distances = torch.baddbmm(own, points[part] @ m, entries.transpose(-1, -2), alpha=-2)
        found[part] = distances.argmin(dim=-1)
    return found


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
        codes = nearest_entries(points, metric, books)
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
