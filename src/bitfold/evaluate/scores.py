"""What a model scored on a task, alone and beside the original's."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Figure", "TaskEvaluation", "TaskScore", "TasksEvaluation", "mean_figure"]


@dataclass(frozen=True)
class Figure:
    """A metric: its value, its standard error, and whether more is better."""

    value: float | None
    error: float | None
    higher_is_better: bool = True


@dataclass(frozen=True)
class TaskScore:
    """What one model scored on one task.

    figures     by lm-eval's names: acc, acc_norm (per character of the choice), acc_bytes (per byte) …
    questions   how many were asked; of a group, of all its tasks
    cut         inputs that were longer than the model takes and lost their left end; None where it is not counted
    nonfinite   questions with a likelihood that is not a number: then every figure is None
    answers     what was answered to each question; empty where that cannot be compared
    """

    figures: Mapping[str, Figure]
    questions: int
    cut: int | None = None
    nonfinite: int = 0
    answers: Sequence[Hashable] = ()

    def to_json(self) -> dict[str, Any]:
        """The figures, each followed by its standard error."""
        content: dict[str, Any] = {}
        for name, figure in self.figures.items():
            content |= {name: figure.value, f"{name}_se": figure.error}
        return content


@dataclass(frozen=True)
class TaskEvaluation:
    """A task: the model's score, and the original's where there is one to compare with."""

    score: TaskScore
    original: TaskScore | None = None

    @property
    def recovery(self) -> dict[str, float | None]:
        """The model's figure as a fraction of the original's, where more is better; None where that has none."""
        if self.original is None:
            return {}
        both = {
            name: (figure.value, self.original.figures[name].value)
            for name, figure in self.score.figures.items()
            if figure.higher_is_better and name in self.original.figures
        }
        return {
            name: own / other if own is not None and other else None
            for name, (own, other) in both.items()
        }

    @property
    def same_answers(self) -> float | None:
        """The fraction of questions that both answered alike, right or wrong; None where it cannot be known."""
        if self.original is None or not self.score.answers:
            return None
        if len(self.score.answers) != len(self.original.answers):
            return None
        pairs = zip(self.score.answers, self.original.answers, strict=True)
        return sum(own == other for own, other in pairs) / len(self.score.answers)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and nulls; what compares only where there was an original."""
        content = self.score.to_json() | {
            "questions": self.score.questions,
            "cut": self.score.cut,
            "nonfinite_questions": self.score.nonfinite,
        }
        if self.original is not None:
            content |= {
                "original": self.original.to_json(),
                "recovery": self.recovery,
                "same_answers": self.same_answers,
            }
        return content


@dataclass(frozen=True)
class TasksEvaluation:
    """The scores of every task, by its name, and what the user should know of them."""

    tasks: dict[str, TaskEvaluation]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Each task under its name."""
        return {name: task.to_json() for name, task in self.tasks.items()}


def mean_figure(values: Sequence[float]) -> Figure:
    """The mean, and its standard error as lm-eval has it: of the sample, None of a single value.

    >>> mean_figure([1.0, 0.0, 1.0, 0.0])
    Figure(value=0.5, error=0.28867513459481287, higher_is_better=True)
    """
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Figure(mean, None)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return Figure(mean, spread / math.sqrt(count))
