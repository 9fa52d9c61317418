"""Vector quantization of weights, GPTVQ's way (van Baalen et al. 2024, arXiv 2402.15319).

A row is cut into tiles of d adjacent weights, and a tile becomes an entry of a codebook times the row's scale. Tiles
are taken in GPTQ's order. With the Cholesky factor U of the inverse second moment, H⁻¹ = UᵀU, and a tile's columns J:

    e_J = (w_J − s c_k) U_JJ⁻¹,  k = argmin ‖e_J‖²        W_{:, later} ← W_{:, later} − e_J U_{J, later}

which is GPTQ where d = 1. The codebook is learned before, by k-means on w_J / s in the metric ‖x U_JJ⁻¹‖²; afterwards
both are refitted by turns: the entries' least squares given all codes (conjugate gradients), and each tile's best code
given all others. A turn that does not lower tr(Δ H Δᵀ) is the last, and is not kept.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics import CodebookShape, QuantizedTensor, TensorScheme
from bitfold.numerics.stored_scale import storable_scale
from bitfold.part import Need
from bitfold.rounding.codebook_size import best_shape
from bitfold.rounding.gptq import MomentRoot, moment_root
from bitfold.rounding.kmeans import first_entries, kmeans
from bitfold.rounding.rounding import Layer, Rounded, Rounding
from bitfold.rounding.tiles import Tiled
from bitfold.statistics import InputStatistics

__all__ = ["Vq", "first_books"]

# The largest magnitude in an entry at first: what is refitted later has room to grow.
_FIRST_ENTRIES = 112
_CONJUGATE_STEPS = 20
# k-means learns an entry from about so many tiles; of larger weights it takes rows at even distances.
_TILES_OF_AN_ENTRY = 256


class Vq(Rounding):
    """dim: weights that share a code. books: codebooks of a layer, each for equally many adjacent columns. What is not
    given is chosen, and the number of entries always, so that a layer takes at most the bits of the scheme's integers.
    steps: of k-means. rounds: most turns of refitting entries and codes. damping: as of gptq. keep_better: per row, the
    nearest entries where they have the smaller error."""

    needs = frozenset[Need]({"gram"})
    reads_limits = False

    dim: int | None = Field(default=None, ge=1, le=8)
    books: int | None = Field(default=None, ge=1)
    steps: int = Field(default=20, ge=1)
    rounds: int = Field(default=3, ge=0)
    damping: float = Field(default=0.01, gt=0)
    keep_better: bool = True

    def stored_as(
        self, name: str, scheme: TensorScheme, shape: tuple[int, int], scale_dtype: torch.dtype
    ) -> TensorScheme:
        """See `Stores.stored_as`: a codebook of no more bits than the integers that are asked for."""
        if scheme.grid != "int":
            raise RecipeError(
                f"vq reads from a scheme of integers how many bits it may take, and {name} has the grid {scheme.grid}: "
                "write a scheme such as w2a16g64."
            )
        scheme = super().stored_as(name, scheme, shape, scale_dtype)
        budget = QuantizedTensor.empty(shape, scheme, scale_dtype, device="meta").bits
        codebook = best_shape(shape, budget, scale_dtype, self.dim, self.books)
        if codebook is None:
            asked = {"vq.dim": self.dim, "vq.books": self.books}
            given = " ".join(f"{key}={value}" for key, value in asked.items() if value is not None)
            raise RecipeError(
                f"No codebook{f' of {given}' if given else ''} for the weight {list(shape)} of {name} fits in the "
                f"{budget / (shape[0] * shape[1]):.3f} bits per weight of the scheme: "
                f"{'leave these options out, or ' if given else ''}take more bits or smaller groups."
            )
        return TensorScheme(grid="codebook", bits=scheme.bits, codebook=codebook)

    def solve(
        self,
        layers: Mapping[str, Layer],
        scale_dtype: torch.dtype,
        statistics: InputStatistics | None = None,
    ) -> Rounded:
        """See `Rounding.solve`. Limits are not read."""
        assert statistics is not None
        return self.solve_with(layers, scale_dtype, statistics.gram)

    def solve_with(
        self, layers: Mapping[str, Layer], scale_dtype: torch.dtype, gram: Tensor
    ) -> Rounded:
        """The same, given H [in, in]."""
        factors: dict[int, MomentRoot] = {}
        tensors = {}
        for name, layer in layers.items():
            rows, columns = layer.weight.shape
            scheme = self.stored_as(name, layer.scheme, (rows, columns), scale_dtype)
            assert scheme.codebook is not None
            dim = scheme.codebook.dim
            if dim not in factors:
                factors[dim] = moment_root(gram, self.damping, by_activation=True, width=dim)
            tensors[name] = self._solve_layer(layer.weight, scheme, scale_dtype, factors[dim], gram)
        return Rounded(tensors)

    def _solve_layer(
        self,
        weight: Tensor,
        scheme: TensorScheme,
        scale_dtype: torch.dtype,
        factor: MomentRoot,
        gram: Tensor,
    ) -> QuantizedTensor:
        assert scheme.codebook is not None
        weight = weight.to(factor.root.dtype)
        tiled, books = first_books(weight, scheme.codebook, scale_dtype, factor, self.steps)
        codes, books = _refined(tiled, tiled.spread(books), books, self.rounds)
        if self.keep_better:
            codes = _better_rows(tiled, codes, books, gram.to(weight.dtype))
        return QuantizedTensor(
            codes.to(torch.uint8),
            tiled.scale.to(scale_dtype),
            None,
            scheme,
            codebook=books.to(torch.int8),
        )


def first_books(
    weight: Tensor,
    shape: CodebookShape,
    scale_dtype: torch.dtype,
    factor: MomentRoot,
    steps: int,
) -> tuple[Tiled, Tensor]:
    """A weight [out, in] in tiles, scaled so that its codebooks [books, entries, dim], learned by k-means, hold whole
    numbers. k-means begins with tiles that stand at even distances from each other.
    """
    tiny = torch.finfo(torch.float32).tiny
    size = weight.square().mean(dim=1, keepdim=True).sqrt().clamp(min=tiny)
    tiled = Tiled(weight, size, shape.dim, factor)
    tiles_of_a_book = weight.numel() // (shape.dim * shape.books)
    every = max(1, tiles_of_a_book // (shape.entries * _TILES_OF_AN_ENTRY))
    points = tiled.points[:, ::every]
    first = first_entries(points, shape.books, shape.entries)
    metric = tiled.whitening @ tiled.whitening.transpose(1, 2)
    books = kmeans(points, metric, size[::every].square().squeeze(1), first, steps)
    unit = (books.abs().amax() / _FIRST_ENTRIES).clamp(min=tiny)
    scale = storable_scale(size * unit, scale_dtype)
    return Tiled(weight, scale, shape.dim, factor), (books / unit).round()


def _refined(tiled: Tiled, codes: Tensor, books: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Codes and codebooks after turns of refitting both, as long as the error falls."""
    moment = tiled.moment
    least = tiled.row_errors(codes, books, moment).sum()
    for _ in range(rounds):
        new_books = tiled.refitted(codes, books, moment, _CONJUGATE_STEPS)
        new_codes = tiled.best_codes(codes, new_books, moment)
        error = tiled.row_errors(new_codes, new_books, moment).sum()
        if not error < least:
            break
        codes, books, least = new_codes, new_books, error
    return codes, books


def _better_rows(tiled: Tiled, codes: Tensor, books: Tensor, gram: Tensor) -> Tensor:
    """Per row these codes, or those of the nearest entries where they have the smaller error."""
    nearest = tiled.nearest(books)
    better = tiled.row_errors(codes, books, gram) <= tiled.row_errors(nearest, books, gram)
    return torch.where(better.unsqueeze(1), codes, nearest)
