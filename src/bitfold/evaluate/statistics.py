"""What is measured per predicted token, and how it is summed up: pure functions on tensors.

Shape suffixes: n windows, T predicted tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "TokenStatistics",
    "at_least_float32",
    "divergence_figures",
    "join",
    "mean_and_error",
    "perplexity_and_error",
    "quantile",
    "token_statistics",
]


@dataclass(frozen=True)
class TokenStatistics:
    """Per predicted token, float64 [T] (or [n, T]); the last two are None without a reference.

    nll     negative log-likelihood of the token that came, in nats
    kl      KL(reference ‖ model) of the next-token distributions, in nats
    agree   1 where both rank the same token first, else 0
    """

    nll: torch.Tensor
    kl: torch.Tensor | None
    agree: torch.Tensor | None


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Logits in the dtype their softmax is taken in."""
    return logits if logits.dtype == torch.float64 else logits.float()


def token_statistics(
    logits_TV: torch.Tensor, reference_TV: torch.Tensor | None, next_T: torch.Tensor
) -> TokenStatistics:
    """Statistics of T predictions, from logits [T, V] and the token ids [T] that came, int64.

    Computed in float32, or float64 if the logits are; sums over the vocabulary in float64. What is
    not a number in the logits is not one in the result.

    >>> logits = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
    >>> token_statistics(logits, logits, torch.tensor([1, 1]))
    TokenStatistics(nll=tensor([0.6931, 0.0000], dtype=torch.float64), \
kl=tensor([0., 0.], dtype=torch.float64), agree=tensor([1., 1.], dtype=torch.float64))
    """
    log_q = torch.log_softmax(at_least_float32(logits_TV), dim=-1)
    nll_T = -log_q.gather(-1, next_T[:, None]).squeeze(-1).double() + 0.0  # + 0.0: no −0
    if reference_TV is None:
        return TokenStatistics(nll_T, None, None)
    log_p = torch.log_softmax(at_least_float32(reference_TV), dim=-1)
    # In place from here: at a vocabulary of 150,000 each copy counts.
    terms = log_q.neg_().add_(log_p)
    p = log_p.exp_()
    terms.mul_(p).masked_fill_(p == 0, 0)  # 0·log 0 = 0, as where both mask a token with −∞
    agree_T = logits_TV.argmax(-1) == reference_TV.argmax(-1)
    return TokenStatistics(nll_T, terms.sum(-1, dtype=torch.float64), agree_T.double())


def join(
    parts: Sequence[TokenStatistics],
    then: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> TokenStatistics:
    """Parts one after the other, each field made what `then` makes of it."""
    nll = then(torch.cat([part.nll for part in parts]))
    kl = [part.kl for part in parts if part.kl is not None]
    agree = [part.agree for part in parts if part.agree is not None]
    return TokenStatistics(
        nll, then(torch.cat(kl)) if kl else None, then(torch.cat(agree)) if agree else None
    )


def mean_and_error(values_nT: torch.Tensor) -> tuple[float, float | None]:
    """The mean, and its standard error clustered by window: None with one window.

    Tokens of a window are not independent, windows nearly are: std of the window means / √n.

    >>> mean_and_error(torch.tensor([[1.0, 3.0], [4.0, 4.0]], dtype=torch.float64))
    (3.0, 1.0)
    """
    means_n = values_nT.mean(dim=-1)
    error = float(means_n.std()) / math.sqrt(len(means_n)) if len(means_n) > 1 else None
    return float(means_n.mean()), error


def perplexity_and_error(nll_nT: torch.Tensor) -> tuple[float | None, float | None]:
    """Perplexity and its standard error by the delta method, exp(m) · se(m); None where it is no finite number."""
    mean, error = mean_and_error(nll_nT)
    if not math.isfinite(mean) or mean > 700:  # e^710 is beyond float64
        return None, None
    return math.exp(mean), math.exp(mean) * error if error is not None else None


def divergence_figures(kl_nT: torch.Tensor, agree_nT: torch.Tensor) -> dict[str, Any]:
    """kl_* and top1_* of a comparison, and `compared`; that alone where a divergence is no finite number."""
    if not kl_nT.isfinite().all():
        return {"compared": True}
    kl_mean, kl_se = mean_and_error(kl_nT)
    top1_agreement, top1_se = mean_and_error(agree_nT)
    return {
        "compared": True,
        "kl_mean": kl_mean,
        "kl_median": quantile(kl_nT, 0.5),
        "kl_p99": quantile(kl_nT, 0.99),
        "kl_se": kl_se,
        "top1_agreement": top1_agreement,
        "top1_se": top1_se,
    }


def quantile(values: torch.Tensor, q: float) -> float:
    """The q-quantile of all values, linear between neighbours; torch.quantile ends at 2²⁴ values.

    >>> quantile(torch.tensor([4.0, 1.0, 2.0, 3.0]), 0.5)
    2.5
    """
    ordered = values.flatten().sort().values
    place = q * (len(ordered) - 1)
    below, above = math.floor(place), math.ceil(place)
    return float(torch.lerp(ordered[below], ordered[above], place - below))
