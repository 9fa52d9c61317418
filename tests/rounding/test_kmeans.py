"""k-means is the plain one in loops, and its objective never increases."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold.numerics import codebook as module
from bitfold.numerics.codebook import nearest_entries
from bitfold.rounding.kmeans import kmeans, kmeans_objective

TILES, ROWS, ENTRIES = 6, 40, 7
by_dim = pytest.mark.parametrize("dim", [1, 2, 3])
by_books = pytest.mark.parametrize("books", [1, 2, 3])


def _problem(dim: int, books: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, metrics, weights and first books, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    half = normal(TILES, dim, dim)
    metric = half @ half.transpose(1, 2) + 0.1 * torch.eye(dim, dtype=torch.float64)
    return normal(TILES, ROWS, dim), metric, normal(ROWS).abs(), normal(books, ENTRIES, dim)


def _step(
    x: np.ndarray, m: np.ndarray, w: np.ndarray, books: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest entries, and the entries' optimum given them, in loops."""
    count, dim = len(books), x.shape[2]
    codes = np.zeros(x.shape[:2], dtype=int)
    left, right = np.zeros((*books.shape, dim)), np.zeros(books.shape)
    for tile in range(TILES):
        book = tile * count // TILES
        for row in range(ROWS):
            errors = [(x[tile, row] - c) @ m[tile] @ (x[tile, row] - c) for c in books[book]]
            code = codes[tile, row] = int(np.argmin(errors))
            left[book, code] += w[row] * m[tile]
            right[book, code] += w[row] * m[tile] @ x[tile, row]
    new = books.copy()
    for index in np.ndindex(*books.shape[:2]):
        if left[index].any():
            new[index] = np.linalg.solve(left[index], right[index])
    return codes, new


@by_dim
@by_books
def test_the_loops(dim: int, books: int) -> None:
    points, metric, weight, first = _problem(dim, books)
    expected = first.numpy()
    for steps in range(1, 4):
        codes, expected_next = _step(points.numpy(), metric.numpy(), weight.numpy(), expected)
        found = nearest_entries(points, torch.from_numpy(expected), metric)
        assert np.array_equal(found.numpy(), codes)
        expected = expected_next
        # The ridge pulls an entry by less than 1e-5 of its way.
        assert np.allclose(kmeans(points, metric, weight, first, steps), expected, atol=1e-5)


@by_dim
@by_books
@pytest.mark.parametrize("seed", range(3))
def test_the_objective_never_increases(dim: int, books: int, seed: int) -> None:
    points, metric, weight, entries = _problem(dim, books, seed)
    before = torch.inf
    for _ in range(12):
        codes = nearest_entries(points, entries, metric)
        assigned = float(kmeans_objective(points, metric, weight, entries, codes))
        entries = kmeans(points, metric, weight, entries, 1)
        moved = float(kmeans_objective(points, metric, weight, entries, codes))
        assert assigned <= before
        assert moved <= assigned * (1 + 1e-9)
        before = moved
    first = _problem(dim, books, seed)[3]
    codes = nearest_entries(points, first, metric)
    assert before < 0.7 * float(kmeans_objective(points, metric, weight, first, codes))


def test_with_an_identity_it_is_plain_k_means() -> None:
    points, _, _, entries = _problem(2, 1)
    eye = torch.eye(2, dtype=torch.float64).expand(TILES, -1, -1)
    flat, centres = points.flatten(0, 1).numpy(), entries[0].numpy().copy()
    for _ in range(5):
        codes = ((flat[:, None] - centres) ** 2).sum(-1).argmin(1)
        for code in set(codes):
            centres[code] = flat[codes == code].mean(0)
    found = kmeans(points, eye, torch.ones(ROWS, dtype=torch.float64), entries, 5)
    assert np.allclose(found[0], centres, atol=1e-5)


def test_an_entry_that_nothing_is_near_to_stays() -> None:
    points, metric, weight, entries = _problem(2, 1)
    entries[0, 3] = 1e3
    found = kmeans(points, metric, weight, entries, 3)
    assert torch.equal(found[0, 3], entries[0, 3])
    nothing = kmeans(points, metric, torch.zeros_like(weight), entries, 3)
    assert torch.equal(nothing, entries)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points, metric, _, entries = _problem(2, 3)
    whole = nearest_entries(points, entries, metric)
    monkeypatch.setattr(module, "_DISTANCES", 1)
    assert torch.equal(nearest_entries(points, entries, metric), whole)
