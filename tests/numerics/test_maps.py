"""The maps that run, against dense matrices; what they cost."""

import pytest
import torch
from torch import Tensor

from bitfold.numerics import (
    MapShape,
    aligned,
    apply_map,
    for_queries,
    hadamard_matrix,
    turn_heads,
)

FLOAT64 = torch.float64


def _random(shape: MapShape) -> dict[str, Tensor]:
    tensors = {name: torch.randn(size, dtype=FLOAT64) for name, size in shape.tensors.items()}
    return {name: v.sign() if name == "signs" else v for name, v in tensors.items()}


def _dense(shape: MapShape, tensors: dict[str, Tensor]) -> Tensor:
    """M of x ↦ x M."""
    if shape.kind == "blocks":
        return torch.block_diag(*tensors["weight"]).T
    if shape.kind == "kronecker":
        return torch.kron(tensors["left"], tensors["right"])
    copies, size, inner = shape.shape
    one = torch.kron(hadamard_matrix(size) / size**0.5, torch.eye(inner, dtype=FLOAT64))
    return tensors["signs"].flatten()[:, None] * torch.block_diag(*[one] * copies)


@pytest.mark.parametrize(
    ("shape", "operations", "numbers"),
    [
        (MapShape("blocks", (1, 24)), 24 * 24, 24 * 24),
        (MapShape("blocks", (4, 6)), 24 * 6, 4 * 36),
        (MapShape("hadamard", (1, 24, 1)), 24 * (12 + 1), 24),
        (MapShape("hadamard", (3, 4, 2)), 24 * 2, 24),
        (MapShape("hadamard", (24, 1, 1)), 0, 24),
        (MapShape("kronecker", (4, 6)), 24 * 10, 16 + 36),
    ],
)
def test_a_map_is_its_matrix(shape: MapShape, operations: int, numbers: int) -> None:
    tensors = _random(shape)
    x = torch.randn(2, 5, 24, dtype=FLOAT64)
    found = apply_map(x, tensors)
    assert torch.allclose(found, x @ _dense(shape, tensors), atol=1e-12)
    assert (shape.width, shape.operations, shape.numbers) == (24, operations, numbers)
    assert sum(t.numel() for t in tensors.values()) == numbers


@pytest.mark.parametrize("shape", [MapShape("blocks", (4, 6)), MapShape("kronecker", (4, 6))])
def test_the_identity_does_nothing(shape: MapShape) -> None:
    x = torch.randn(3, 24, dtype=torch.float32)
    tensors = shape.identity(x)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shape.tensors
    assert torch.equal(apply_map(x, tensors), x)


def test_matrices_of_heads_leave_the_product_of_queries_and_keys() -> None:
    shape = MapShape("heads", (2, 6))
    tensors = {"keys": torch.randn(shape.tensors["keys"], dtype=FLOAT64)}
    query, key = (torch.randn(3, heads, 5, 6, dtype=FLOAT64) for heads in (4, 2))
    turned = {n: turn_heads(n, x, tensors) for n, x in (("query", query), ("key", key))}
    assert torch.allclose(turned["key"][:, 1], key[:, 1] @ tensors["keys"][1], atol=1e-12)
    per_query = [k.repeat_interleave(2, dim=1) for k in (key, turned["key"])]
    before, after = query @ per_query[0].mT, turned["query"] @ per_query[1].mT
    assert (after - before).abs().max() < 1e-10
    assert not torch.allclose(turned["query"], query, atol=0.1)
    known = turn_heads("query", query, tensors, for_queries(tensors["keys"]))
    assert torch.equal(known, turned["query"])
    identity = shape.identity(key)
    assert torch.equal(turn_heads("key", key, identity), key)
    assert torch.equal(turn_heads("query", query, identity), query)
    assert (shape.width, shape.operations, shape.numbers) == (6, 36, 72)


def test_a_hadamard_matrix_is_no_identity() -> None:
    with pytest.raises(ValueError, match="no identity"):
        MapShape("hadamard", (1, 4, 1)).identity(torch.ones(1))


@pytest.mark.parametrize("kind", ["view", "misaligned", "misaligned view"])
def test_aligned_tensors_lie_as_loaders_have_them(kind: str) -> None:
    memory = torch.randn(65)
    tensor = memory[1:] if "misaligned" in kind else memory[:64]
    matrix = tensor.reshape(8, 8)
    matrix = matrix.T if "view" in kind else matrix
    found = aligned(matrix)
    assert torch.equal(found, matrix)
    assert found.is_contiguous()
    assert found.data_ptr() % 64 == 0


def test_what_lies_well_is_not_copied() -> None:
    matrix = torch.randn(8, 8)
    assert aligned(matrix).data_ptr() == matrix.data_ptr()
