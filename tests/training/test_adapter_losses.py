"""What is trained for, against arithmetic in float64; and the text it is trained on."""

import numpy as np
import pytest
import torch

from bitfold.training.losses import distillation_loss, next_token_loss, token_loss
from bitfold.training.text import held_back


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_losses_are_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 7, generator=generator)
    ids = torch.randint(0, 7, (3, 5), generator=generator)
    q, p = (log_softmax(x.double().numpy()) for x in (student, teacher))
    likelihood = -np.mean([q[b, t, ids[b, t + 1]] for b in range(3) for t in range(4)])
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean()
    assert float(next_token_loss(student, ids)) == pytest.approx(likelihood, rel=1e-5)
    assert float(distillation_loss(student, teacher)) == pytest.approx(kl, rel=1e-5)
    assert float(token_loss(student, ids, teacher, 0.25)) == pytest.approx(
        0.75 * likelihood + 0.25 * kl, rel=1e-5
    )
    assert float(token_loss(student, ids)) == pytest.approx(likelihood, rel=1e-5)


def test_no_gradient_goes_to_the_teacher() -> None:
    student, teacher = torch.randn(1, 2, 4).requires_grad_(), torch.randn(1, 2, 4).requires_grad_()
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    slope = student.detach().softmax(-1) - teacher.detach().softmax(-1)
    assert torch.allclose(student.grad, slope / 2, atol=1e-6)


def test_windows_are_held_back_once() -> None:
    rows = torch.arange(100)[:, None].expand(100, 3)
    training, check = held_back(rows, 0.05, seed=3)
    assert (len(training), len(check)) == (95, 5)
    assert sorted([*training[:, 0].tolist(), *check[:, 0].tolist()]) == list(range(100))
    assert len(held_back(rows, 0.5, 0)[1]) == 16
    assert len(held_back(rows[:2], 0.05, 0)[1]) == 1
    assert len(held_back(rows[:1], 0.05, 0)[1]) == 0
    assert len(held_back(rows, 0.0, 0)[1]) == 0
