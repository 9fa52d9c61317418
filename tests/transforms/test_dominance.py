"""The gradual mask is the paper's, and projected matrices are diagonally dominant."""

import pytest
import torch

from bitfold.transforms.dominance import gradual_mask, margin, project


@pytest.mark.parametrize("epochs", [1, 2, 5, 20])
def test_the_mask_is_the_papers(epochs: int) -> None:
    size, alpha = 7, 0.25
    for epoch in range(epochs):
        mask = gradual_mask(size, epoch, epochs, alpha)
        width = size - 1 if epochs == 1 else (size - 1) * epoch // (epochs - 1)
        for i in range(size):
            for j in range(size):
                expected = 1.0 if i == j else (alpha if abs(i - j) <= width else 0.0)
                assert mask[i, j] == expected


def test_first_epoch_is_diagonal_and_last_is_full() -> None:
    assert torch.equal(gradual_mask(5, 0, 4, 0.5), torch.eye(5))
    assert (gradual_mask(5, 3, 4, 0.5) > 0).all()


def test_projection_makes_every_row_dominant_and_leaves_dominant_rows_alone() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 8, 8, dtype=torch.float64)
    matrices[0] = torch.eye(8) + 0.01 * matrices[0]
    mask = gradual_mask(8, 3, 4, 0.7, dtype=torch.float64)
    kept = matrices[0].clone()
    project(matrices, mask, 0.1)
    assert (margin(matrices * mask) >= 0.1 - 1e-12).all()
    torch.testing.assert_close(matrices[0], kept)
    # Levy-Desplanques: strictly dominant matrices are invertible.
    assert torch.linalg.matrix_rank(matrices * mask).eq(8).all()
