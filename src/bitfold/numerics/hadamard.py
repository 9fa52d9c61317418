"""Hadamard matrices of the sizes that models have, and a fast transform by them.

A matrix of ±1 with orthogonal rows: H Hᵀ = n I. Sizes double by Sylvester's H₂ₙ = H₂ ⊗ Hₙ; the others begin at
one of Paley's (1933), made of the quadratic character χ of a finite field of q elements: q + 1 where q ≡ 3 (mod 4),
2(q + 1) where q ≡ 1 (mod 4). So there is one for 12, 20, 28, 36, 44, 52, 60, 76, 84, 108, 140, 148, 344 … times 2ᵏ.
"""

from functools import lru_cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["hadamard_additions", "hadamard_matrix", "hadamard_size", "hadamard_transform"]

# Beyond this a field's table of differences takes too long to be worth it.
_LARGEST_FIELD = 1024
# A factor of the transform: products with matrices of this size are as quick as additions, and fewer.
_LARGEST_FACTOR = 64


def hadamard_matrix(size: int) -> Tensor:
    """A Hadamard matrix [size, size] of ±1, float64.

    Raises ValueError where none is known here: see `hadamard_size`.
    """
    core = _core(size)
    if core is None:
        raise ValueError(f"no Hadamard matrix of size {size} is known here")
    matrix = _paley(core) if core > 1 else np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]]))
    return torch.from_numpy(matrix.astype(np.float64))


def hadamard_size(width: int) -> int:
    """The largest divisor of a width for which there is a Hadamard matrix; 1 where there is no other.

    >>> [hadamard_size(width) for width in (4096, 11008, 768, 1000, 7)]
    [4096, 11008, 768, 1000, 1]
    """
    divisors = (d for d in range(width, 0, -1) if width % d == 0)
    return next(d for d in divisors if _core(d) is not None)


def hadamard_transform(x: Tensor) -> Tensor:
    """x H / √n along the axis before the last, for x [..., n, inner], in x's dtype.

    By the Kronecker factors of H, all but Paley's matrix of at most 64: O(n log n) for a Paley matrix of one size.
    """
    size, inner = x.shape[-2:]
    found = x.reshape(-1, size * inner)
    left = 1
    for factor in _factors(size):
        matrix = _scaled(factor, x.dtype, x.device)
        right = size * inner // (left * factor)
        pieces = found.view(-1, factor, right)
        # x H: columns of H with the values of x, so it is Hᵀ that stands on the left.
        found = pieces.flatten(1) @ matrix if right == 1 else matrix.T @ pieces
        found = found.reshape(-1, size * inner)
        left *= factor
    return found.view(x.shape)


def hadamard_additions(size: int) -> int:
    """Additions for each value of a row that a fast transform takes: the size of Paley's matrix in it, which has
    no fast one of its own, and one for every doubling.

    >>> [hadamard_additions(size) for size in (1, 64, 12, 768)]
    [0, 6, 12, 18]
    """
    core = _core(size)
    assert core is not None
    return (core if core > 1 else 0) + (size // core).bit_length() - 1


def _core(size: int) -> int | None:
    """The size of Paley's matrix that is doubled to get there; 1 for powers of two; None if there is none."""
    if size < 1:
        return None
    core = size & -size
    if core == size:
        return 1
    start = size // core * 4
    while start <= size:
        if _field(start) is not None:
            return start
        start *= 2
    return None


def _field(size: int) -> tuple[int, int, int] | None:
    """Of Paley's construction of this size: (prime, power, 1 or 2)."""
    for kind, order in ((1, size - 1), (2, size // 2 - 1)):
        prime_power = _prime_power(order)
        if prime_power is not None and order <= _LARGEST_FIELD and order % 4 == (3, 1)[kind - 1]:
            return *prime_power, kind
    return None


def _prime_power(order: int) -> tuple[int, int] | None:
    """(prime, power) of an order of a finite field."""
    prime = next((d for d in range(2, order + 1) if order % d == 0), 0)
    power = 0
    while prime and order % prime == 0:
        order, power = order // prime, power + 1
    return (prime, power) if order == 1 and power else None


def _paley(size: int) -> NDArray[np.int64]:
    found = _field(size)
    assert found is not None
    prime, power, kind = found
    character = _jacobsthal(prime, power)
    count = len(character)
    bordered = np.ones((count + 1, count + 1), dtype=np.int64)
    bordered[0, 0] = 0
    bordered[1:, 1:] = character
    if kind == 1:
        bordered[1:, 0] = -1
        return np.eye(count + 1, dtype=np.int64) + bordered
    # Conference matrix C, symmetric: C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]].
    turned = np.kron(bordered, np.array([[1, 1], [1, -1]]))
    return turned + np.kron(np.eye(count + 1, dtype=np.int64), np.array([[1, -1], [-1, -1]]))


def _jacobsthal(prime: int, power: int) -> NDArray[np.int64]:
    """χ(a − b) for all elements of the field of prime^power elements: 0, 1 for squares, −1 for others."""
    elements = np.array(list(product(range(prime), repeat=power)))
    place = prime ** np.arange(power)[::-1]
    modulus = _irreducible(prime, power)
    squares = {int(_times(a, a, modulus, prime) @ place) for a in elements if a.any()}
    character = np.array([0] + [1 if i in squares else -1 for i in range(1, len(elements))])
    differences = (elements[:, None] - elements[None]) % prime
    result: NDArray[np.int64] = character[differences @ place]
    return result


def _times(
    a: NDArray[np.int64], b: NDArray[np.int64], modulus: NDArray[np.int64], prime: int
) -> NDArray[np.int64]:
    """The product of two polynomials, highest coefficients first, modulo one that begins with 1."""
    found = np.convolve(a, b) % prime
    degree = len(modulus) - 1
    for i in range(len(found) - degree):
        found[i : i + degree + 1] = (found[i : i + degree + 1] - found[i] * modulus) % prime
    result: NDArray[np.int64] = found[len(found) - degree :] if degree > 1 else found[-1:]
    return result


def _irreducible(prime: int, power: int) -> NDArray[np.int64]:
    """A polynomial of this degree without factors, modulo a prime; x itself for degree 1."""
    if power == 1:
        return np.array([1, 0])
    reducible = set()
    for degree in range(1, power // 2 + 1):
        for first in product(range(prime), repeat=degree):
            for second in product(range(prime), repeat=power - degree):
                both = np.convolve([1, *first], [1, *second]) % prime
                reducible.add(tuple(both.tolist()))
    candidates = ((1, *rest) for rest in product(range(prime), repeat=power))
    return np.array(next(one for one in candidates if one not in reducible))


def _factors(size: int) -> list[int]:
    """Sizes whose matrices' Kronecker product is `hadamard_matrix(size)`."""
    core = _core(size)
    assert core is not None
    factors, rest = [core] if core > 1 else [], size // core
    while rest > 1:
        factors.append(min(rest, _LARGEST_FACTOR))
        rest //= factors[-1]
    return factors


@lru_cache(maxsize=32)
def _scaled(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):  # what is kept must serve training too
        return (hadamard_matrix(size) / size**0.5).to(device, dtype)
