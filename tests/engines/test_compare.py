"""Distances of log-probabilities, against NumPy."""

import math

import numpy as np
import pytest
import torch

from bitfold.engines.compare import Answer, distance, perplexity

TOKENS, LENGTH, VOCABULARY, MOST = 3, 7, 50, 4


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(TOKENS, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (TOKENS, LENGTH - 1, MOST), generator=generator)


def log_probability(logits: torch.Tensor, window: int, position: int, token: int) -> float:
    row = logits[window, position].double().numpy()
    return float(row[token] - np.log(np.exp(row).sum()))


def test_an_answer_is_about_the_next_token(logits: torch.Tensor, ids: torch.Tensor) -> None:
    answer = Answer.of(logits, ids)
    for window, position, rank in ((0, 0, 0), (2, 5, 3), (1, 3, 2)):
        wanted = log_probability(logits, window, position, int(ids[window, position, rank]))
        assert answer.logprobs[window, position, rank].item() == pytest.approx(wanted, rel=1e-6)


def test_perplexity_is_of_the_first_column(logits: torch.Tensor, ids: torch.Tensor) -> None:
    losses = [
        -log_probability(logits, w, p, int(ids[w, p, 0]))
        for w in range(TOKENS)
        for p in range(LENGTH - 1)
    ]
    found = perplexity(Answer.of(logits, ids))
    assert found == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)


def test_distance(logits: torch.Tensor, ids: torch.Tensor) -> None:
    one = Answer.of(logits, ids)
    moved = one.logprobs.clone()
    moved[1, 2, 3] -= 0.5
    moved[0, 0, 0] += 0.25
    found = distance(one, Answer(ids, moved))
    assert found.max == pytest.approx(0.5, rel=1e-6)
    assert found.mean == pytest.approx(0.75 / ids.numel(), rel=1e-5)
    assert distance(one, one).max == 0


def test_what_is_no_number_is_no_small_distance(logits: torch.Tensor, ids: torch.Tensor) -> None:
    one = Answer.of(logits, ids)
    broken = one.logprobs.clone()
    broken[0, 0, 0] = float("nan")
    assert not distance(one, Answer(ids, broken)).mean <= 1e9
