"""What the tests hold bitfold against: the mathematics in plain float64 loops, sharing nothing with the package."""

from collections.abc import Sequence

import numpy as np

__all__ = ["Rounded", "minifloats", "nearest_minifloat", "relative", "round_group", "round_tensor"]


class Rounded:
    """One group in few bits: codes q, scale s, zero-point z, and values s(q − z)."""

    def __init__(self, codes: list[int], scale: float, zero: int) -> None:
        self.codes, self.scale, self.zero = codes, scale, zero
        self.values = [scale * (code - zero) for code in codes]


def round_group(
    values: Sequence[float],
    bits: int,
    *,
    symmetric: bool,
    narrow: bool = False,
    limits: tuple[float, float] | None = None,
) -> Rounded:
    """q = clamp(round(x/s + z), qmin, qmax), z = qmin − round(min/s), in a range that contains 0."""
    qmin, qmax = -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    low, high = limits or (min(values), max(values))
    if low == high != 0 and limits is None:  # c is ±1 times |c|
        return Rounded([1 if low > 0 else -1] * len(values), abs(low), 0)
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        # A grid of 2ᵇ codes spans 2ᵇ − 1 steps around zero, a narrow one 2ᵇ − 2.
        scale, zero = 2 * max(-low, high) / (qmax - qmin), 0
    else:
        scale = (high - low) / (qmax - qmin)
        zero = qmin - round(low / scale) if scale else 0
    if scale == 0:
        return Rounded([zero] * len(values), 0.0, zero)
    return Rounded([min(max(round(x / scale + zero), qmin), qmax) for x in values], scale, zero)


def round_tensor(x: np.ndarray, size: int, bits: int, *, symmetric: bool) -> np.ndarray:
    """x̂ of an array whose last axis is cut in groups of `size`, each with the range of its values."""
    rows = x.astype(np.float64).reshape(-1, size)
    done = [round_group(row.tolist(), bits, symmetric=symmetric).values for row in rows]
    return np.array(done).reshape(x.shape)


def minifloats(exponent_bits: int, mantissa_bits: int, bias: int, count: int) -> list[float]:
    """The first `count` numbers ≥ 0 of a small floating point format, in the order of their codes."""
    found = []
    for code in range(count):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        assert exponent < 2**exponent_bits
        hidden = 2**mantissa_bits if exponent else 0
        found.append((hidden + mantissa) * 2.0 ** (max(exponent, 1) - bias - mantissa_bits))
    return found


def nearest_minifloat(x: float, numbers: Sequence[float]) -> int:
    """The code of the number nearest to x ≥ 0; of two as near, the even one."""
    return min(range(len(numbers)), key=lambda code: (abs(numbers[code] - x), code % 2))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found − expected‖ / ‖expected‖"""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
