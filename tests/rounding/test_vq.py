"""Vector quantization is the mathematics in plain loops, in float64, and never worse than the nearest entries."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics import CodebookShape, QuantizedTensor, TensorScheme
from bitfold.numerics.codebook import nearest_entries
from bitfold.rounding import Layer, Vq
from bitfold.rounding.gptq import moment_root
from bitfold.rounding.kmeans import kmeans_objective
from bitfold.rounding.tiles import Tiled
from bitfold.rounding.vq import first_books

ROWS, COLUMNS, ENTRIES = 12, 48, 9
DOUBLE = torch.float64
by_dim = pytest.mark.parametrize("dim", [1, 2, 4])
by_books = pytest.mark.parametrize("books", [1, 3])
SCHEME = TensorScheme(bits=2, symmetric=False, granularity="group", group_size=64)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _gram(size: int, seed: int = 0) -> Tensor:
    """A second moment of strongly correlated inputs of very different sizes."""
    inputs = _normal(400, 8, seed=seed) @ _normal(8, size, seed=seed + 1)
    inputs = (inputs + 0.3 * _normal(400, size, seed=seed + 2)) * _normal(size, seed=seed + 3).exp()
    return inputs.T @ inputs / 400


def _tiled(dim: int, gram: Tensor, seed: int = 0) -> Tiled:
    factor = moment_root(gram, 0.01, by_activation=True, width=dim)
    scale = _normal(ROWS, 1, seed=seed + 10).abs() * 0.1 + 0.02
    return Tiled(_normal(ROWS, COLUMNS, seed=seed + 11), scale, dim, factor)


def _books(books: int, dim: int, seed: int = 0) -> Tensor:
    return (_normal(books, ENTRIES, dim, seed=seed + 20) * 12).round()


def _damped(gram: Tensor) -> Tensor:
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=DOUBLE)


def _textbook(tiled: Tiled, books: np.ndarray, damped: np.ndarray) -> np.ndarray:
    """Tile after tile, the inverse of what is left formed anew, every entry tried on every row."""
    weight, dim, scale = tiled.weight.numpy().copy(), tiled.dim, tiled.scale.numpy()
    tiles = COLUMNS // dim
    power = [sum(damped[j, j] for j in range(t * dim, t * dim + dim)) for t in range(tiles)]
    order = sorted(range(tiles), key=lambda t: -power[t])
    codes = np.zeros((ROWS, tiles), dtype=int)
    while order:
        left = [tile * dim + place for tile in order for place in range(dim)]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        own, after = np.linalg.inv(inverse[:dim, :dim]), inverse[:dim, dim:]
        tile = order.pop(0)
        columns = slice(tile * dim, tile * dim + dim)
        for row in range(ROWS):
            errors = [
                weight[row, columns] - scale[row] * c for c in books[tile * len(books) // tiles]
            ]
            code = int(np.argmin([e @ own @ e for e in errors]))
            codes[row, tile] = code
            weight[row, left[dim:]] -= errors[code] @ own @ after
    return codes


@by_dim
@by_books
def test_the_textbook(dim: int, books: int) -> None:
    gram = _gram(COLUMNS)
    tiled, entries = _tiled(dim, gram), _books(books, dim)
    expected = _textbook(tiled, entries.numpy(), _damped(gram).numpy())
    found = tiled.spread(entries)
    assert np.array_equal(found.numpy(), expected)
    assert not torch.equal(found, tiled.nearest(entries))


@by_dim
@by_books
def test_with_independent_inputs_it_is_the_nearest_entry(dim: int, books: int) -> None:
    tiled, entries = _tiled(dim, torch.eye(COLUMNS, dtype=DOUBLE)), _books(books, dim)
    points = (tiled.weight / tiled.scale).unflatten(1, (-1, dim)).numpy()
    expected = np.zeros(points.shape[:2], dtype=int)
    for row, tile in np.ndindex(*points.shape[:2]):
        book = entries[tile * books // points.shape[1]].numpy()
        expected[row, tile] = ((points[row, tile] - book) ** 2).sum(-1).argmin()
    assert np.array_equal(tiled.nearest(entries).numpy(), expected)
    assert np.array_equal(tiled.spread(entries).numpy(), expected)


@by_dim
@by_books
def test_refitted_entries_are_the_least_squares(dim: int, books: int) -> None:
    """Before they are rounded, of weights [out · in] that depend linearly on all entries."""
    gram = _gram(COLUMNS)
    tiled, first = _tiled(dim, gram), _books(books, dim)
    codes, moment = tiled.spread(first), tiled.moment
    assert torch.allclose(moment, _damped(gram), rtol=1e-12)
    design = np.zeros((ROWS * COLUMNS, first.numel()))
    tiles = COLUMNS // dim
    for row, column in np.ndindex(ROWS, COLUMNS):
        tile = column // dim
        entry = (tile * books // tiles) * ENTRIES + int(codes[row, tile])
        design[row * COLUMNS + column, entry * dim + column % dim] = float(tiled.scale[row])
    half = np.kron(np.eye(ROWS), np.linalg.cholesky(moment.numpy()).T)
    wanted = half @ tiled.weight.numpy().flatten()
    exact = np.linalg.lstsq(half @ design, wanted, rcond=None)[0]
    least = ((half @ design @ exact - wanted) ** 2).sum()
    found = tiled.refitted(codes, first, moment, steps=400)
    used = design.any(axis=0)
    assert np.abs(found.numpy().flatten() - exact.clip(-127, 127))[used].max() <= 0.5 + 1e-6
    assert np.array_equal(found.flatten()[~used], first.flatten()[~used])
    assert float(tiled.row_errors(codes, found, moment).sum()) >= least - 1e-9


@by_dim
@by_books
def test_each_code_is_the_best_given_the_others(dim: int, books: int) -> None:
    gram = _gram(COLUMNS)
    tiled, entries = _tiled(dim, gram), _books(books, dim)
    moment, codes = tiled.moment, tiled.nearest(entries)
    before = tiled.row_errors(codes, entries, moment)
    found = tiled.best_codes(codes, entries, moment)
    after = tiled.row_errors(found, entries, moment)
    assert (after <= before * (1 + 1e-9)).all()
    assert float(after.sum()) < 0.9 * float(before.sum())
    for other in range(ENTRIES):  # of the last tile, which nothing came after
        changed = found.clone()
        changed[:, -1] = other
        assert (after <= tiled.row_errors(changed, entries, moment) + 1e-12).all()


@by_dim
def test_books_are_learned_in_the_metric_of_the_inverse(dim: int) -> None:
    """The metric of a tile is the inverse of its block of the inverse of what is left; units round to a half."""
    gram = _gram(COLUMNS)
    factor = moment_root(gram, 0.01, by_activation=True, width=dim)
    weight = _normal(ROWS, COLUMNS, seed=5)
    order, damped = factor.order.tolist(), _damped(gram).numpy()
    tiled = _tiled(dim, gram)
    for place in range(0, COLUMNS, dim):
        inverse = np.linalg.inv(damped[np.ix_(order[place:], order[place:])])
        own = tiled.whitening[order[place] // dim]
        assert np.allclose(own @ own.T, np.linalg.inv(inverse[:dim, :dim]), rtol=1e-6)
    shape = CodebookShape(dim=dim, entries=ENTRIES)
    found, books = first_books(weight, shape, DOUBLE, factor, 10)
    assert torch.equal(books, books.round())
    assert books.abs().max() == 112
    metric = found.whitening @ found.whitening.transpose(1, 2)
    every = found.points.flatten(0, 1)[:ENTRIES].unsqueeze(0)
    weights = found.scale.square().squeeze(1)
    errors = []
    for entries in (every, books):
        codes = nearest_entries(found.points, entries, metric)
        errors.append(float(kmeans_objective(found.points, metric, weights, entries, codes)))
    assert errors[1] < 0.8 * errors[0]


def _errors(weight: Tensor, tensor: QuantizedTensor, gram: Tensor) -> Tensor:
    difference = weight - tensor.dequantize(DOUBLE)
    return ((difference @ gram) * difference).sum(dim=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_row_is_worse_than_its_nearest_entries(seed: int, bits: int) -> None:
    weight, gram = _normal(64, 128, seed=seed), _gram(128, seed)
    scheme = SCHEME.model_copy(update={"bits": bits})
    layer = Layer(weight, (weight, weight), scheme)
    tensor = Vq(steps=5).solve_with({"w": layer}, torch.bfloat16, gram).tensors["w"]
    assert tensor.codebook is not None
    codebook = tensor.scheme.codebook
    assert codebook is not None
    assert tensor.codes.dtype == torch.uint8
    assert int(tensor.codes.max()) < codebook.entries
    assert tensor.codebook.abs().max() <= 127
    assert tensor.bits_per_weight <= bits + (16 + bits) / 64
    tiled = Tiled(
        weight, tensor.scale.double(), codebook.dim, moment_root(gram, 0.01, by_activation=False)
    )
    nearest = QuantizedTensor(
        tiled.nearest(tensor.codebook.double()),
        tensor.scale,
        None,
        tensor.scheme,
        codebook=tensor.codebook,
    )
    before, after = (_errors(weight, one, gram) for one in (nearest, tensor))
    assert (after <= before * (1 + 1e-9)).all()
    assert float(after.sum()) < 0.6 * float(before.sum())


def test_a_turn_never_makes_it_worse() -> None:
    weight, gram = _normal(64, 128, seed=1), _gram(128)
    layer = {"w": Layer(weight, (weight, weight), SCHEME)}
    damped = _damped(gram)
    found = [
        Vq(rounds=rounds, keep_better=False).solve_with(layer, torch.bfloat16, gram).tensors["w"]
        for rounds in range(4)
    ]
    errors = [float(_errors(weight, tensor, damped).sum()) for tensor in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_a_turn_that_makes_it_worse_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = _normal(64, 128, seed=1), _gram(128)
    layer = {"w": Layer(weight, (weight, weight), SCHEME)}
    expected = Vq(rounds=0).solve_with(layer, torch.bfloat16, gram).tensors["w"]
    monkeypatch.setattr(Tiled, "refitted", lambda tiled, codes, books, moment, steps: books * 0)
    found = Vq(rounds=2).solve_with(layer, torch.bfloat16, gram).tensors["w"]
    assert torch.equal(found.dequantize(), expected.dequantize())


def test_rows_and_inputs_of_nothing() -> None:
    """A row of zeros, an input that nothing reaches, and a weight of zeros."""
    weight, gram = _normal(64, 128, seed=1).float(), _gram(128).float()
    weight[3] = 0
    gram[5] = gram[:, 5] = 0
    for one in (weight, torch.zeros_like(weight)):
        layer = Layer(one, (one, one), SCHEME)
        for dtype in (torch.bfloat16, torch.float16):
            tensor = Vq().solve_with({"w": layer}, dtype, gram).tensors["w"]
            values = tensor.dequantize()
            assert values.isfinite().all()
            assert values[3].abs().max() < 1e-4


def test_layers_are_the_same_alone_and_together() -> None:
    gram = _gram(128)
    layers = {
        name: Layer(weight, (weight, weight), SCHEME)
        for name, weight in (("a", _normal(64, 128, seed=1)), ("b", _normal(256, 128, seed=2)))
    }
    together = Vq(steps=3).solve_with(layers, torch.bfloat16, gram).tensors
    for name, layer in layers.items():
        alone = Vq(steps=3).solve_with({name: layer}, torch.bfloat16, gram).tensors[name]
        assert torch.equal(alone.dequantize(), together[name].dequantize())


@pytest.mark.parametrize(
    ("vq", "scheme", "said"),
    [
        (Vq(), TensorScheme(grid="nf4", bits=4), "has the grid nf4"),
        (Vq(), SCHEME.model_copy(update={"kept": 2}), "use --method salient"),
        (Vq(dim=7), SCHEME, r"No codebook of vq.dim=7 for the weight \[128, 256\] of layer fits"),
        (Vq(dim=2, books=3), SCHEME, "vq.dim=2 vq.books=3 .* leave these options out"),
        (Vq(dim=1), TensorScheme(bits=2, granularity="tensor"), "or take more bits or smaller"),
    ],
)
def test_refusals(vq: Vq, scheme: TensorScheme, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        vq.stored_as("layer", scheme, (128, 256), torch.bfloat16)
