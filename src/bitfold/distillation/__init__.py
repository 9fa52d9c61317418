"""Ways of training a whole quantized model against the original. A new one is a new file and a line here.

Each is a `Distillation`: `fit(problem) → Distilled` moves the problem's trained tensors.
"""

from bitfold.distillation.distil import Distil
from bitfold.distillation.problem import Distillation, Distilled, DistilProblem, split_windows
from bitfold.distillation.trained import Trained, TrainedCodes

__all__ = [
    "DISTILLATIONS",
    "Distil",
    "DistilProblem",
    "Distillation",
    "Distilled",
    "Trained",
    "TrainedCodes",
    "split_windows",
]

DISTILLATIONS: dict[str, type[Distillation]] = {"distil": Distil}
