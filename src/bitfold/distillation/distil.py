"""Scale distillation: scales, norms and biases trained end to end against the original's logits; codes, if asked.

The end-to-end phase of EfficientQAT (Chen et al. 2024, arXiv 2407.11062), with the loss of GSQ (arXiv 2604.18556):
KL(original ‖ quantized) on every token. Zero-points stay: the formats store them as integers. Codes move as a
straight-through estimator moves them (PV-Tuning, arXiv 2405.14852, says why they should): each weight has a position
between the codes, and the nearest code counts.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bitfold.distillation.problem import Distillation, Distilled, DistilProblem
from bitfold.distillation.trained import Trained, TrainedCodes
from bitfold.part import Need

__all__ = ["Distil"]

_BETAS = (0.9, 0.99)
# What bfloat16 adds to a KL of a few thousandths is noise of the steps, not of what is kept: that is judged exactly.
_LARGEST_CHANGE = 0.1


class Distil(Distillation):
    """epochs: passes over the training windows, at most. batch: windows in a step. rate: of the first step, relative to
    what is trained; falls to zero along a cosine. code_rate: the same of codes, in codes. checks: how often in an epoch
    the windows that are held back are looked at. patience: checks without progress that end it, unless codes are
    trained: they settle only as the rate falls. compute: of a step's matrix products; `auto`: bfloat16 where that
    is quicker and changes the first loss by less than 10 %."""

    needs = frozenset[Need]({"loss"})

    epochs: float = Field(default=4, gt=0)
    batch: int = Field(default=4, ge=1)
    rate: float = Field(default=5e-3, gt=0)
    code_rate: float = Field(default=2e-2, gt=0)
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    checks: int = Field(default=2, ge=1)
    patience: int = Field(default=4, ge=1)

    def fit(self, problem: DistilProblem) -> Distilled:
        """See `Distillation.fit`. Adam; a loss that is not finite goes back to the best state and ends it."""
        generator = torch.Generator().manual_seed(problem.seed)
        training, check = problem.training, problem.check
        thetas = [one.theta for one in problem.trained]
        if not thetas:
            loss = problem.loss(check)
            note = "distillation: the model has nothing that it could train"
            return Distilled(len(check), len(training), loss, loss, 0, 0, (note,))
        optimizer = self._optimizer(problem)
        steps, every = self._steps(len(training))

        problem.report(0, steps, "distilling")
        before = problem.loss(check)
        best, best_loss, kept, waited = _copy(thetas), before, 0, 0
        notes: list[str] = []
        step = 0
        low: bool | None = None
        for windows in islice(self._batches(training, generator), steps):
            if not math.isfinite(before):
                notes.append(
                    "distillation: the KL on held-back windows is not finite: nothing was trained"
                )
                break
            for group in optimizer.param_groups:
                group["lr"] = group["start"] * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            if low is None:
                low = self._may_be_low(problem, windows)
                optimizer.zero_grad()
            loss = problem.gradient(windows, low)
            step += 1
            if not _finite(loss, thetas):
                notes.append(_went_back(step, kept))
                break
            optimizer.step()
            for one in problem.trained:
                one.bound()
            problem.report(step, steps, "distilling")
            if step % every and step != steps:
                continue
            now = problem.loss(check)
            if not math.isfinite(now):
                notes.append(_went_back(step, kept))
                break
            waited += 1
            if now < best_loss:
                best, best_loss, kept, waited = _copy(thetas), now, step, 0
            if waited >= self.patience and not self.codes:
                break
        with torch.no_grad():
            for theta, value in zip(thetas, best, strict=True):
                theta.copy_(value)
        return Distilled(len(check), len(training), before, best_loss, step, kept, tuple(notes))

    def passes(self, windows: int) -> tuple[int, int]:
        """See `Distillation.passes`."""
        training, check = map(len, self.split(windows, seed=0))
        training += self.written + self.resampled * training
        steps, every = self._steps(training)
        return round(self.epochs * training), check * (1 + math.ceil(steps / every))

    def _may_be_low(self, problem: DistilProblem, windows: Tensor) -> bool:
        if self.compute != "auto":
            return self.compute == "bfloat16"
        if problem.exact or not problem.low_is_quick:
            return False
        exact, low = problem.gradient(windows, False), problem.gradient(windows, True)
        return abs(low - exact) <= _LARGEST_CHANGE * exact

    def _optimizer(self, problem: DistilProblem) -> torch.optim.Optimizer:
        codes = [one.theta for one in problem.trained if isinstance(one, TrainedCodes)]
        others = [one.theta for one in problem.trained if isinstance(one, Trained)]
        rates = ((others, self.rate), (codes, self.code_rate))
        groups = [{"params": p, "lr": rate, "start": rate} for p, rate in rates if p]
        return torch.optim.Adam(groups, betas=_BETAS, fused=True)

    def _steps(self, training: int) -> tuple[int, int]:
        """Steps with so many training windows, and after how many of them the held-back ones are looked at."""
        per_epoch = math.ceil(training / self.batch)
        return max(1, round(self.epochs * per_epoch)), max(1, per_epoch // self.checks)

    def _batches(self, training: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """The training windows in batches, epoch by epoch in another order."""
        for _ in range(math.ceil(self.epochs)):
            order = torch.randperm(len(training), generator=generator)
            yield from training[order].split(self.batch)


def _copy(thetas: list[Tensor]) -> list[Tensor]:
    return [theta.detach().clone() for theta in thetas]


def _finite(loss: float, thetas: list[Tensor]) -> bool:
    sums = [theta.grad.sum().double() for theta in thetas if theta.grad is not None]
    return math.isfinite(loss) and bool(
        torch.isfinite(torch.stack(sums)).all()
    )  # a sum is finite only if all is


def _went_back(step: int, kept: int) -> str:
    return (
        f"distillation: the loss of step {step} was not finite: went back to the best state before, of step {kept}; "
        "a smaller --set distil.rate may go on"
    )
