"""A quantized model as the problem that a distillation is given, and what it answers."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from bitfold.distillation.trained import Trained
from bitfold.part import Part

__all__ = ["DistilProblem", "Distillation", "Distilled"]


@dataclass(frozen=True)
class DistilProblem:
    """The quantized model's distance to the original, as a function of what is trained.

    loss(windows): mean KL(original ‖ quantized) in nats per token on the calibration windows of these indices, as
    loaders will compute it. gradient(windows): the same, by a pass that can be differentiated; adds its gradient to
    every θ. windows: how many there are. seed: of everything drawn. report(done, total, what): progress.
    """

    trained: Sequence[Trained]
    loss: Callable[[Tensor], float]
    gradient: Callable[[Tensor], float]
    windows: int
    seed: int
    report: Callable[[int, int, str], None]


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
    """Trains scales and norms of a finished model end to end; the codes stay."""

    norms: bool = True
    biases: bool = True

    @abstractmethod
    def fit(self, problem: DistilProblem) -> Distilled:
        """Leave θ where the loss on held-back windows is the least that was seen, the first state included."""

    @abstractmethod
    def passes(self, windows: int) -> tuple[int, int]:
        """Of so many calibration windows, how many go through `gradient` and `loss`, at most, repeats counted."""
