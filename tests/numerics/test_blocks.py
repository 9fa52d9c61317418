"""Blocks against the dense matrix that they stand for."""

import pytest
import torch

from bitfold.numerics import blocks_product, linear_blocks


def _random(count: int, size: int) -> torch.Tensor:
    torch.manual_seed(count)
    return torch.randn(count, size, size, dtype=torch.float64)


def _dense(blocks: torch.Tensor) -> torch.Tensor:
    return torch.block_diag(*blocks)


@pytest.mark.parametrize(("count", "size"), [(1, 12), (3, 4), (12, 1)])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
def test_a_linear_layer_of_blocks(count: int, size: int, shape: tuple[int, ...]) -> None:
    blocks = _random(count, size)
    x = torch.randn(shape, dtype=torch.float64)
    found = linear_blocks(x, blocks)
    assert found.shape == shape
    assert torch.allclose(found, x @ _dense(blocks).T, atol=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ((3, 4), (3, 4), (3, 4)),
        ((1, 12), (12, 1), (1, 12)),
        ((12, 1), (3, 4), (3, 4)),
        ((3, 4), (2, 6), (1, 12)),
        ((4, 6), (6, 4), (2, 12)),
    ],
)
def test_a_product_has_the_smallest_blocks_that_hold_it(
    first: tuple[int, int], second: tuple[int, int], found: tuple[int, int]
) -> None:
    a, b = _random(*first), _random(*second)
    product = blocks_product(a, b)
    assert product.shape == (*found, found[1])
    assert torch.allclose(_dense(product), _dense(a) @ _dense(b), atol=1e-12)


def test_gradients_pass() -> None:
    a, b = _random(3, 4).requires_grad_(), _random(1, 12).requires_grad_()
    linear_blocks(torch.ones(12, dtype=torch.float64), blocks_product(a, b)).sum().backward()
    assert a.grad.abs().min() > 0
    assert b.grad.abs().min() > 0
