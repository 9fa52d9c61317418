"""The Pareto curve: the least cost at every budget, and what nothing is both smaller and better than."""

from collections.abc import Sequence
from dataclasses import dataclass

from bitfold.allocation.programme import Limit, choose, smallest, total

__all__ = ["Point", "pareto_curve"]


@dataclass(frozen=True)
class Point:
    """A choice of a candidate for every group, what it takes and what it costs."""

    amount: float
    cost: float
    chosen: tuple[int, ...]


def pareto_curve(
    costs: Sequence[Sequence[float]], amounts: Sequence[Sequence[float]], points: int = 16
) -> tuple[Point, ...]:
    """The best choices, [groups][candidates] of each, at budgets from the least to the most that makes a difference,
    each the same factor above the last; in order of rising amount, and falling cost.

    Every point is an optimum of the programme; between two of them there may be more.
    """
    least = smallest(amounts)
    # Beyond what the cheapest choice takes, a larger budget changes nothing.
    free = choose(costs, [])
    assert free is not None
    most = max(least, total(amounts, free))
    curve: list[Point] = []
    ratio = most / least if least else 1.0
    # Powers are not exact, and the ends have to be.
    between = [least * ratio ** (step / (points - 1)) for step in range(1, points - 1)]
    for budget in (least, *between, most):
        chosen = choose(costs, [Limit(amounts, budget)])
        if chosen is None:  # the last digit of a sum
            continue
        point = Point(total(amounts, chosen), total(costs, chosen), chosen)
        if not curve or (point.amount > curve[-1].amount and point.cost < curve[-1].cost):
            curve.append(point)
    return tuple(curve)
