"""Scale distillation: scales, norms and biases trained end to end against the original's logits, codes frozen.

The end-to-end phase of EfficientQAT (Chen et al. 2024, arXiv 2407.11062), with the loss of GSQ (arXiv 2604.18556):
KL(original ‖ quantized) on every token. Zero-points stay: the formats store them as integers.
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from bitfold.distillation.problem import Distillation, Distilled, DistilProblem
from bitfold.part import Need

__all__ = ["Distil"]

_BETAS = (0.9, 0.99)


class Distil(Distillation):
    """epochs: passes over the training windows, at most. batch: windows in a step. rate: of the first step, relative to
    what is trained; falls to zero along a cosine. held_back: share of the calibration windows that are not trained on,
    by which the best state is chosen. checks: how often in an epoch. patience: checks without progress that end it.
    norms, biases: train those that the model has, beside the scales."""

    needs = frozenset[Need]({"loss"})

    epochs: int = Field(default=4, ge=1)
    batch: int = Field(default=4, ge=1)
    rate: float = Field(default=2e-3, gt=0)
    held_back: float = Field(default=0.125, gt=0, lt=1)
    checks: int = Field(default=2, ge=1)
    patience: int = Field(default=4, ge=1)

    def fit(self, problem: DistilProblem) -> Distilled:
        """See `Distillation.fit`. Adam; a loss that is not finite goes back to the best state and ends it."""
        generator = torch.Generator().manual_seed(problem.seed)
        order = torch.randperm(problem.windows, generator=generator)
        held = self._held(problem.windows)
        check, training = order[:held].sort().values, order[held:]
        thetas = [one.theta for one in problem.trained]
        optimizer = torch.optim.Adam(thetas, lr=self.rate, betas=_BETAS)
        per_epoch = math.ceil(len(training) / self.batch)
        steps = self.epochs * per_epoch
        every = max(1, per_epoch // self.checks)

        problem.report(0, steps, "distilling")
        before = problem.loss(check)
        best, best_loss, kept, waited = _copy(thetas), before, 0, 0
        notes: list[str] = []
        step = 0
        for epoch in range(self.epochs):
            shuffled = training[torch.randperm(len(training), generator=generator)]
            for windows in shuffled.split(self.batch):
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.zero_grad()
                loss = problem.gradient(windows)
                step += 1
                if not _finite(loss, thetas):
                    notes.append(_went_back(step, kept))
                    break
                optimizer.step()
                for one in problem.trained:
                    one.bound()
                problem.report(step, steps, f"distilling, epoch {epoch + 1}")
                if step % every == 0 or step == steps:
                    now = problem.loss(check)
                    if not math.isfinite(now):
                        notes.append(_went_back(step, kept))
                        break
                    if now < best_loss:
                        best, best_loss, kept, waited = _copy(thetas), now, step, 0
                    else:
                        waited += 1
                    if waited >= self.patience:
                        break
            else:
                continue
            break
        with torch.no_grad():
            for theta, value in zip(thetas, best, strict=True):
                theta.copy_(value)
        return Distilled(held, len(training), before, best_loss, step, kept, tuple(notes))

    def passes(self, windows: int) -> tuple[int, int]:
        """See `Distillation.passes`."""
        held = self._held(windows)
        return self.epochs * (windows - held), held * (1 + self.epochs * (self.checks + 1))

    def _held(self, windows: int) -> int:
        return min(windows - 1, math.ceil(self.held_back * windows))


def _copy(thetas: list[Tensor]) -> list[Tensor]:
    return [theta.detach().clone() for theta in thetas]


def _finite(loss: float, thetas: list[Tensor]) -> bool:
    gradients = [theta.grad for theta in thetas if theta.grad is not None]
    return math.isfinite(loss) and all(bool(torch.isfinite(g).all()) for g in gradients)


def _went_back(step: int, kept: int) -> str:
    return (
        f"distillation: the loss of step {step} was not finite: went back to the best state before, of step {kept}; "
        "a smaller --set distil.rate may go on"
    )
