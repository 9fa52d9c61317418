"""How far the log-probabilities of an engine are from those of a model in PyTorch, on the same tokens."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Answer", "Distance", "distance", "perplexity"]


@dataclass(frozen=True)
class Answer:
    """Of every position of the windows but the last: ids [windows, length − 1, most] int64, the token that comes next
    and the likeliest others, and their log-probabilities, float32."""

    ids: Tensor
    logprobs: Tensor

    @classmethod
    def of(cls, logits: Tensor, ids: Tensor) -> "Answer":
        """What a model's logits [windows, length, vocabulary] say of the same ids."""
        logprobs = logits[:, :-1].double().log_softmax(dim=-1).cpu()
        return cls(ids, logprobs.gather(-1, ids).float())


@dataclass(frozen=True)
class Distance:
    """Absolute differences of log-probabilities, in nats: their mean, and the largest."""

    mean: float
    max: float


def distance(one: Answer, other: Answer) -> Distance:
    """Between two answers about the same ids; not finite where one of them is not."""
    assert torch.equal(one.ids, other.ids)
    difference = (one.logprobs - other.logprobs).abs().double()
    return Distance(float(difference.mean()), float(difference.max()))


def perplexity(answer: Answer) -> float:
    """Of the tokens that come next."""
    return math.exp(-float(answer.logprobs[..., 0].double().mean()))
