"""The steps of `vq`, on a weight in tiles: d adjacent weights of a row, an entry of a codebook times the row's scale.

Ŵ_{r, J} = s_r c_{k(r, J)}        error = tr(Δ H Δᵀ),  Δ = W − Ŵ
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.numerics.codebook import ENTRY_LIMIT, book_of_tiles, entries_of, nearest_entries
from bitfold.rounding.gptq import MomentRoot

__all__ = ["Tiled"]


@dataclass(frozen=True)
class Tiled:
    """weight: [out, in]; scale: [out, 1]; dim: d. factor: of H, its order taken in tiles; all of one dtype.

    Codes are [out, in / d], codebooks [books, entries, d] in units of the scales.
    """

    weight: Tensor
    scale: Tensor
    dim: int
    factor: MomentRoot

    @property
    def tiles(self) -> int:
        """Tiles in a row."""
        return self.weight.shape[1] // self.dim

    @property
    def moment(self) -> Tensor:
        """H, damped [in, in]."""
        return self.factor.moment

    @property
    def points(self) -> Tensor:
        """The weights in units of the scales, [tiles, out, d]."""
        return (self.weight / self.scale).unflatten(1, (-1, self.dim)).transpose(0, 1).contiguous()

    @property
    def whitening(self) -> Tensor:
        """R_JJ of each tile [tiles, d, d]: ‖e R_JJ‖² is what an error e costs if later tiles make up for it."""
        cut = self.factor.root.unflatten(0, (-1, self.dim)).unflatten(2, (-1, self.dim))
        return cut.diagonal(dim1=0, dim2=2).permute(2, 0, 1)[torch.argsort(self._order)]

    def values(self, codes: Tensor, books: Tensor) -> Tensor:
        """Ŵ [out, in]."""
        return entries_of(codes, books) * self.scale

    def row_errors(self, codes: Tensor, books: Tensor, moment: Tensor) -> Tensor:
        """δ H δᵀ of every row [out]."""
        difference = self.weight - self.values(codes, books)
        return ((difference @ moment) * difference).sum(dim=1)

    def nearest(self, books: Tensor) -> Tensor:
        """Codes of the nearest entries, whatever the inputs."""
        return nearest_entries(self.points, books).T.contiguous()

    def spread(self, books: Tensor, block: int = 128) -> Tensor:
        """Codes found tile after tile in the factor's order, each making up for the errors of those before it.

        block: columns of which one product gathers the errors of all before.
        """
        root, whitening, dim = self.factor.root, self.whitening, self.dim
        weight = self.weight[:, self.factor.order]
        missing = torch.empty_like(weight)
        codes = weight.new_empty(weight.shape[0], self.tiles, dtype=torch.long)
        book = book_of_tiles(self.tiles, books.shape[0]).tolist()
        order = self._order.tolist()
        tiles_of_a_block = max(1, block // dim)
        for first in range(0, len(order), tiles_of_a_block):
            begin, end = first * dim, min(first + tiles_of_a_block, len(order)) * dim
            pulled = missing[:, :begin] @ root[:begin, begin:end]
            for start in range(begin, end, dim):
                stop, tile = start + dim, order[start // dim]
                metric, entries = whitening[tile], books[book[tile]]
                pull = pulled[:, start - begin : stop - begin]
                pull = pull + missing[:, begin:start] @ root[begin:start, start:stop]
                wanted = weight[:, start:stop] @ metric + pull
                codes[:, tile] = code = _nearest(wanted / self.scale, entries @ metric)
                missing[:, start:stop] = weight[:, start:stop] - entries[code] * self.scale
        return codes

    def best_codes(self, codes: Tensor, books: Tensor, moment: Tensor) -> Tensor:
        """Codes of which each, tile after tile, became the best given all others in its row."""
        codes, dim = codes.clone(), self.dim
        book = book_of_tiles(self.tiles, books.shape[0]).tolist()
        error = self.weight - self.values(codes, books)
        for tile in range(self.tiles):
            columns = slice(tile * dim, (tile + 1) * dim)
            own, entries = moment[columns, columns], books[book[tile]]
            lower = torch.linalg.cholesky(own)
            pull = torch.cholesky_solve((error @ moment[:, columns]).T, lower).T - error[:, columns]
            wanted = (self.weight[:, columns] + pull) / self.scale
            codes[:, tile] = code = _nearest(wanted @ lower, entries @ lower)
            error[:, columns] = self.weight[:, columns] - entries[code] * self.scale
        return codes

    def refitted(self, codes: Tensor, books: Tensor, moment: Tensor, steps: int) -> Tensor:
        """The entries of least error with these codes, by so many steps of conjugate gradients, rounded to whole units.

        Each step takes one product with H.
        """
        count, entries, dim = books.shape
        start = book_of_tiles(self.tiles, count, codes.device) * entries
        index = (codes + start).flatten()

        def gathered(of_weights: Tensor) -> Tensor:
            """The sum over all weights that an entry stands for [books · entries, d]."""
            pieces = (of_weights * self.scale).unflatten(1, (-1, dim)).flatten(0, 1)
            return pieces.new_zeros(count * entries, dim).index_add_(0, index, pieces)

        def normal(direction: Tensor) -> Tensor:
            return gathered((direction[index].view_as(self.weight) * self.scale) @ moment)

        found = books.flatten(0, 1)
        residual = gathered((self.weight - self.values(codes, books)) @ moment)
        diagonal = gathered(self.scale * moment.diagonal())
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
        direction = torch.zeros_like(found)
        before = residual.new_ones(())
        for _ in range(steps):
            preconditioned = inverse * residual
            now = (residual * preconditioned).sum()
            direction = preconditioned + (now / before) * direction
            product = normal(direction)
            curvature = (direction * product).sum()
            step = torch.where(curvature > 0, now / curvature, 0.0)
            found = found + step * direction
            residual = residual - step * product
            before = torch.where(now > 0, now, 1.0)
        return found.round().clamp(-ENTRY_LIMIT, ENTRY_LIMIT).view_as(books)

    @property
    def _order(self) -> Tensor:
        """The tiles in the factor's order [tiles]."""
        return self.factor.order[:: self.dim] // self.dim


def _nearest(points: Tensor, entries: Tensor) -> Tensor:
    """Indices [out] of the entries [entries, d] nearest to points [out, d]."""
    return ((entries * entries).sum(dim=1) - 2 * points @ entries.T).argmin(dim=1)
