"""The maps that run, against dense matrices; what they cost."""

import pytest
import torch
from torch import Tensor

from bitfold.numerics import MapShape, apply_map, hadamard_matrix

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


def test_a_hadamard_matrix_is_no_identity() -> None:
    with pytest.raises(ValueError, match="no identity"):
        MapShape("hadamard", (1, 4, 1)).identity(torch.ones(1))
