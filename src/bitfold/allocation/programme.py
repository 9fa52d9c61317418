"""The integer programme: one candidate for every group, the least total cost within the limits, exactly.

    minimise Σ c[g][i] x[g][i]    subject to  Σᵢ x[g][i] = 1 for every g,  Σ a[g][i] x[g][i] ≤ limit,  x ∈ {0, 1}

It is solved by branch and bound (HiGHS, through scipy). Nothing here knows what a layer is.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

__all__ = ["Limit", "choose", "smallest", "total"]

# HiGHS stops where its bounds are within 1e-6 of each other: here 1e-9 of the largest cost.
_LARGEST_COST = 1e3


@dataclass(frozen=True)
class Limit:
    """amounts: [groups][candidates], what a choice takes; at_most: of all choices together."""

    amounts: Sequence[Sequence[float]]
    at_most: float


def choose(costs: Sequence[Sequence[float]], limits: Sequence[Limit]) -> tuple[int, ...] | None:
    """The index of the chosen candidate of every group, from costs [groups][candidates] ≥ 0; None where no choice
    is within the limits."""
    if not costs:
        return ()
    sizes = [len(row) for row in costs]
    starts = np.cumsum([0, *sizes])
    columns = int(starts[-1])
    flat = np.concatenate([np.asarray(row, dtype=float) for row in costs])
    # Equal costs of nothing at all would leave the solver's scale undefined.
    scaled = flat * (_LARGEST_COST / max(flat.max(), 1e-300)) if flat.any() else flat
    once = csr_array(
        (np.ones(columns), (np.repeat(np.arange(len(sizes)), sizes), np.arange(columns))),
        shape=(len(sizes), columns),
    )
    constraints = [LinearConstraint(once, 1, 1)]
    for limit in limits:
        constraints.append(_constraint(limit))
    while True:
        with _quiet():
            found = milp(
                scaled,
                integrality=np.ones(columns, dtype=int),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0},
            )
        if found.x is None:
            return None
        chosen = tuple(int(np.argmax(found.x[start:end])) for start, end in pairwise(starts))
        if all(total(limit.amounts, chosen) <= limit.at_most for limit in limits):
            return chosen
        # The solver's tolerance let a choice through that is over the limit by a little: without this one, again.
        taken = np.zeros(columns)
        taken[starts[:-1] + np.asarray(chosen)] = 1
        constraints.append(LinearConstraint(csr_array(taken[np.newaxis]), -np.inf, len(sizes) - 1))


def _constraint(limit: Limit) -> LinearConstraint:
    """A limit, counted from the least that every group takes and in units of the largest difference: the solver's
    tolerances are absolute, and bytes are large numbers."""
    least = [min(row) for row in limit.amounts]
    row = np.concatenate(
        [np.asarray(row) - low for row, low in zip(limit.amounts, least, strict=True)]
    )
    unit = max(float(row.max()), 1e-300)
    return LinearConstraint(
        csr_array(row[np.newaxis] / unit), -np.inf, (limit.at_most - sum(least)) / unit
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this context what C writes to stdout is dropped: HiGHS writes a line there, whatever it is told, each time
    that a solution is within its tolerances only, and stdout belongs to `--json`."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C has buffers of its own
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def smallest(amounts: Sequence[Sequence[float]]) -> float:
    """The least that any choice takes."""
    return sum(min(row) for row in amounts)


def total(amounts: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    """What a choice takes."""
    return sum(row[index] for row, index in zip(amounts, chosen, strict=True))
