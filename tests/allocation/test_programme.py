"""The integer programme against every choice there is, and the Pareto curve against the programme."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitfold.allocation import Limit, choose, pareto_curve, smallest
from bitfold.allocation.programme import total

Rows = list[list[float]]
COSTS = st.floats(0, 10, allow_subnormal=False).map(lambda x: 0.0 if x < 1e-6 else x)
SIZES = st.integers(1, 10**9)


@st.composite
def programmes(draw: st.DrawFn) -> tuple[Rows, Rows, Rows, float, float]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    costs, amounts, seconds = (
        [draw(st.lists(values, min_size=n, max_size=n)) for n in sizes]
        for values in (COSTS, SIZES, st.floats(0, 1))
    )
    most = sum(map(max, amounts))
    at_most = draw(st.integers(0, most + 1))
    return costs, amounts, seconds, at_most, draw(st.floats(0, len(sizes)))


def best(costs: Rows, limits: list[Limit]) -> float | None:
    """The least cost, by trying everything."""
    found = [
        total(costs, chosen)
        for chosen in product(*(range(len(row)) for row in costs))
        if all(total(limit.amounts, chosen) <= limit.at_most for limit in limits)
    ]
    return min(found, default=None)


@settings(max_examples=60)
@given(programmes(), st.sampled_from([1, 2]))
def test_as_good_as_every_choice(case: tuple[Rows, Rows, Rows, float, float], count: int) -> None:
    costs, amounts, seconds, at_most, time = case
    limits = [Limit(amounts, at_most), Limit(seconds, time)][:count]
    chosen = choose(costs, limits)
    least = best(costs, limits)
    if least is None:
        assert chosen is None
        return
    assert chosen is not None
    for limit in limits:
        assert total(limit.amounts, chosen) <= limit.at_most
    # 1e-9 of the largest cost is where the solver stops.
    assert total(costs, chosen) == pytest.approx(least, rel=1e-9, abs=2e-8)


def test_small_costs_count() -> None:
    """Sensitivities of 8 bits are a millionth of those of 2: they still decide."""
    costs = [[0.0, 1e-7, 0.1], [0.0, 3e-7, 0.1], [0.0, 2e-7, 10.0]]
    sizes = [[16, 8, 2]] * 3
    assert choose(costs, [Limit(sizes, 40)]) == (1, 0, 0)
    assert choose(costs, [Limit(sizes, 32)]) == (1, 0, 1)


def test_the_budget_is_kept_to_the_byte() -> None:
    sizes = [[10**9 + 1, 10**9], [3, 1]]
    assert choose([[0.0, 1.0], [0.0, 1.0]], [Limit(sizes, 10**9 + 3)]) in ((0, 1), (1, 0))
    assert choose([[0.0, 1.0], [0.0, 1.0]], [Limit(sizes, 10**9 + 4)]) == (0, 0)
    assert choose([[0.0, 1.0], [0.0, 1.0]], [Limit(sizes, 10**9 + 1)]) == (1, 1)
    assert choose([[0.0, 1.0], [0.0, 1.0]], [Limit(sizes, 10**9)]) is None


def test_nothing_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS writes to C's stdout on its own account; --json has it for itself."""
    print("before")
    for step in range(20):
        costs = [[(1 + g % 7) * 4.0**-b * (1 + 0.1 * step) for b in range(2, 9)] for g in range(24)]
        sizes = [[(b * 128 + 20 - b) * 96 * (1 + g % 3) for b in range(2, 9)] for g in range(24)]
        choose(costs, [Limit(sizes, (1.2 + 0.1 * step) * smallest(sizes))])
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


def test_without_limits_and_without_groups() -> None:
    assert choose([[2.0, 1.0], [0.0, 0.0]], [])[0] == 1  # type: ignore[index]
    assert choose([], []) == ()


def test_a_large_one_is_solved() -> None:
    """224 groups of 7 candidates, a model of 7 billion weights fused per layer."""
    bits = [16, 8.2, 6.2, 5.2, 4.2, 3.2, 2.2]
    costs = [[(1 + g % 17) * 4.0**-b * (b < 16) for b in bits] for g in range(224)]
    sizes = [[int(b * 2**21) * (1 + g % 3) for b in bits] for g in range(224)]
    limit = Limit(sizes, 1.5 * smallest(sizes))
    chosen = choose(costs, [limit])
    assert chosen is not None
    assert total(sizes, chosen) <= limit.at_most
    # No exchange of two choices makes it better.
    spent, cost = total(sizes, chosen), total(costs, chosen)
    for a in range(0, 224, 31):
        for b in range(1, 224, 29):
            for i, j in product(range(7), repeat=2):
                other = list(chosen)
                other[a], other[b] = i, j
                if total(sizes, other) <= limit.at_most:
                    assert total(costs, other) >= cost * (1 - 1e-9)
    assert spent > 0.99 * limit.at_most


@settings(max_examples=25)
@given(programmes())
def test_the_curve_is_of_optima(case: tuple[Rows, Rows, Rows, float, float]) -> None:
    costs, amounts, *_ = case
    curve = pareto_curve(costs, amounts, points=5)
    assert curve
    assert curve[0].amount >= smallest(amounts)
    assert curve[-1].cost == pytest.approx(best(costs, []), abs=2e-8)
    for point in curve:
        assert point.amount == total(amounts, point.chosen)
        assert point.cost == pytest.approx(
            best(costs, [Limit(amounts, point.amount)]), rel=1e-9, abs=2e-8
        )
    for before, after in pairwise(curve):
        assert before.amount < after.amount
        assert before.cost > after.cost
