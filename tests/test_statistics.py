"""Statistics of a stream that comes in pieces are those of the whole."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold.statistics import ROWS, InputStatistics

EVERYTHING = frozenset({"gram", "channels", "rows"})


def stream(tokens: int, width: int = 7) -> Tensor:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))
    x[:, 0] = torch.arange(tokens)  # a row says where it comes from
    x[:, 1] = x[:, 1].abs() + 1
    x[:, 2] = 0
    return x


def gathered(x: Tensor, pieces: list[int], expected: int | None = None) -> InputStatistics:
    statistics = InputStatistics(EVERYTHING, expected or x.shape[0])
    for piece in x.split(pieces):
        statistics.update(piece.unsqueeze(0))  # as a layer is given it: [batch, tokens, width]
    return statistics


@pytest.mark.parametrize("pieces", [[101], [1, 100], [33, 7, 1, 60], [1] * 101])
def test_pieces_of_odd_sizes_are_the_whole(pieces: list[int]) -> None:
    x = stream(101)
    found, whole = gathered(x, pieces), x.double().numpy()
    assert found.count == 101
    np.testing.assert_allclose(found.gram.numpy(), whole.T @ whole / 101, rtol=1e-5, atol=1e-5)
    assert found.minimum.tolist() == whole.min(axis=0).tolist()
    assert found.maximum.tolist() == whole.max(axis=0).tolist()
    assert found.absmax.tolist() == np.abs(whole).max(axis=0).tolist()
    np.testing.assert_allclose(found.absmean.numpy(), np.abs(whole).mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(found.rows.numpy(), whole)  # few enough to keep all


@pytest.mark.parametrize("tokens", [ROWS, ROWS + 1, 2 * ROWS - 1, 2 * ROWS, 5 * ROWS + 3])
@pytest.mark.parametrize("piece", [64, 777, 10**6])
def test_rows_are_at_most_so_many_and_evenly_spread(tokens: int, piece: int) -> None:
    x = stream(tokens, width=3)
    pieces = [min(piece, tokens - start) for start in range(0, tokens, piece)]
    rows = gathered(x, pieces).rows
    places = rows[:, 0].long()
    assert torch.equal(rows, x[places])
    assert ROWS / 2 < len(rows) <= ROWS
    assert places[0] == 0
    steps = places.diff().unique()
    assert len(steps) == 1  # the same distance everywhere, across the pieces' borders too
    assert tokens - int(places[-1]) <= int(steps)


def test_only_what_is_needed_is_kept() -> None:
    statistics = InputStatistics(frozenset({"channels"}), 4)
    statistics.update(torch.ones(2, 2, 3))
    assert statistics.absmax.tolist() == [1, 1, 1]
    with pytest.raises(AssertionError):
        _ = statistics.gram


def test_half_precision_is_summed_in_float32() -> None:
    """In bfloat16 a sum of ones would stop at 256."""
    statistics = InputStatistics(EVERYTHING, 1000)
    for _ in range(10):
        statistics.update(torch.ones(1, 100, 2, dtype=torch.bfloat16))
    assert statistics.gram.dtype == torch.float32
    assert statistics.gram.tolist() == [[1, 1], [1, 1]]
    assert statistics.absmean.tolist() == [1, 1]


def test_float64_stays_float64() -> None:
    statistics = InputStatistics(EVERYTHING, 8)
    statistics.update(stream(8).double() + 1e-12)
    kept = (statistics.gram, statistics.absmax, statistics.absmean, statistics.rows)
    assert {value.dtype for value in kept} == {torch.float64}


def test_cross_is_what_correlates_of_the_original_models_difference() -> None:
    x, original = stream(101), stream(101) * 1.5 + 1
    statistics = InputStatistics(frozenset({"cross"}), 101)
    for piece, exact in zip(x.split([33, 68]), original.split([33, 68]), strict=True):
        statistics.update(piece.unsqueeze(0), exact.unsqueeze(0))
    x64, exact64 = x.double().numpy(), original.double().numpy()
    expected = (exact64 - x64).T @ x64 / 101
    np.testing.assert_allclose(statistics.cross.numpy(), expected, rtol=1e-4, atol=1e-4)
