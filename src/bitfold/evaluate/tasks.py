"""Accuracy on tasks: local multiple-choice files, and whatever lm-eval knows by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitfold.errors import DataError
from bitfold.evaluate.choices import Question, read_questions
from bitfold.evaluate.harness import HarnessTasks, find_tasks, score_tasks
from bitfold.evaluate.local_tasks import score_questions
from bitfold.evaluate.models import opened, tokenizer_of
from bitfold.evaluate.scores import TaskEvaluation, TaskScore, TasksEvaluation

__all__ = ["evaluate_tasks"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Asked:
    """What is asked of each model: questions of local files by name, and lm-eval's tasks."""

    questions: dict[str, list[Question]]
    harness: HarnessTasks | None
    limit: int | None
    batch: int | None


def evaluate_tasks(
    model: str | Path | PreTrainedModel,
    tasks: str | Path | Sequence[str | Path],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    against: str | Path | PreTrainedModel | None = None,
    limit: int | None = None,
    batch: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> TasksEvaluation:
    """Accuracy with its standard error on each task, and with `against` how much of that model's is kept.

    A task that ends in .jsonl is a local file of multiple-choice questions, asked here, offline, and scored as lm-eval
    does. Any other is lm-eval's, by name or as a task file (.yaml), and run by it (the extra `tasks`). No chat template
    is applied, and no examples are given that a task does not have of itself. The two models run one after the other:
    only one is in memory.

    model, against    directory, hub name or a loaded model
    tokenizer         needed with a loaded `model`, and used for a loaded `against`; else the checkpoint's own
    limit             only the first so many questions of each task
    batch             rows that run at once; default: 8 for lm-eval's, what makes about 2048 tokens for local ones
    device, dtype     of what is loaded here; a loaded model stays as it is
    progress          called with (done, in all, what), anew for each part of the work

    Raises DataError for tasks and questions that cannot be used, MissingExtraError where lm-eval is needed and not
    there, CheckpointError for checkpoints.
    """
    for name, number in (("questions", limit), ("rows", batch)):
        if number is not None and number < 1:
            raise DataError(f"The number of {name} must be at least 1, not {number}: ask for more.")
    asked = _asked(tasks, limit, batch, progress)
    tokenizer = tokenizer_of(model, tokenizer, trust_remote_code=trust_remote_code)
    score, cut = _run(
        opened(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code),
        tokenizer,
        asked,
        _saying(progress, ""),
    )
    original: dict[str, TaskScore] = {}
    if against is not None:
        own = tokenizer if not isinstance(against, str | Path) else None
        original, _ = _run(
            opened(against, device=device, dtype=dtype, trust_remote_code=trust_remote_code),
            tokenizer_of(against, own, trust_remote_code=trust_remote_code),
            asked,
            _saying(progress, "the original, "),
        )
    found = {name: TaskEvaluation(one, original.get(name)) for name, one in score.items()}
    return TasksEvaluation(found, tuple(_notes(found, cut)))


def _asked(
    tasks: str | Path | Sequence[str | Path],
    limit: int | None,
    batch: int | None,
    progress: Progress | None,
) -> _Asked:
    """Everything is read before a model is loaded, so that a wrong name costs no time."""
    names = [str(name) for name in ([tasks] if isinstance(tasks, str | Path) else tasks)]
    if not names or not all(names):
        raise DataError("There is no task to evaluate on: name a .jsonl file or a task of lm-eval.")
    local = [name for name in names if Path(name).suffix.lower() == ".jsonl"]
    questions: dict[str, list[Question]] = {}
    for name in local:
        stem = Path(name).stem
        if stem in questions:
            raise DataError(f"Two tasks are named '{stem}': rename one of the files.")
        questions[stem] = read_questions(Path(name))[:limit]
    others = [name for name in names if name not in local]
    if len(set(others)) < len(others):
        raise DataError(f"A task is named twice in {', '.join(others)}: name each once.")
    if others and progress is not None:
        progress(0, 1, "reading lm-eval's tasks")
    harness = find_tasks(others) if others else None
    return _Asked(questions, harness, limit, batch)


def _saying(
    progress: Progress | None, whose: str
) -> Callable[[str], Callable[[int, int], None] | None]:
    """What reports the parts of one model's work."""

    def part(name: str) -> Callable[[int, int], None] | None:
        if progress is None:
            return None
        return lambda done, total: progress(done, total, f"{whose}{name}")

    return part


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: _Asked,
    part: Callable[[str], Callable[[int, int], None] | None],
) -> tuple[dict[str, TaskScore], int]:
    """One model's scores by task, and how many of lm-eval's inputs were cut."""
    scores = {
        name: score_questions(model, tokenizer, questions, batch=asked.batch, progress=part(name))
        for name, questions in asked.questions.items()
    }
    if asked.harness is None:
        return scores, 0
    found, cut = score_tasks(
        model,
        tokenizer,
        asked.harness,
        limit=asked.limit,
        batch=asked.batch,
        progress=part("lm-eval"),
    )
    for name in found.keys() & scores.keys():
        raise DataError(f"A file and a task of lm-eval are both named '{name}': rename the file.")
    return scores | found, cut


def _notes(found: dict[str, TaskEvaluation], cut: int) -> list[str]:
    said = "longer than the model takes, and cut on the left: what was asked is not all that stands in the task"
    notes = [
        f"{name}: {task.score.cut} inputs were {said}"
        for name, task in found.items()
        if task.score.cut
    ]
    return notes + ([f"{cut} inputs of lm-eval's tasks were {said}"] if cut else [])
