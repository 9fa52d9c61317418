"""Block-diagonal matrices, given as the square blocks on their diagonal [count, size, size]."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["blocks_product", "linear_blocks"]


def linear_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x Mᵀ for rows x [..., count · size] and the matrix M of these blocks, which is full if there is one.

    A linear layer whose weight is M: in float16 a CPU does that many times as fast as x M.
    """
    count, size, _ = blocks.shape
    if count == 1:
        return F.linear(x, blocks[0])
    pieces = x.unflatten(-1, (count, size))
    return torch.einsum("...kh,kgh->...kg", pieces, blocks).flatten(-2)


def blocks_product(first: Tensor, second: Tensor) -> Tensor:
    """The blocks of M N, of the smallest size that both matrices can be said in.

    >>> blocks_product(torch.full((1, 2, 2), 3.0), torch.full((2, 1, 1), 2.0))
    tensor([[[6., 6.],
             [6., 6.]]])
    """
    size = math.lcm(first.shape[-1], second.shape[-1])
    return _in_blocks_of(size, first) @ _in_blocks_of(size, second)


def _in_blocks_of(size: int, blocks: Tensor) -> Tensor:
    """The same matrix in larger blocks."""
    small = blocks.shape[-1]
    if small == size:
        return blocks
    groups = blocks.unflatten(0, (-1, size // small))
    wide = torch.diag_embed(groups.permute(0, 2, 3, 1))  # [large, row, column, piece, piece]
    return wide.permute(0, 3, 1, 4, 2).reshape(-1, size, size)
