"""A quantized model as the problem that a distillation is given, and what it answers."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from bitfold.distillation.trained import Trained, TrainedCodes
from bitfold.part import Part

__all__ = ["DistilProblem", "Distillation", "Distilled", "split_windows"]


@dataclass(frozen=True)
class DistilProblem:
    """The quantized model's distance to the original, as a function of what is trained.

    loss(windows): mean KL(original ‖ quantized) in nats per token on the calibration windows of these indices, as
    loaders will compute it. gradient(windows, low): the same, by a pass that can be differentiated; adds its gradient
    to every θ; `low` runs its matrix products in bfloat16. training, check: indices of the windows to train on, and of
    those to judge by. exact: the run is in float64, no product may be less. low_is_quick: whether bfloat16 takes less
    time where it runs.
    seed: of everything drawn. report(done, total, what): progress.
    """

    trained: Sequence[Trained | TrainedCodes]
    loss: Callable[[Tensor], float]
    gradient: Callable[[Tensor, bool], float]
    training: Tensor
    check: Tensor
    seed: int
    report: Callable[[int, int, str], None]
    exact: bool = False
    low_is_quick: bool = True


@dataclass(frozen=True)
class Distilled:
    """held_back, training: numbers of windows; before, after: KL on the held-back ones; steps: how many were made;
    kept: after how many of them the state is that was kept, 0 where it is the first. notes: what the user should read.
    """

    held_back: int
    training: int
    before: float
    after: float
    steps: int
    kept: int
    notes: tuple[str, ...] = ()


class Distillation(Part):
    """Trains a finished model end to end: its scales, and what else these say.

    held_back: share of the calibration windows that are not trained on, by which the best state is chosen. norms,
    biases: those that the model has. codes: of the weights, too, on integer grids. most_codes: of a model that
    has more of them they stay, because training one takes 20 bytes. written: so many windows that the model writes
    itself, beginning as the calibration's do, are trained on beside them. resampled: copies of the calibration's with
    half of their tokens drawn anew by the model, for each; takes a tenth of the time that writing takes. Neither where
    codes stay for being too many: few numbers do not learn a text by heart.
    """

    held_back: float = Field(default=0.125, gt=0, lt=1)
    norms: bool = True
    biases: bool = True
    codes: bool = False
    most_codes: int = Field(default=2**29, ge=0)
    written: int = Field(default=0, ge=0)
    resampled: int = Field(default=0, ge=0)

    def split(self, windows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Of so many calibration windows those to train on and those to judge by: indices."""
        return split_windows(windows, self.held_back, seed)

    @abstractmethod
    def fit(self, problem: DistilProblem) -> Distilled:
        """Leave θ where the loss on held-back windows is the least that was seen, the first state included."""

    @abstractmethod
    def passes(self, windows: int) -> tuple[int, int]:
        """Of so many calibration windows, how many go through `gradient` and `loss`, at most, repeats counted."""


def split_windows(windows: int, held_back: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the windows to train on, and of those, a share of all and one at least, to judge by."""
    held = min(windows - 1, math.ceil(held_back * windows))
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))
    return order[held:], order[:held].sort().values
