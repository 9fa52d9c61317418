"""lm-eval's tasks, run by lm-eval (the extra `tasks`) on a model that bitfold has loaded. All that is known of lm-eval
is here; it is imported when it is needed."""

from __future__ import annotations

import copy
import difflib
import io
import logging
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitfold.errors import DataError, MissingExtraError
from bitfold.evaluate.models import evaluating
from bitfold.evaluate.scores import Figure, TaskScore
from bitfold.runtime.device import quick_float32

__all__ = ["HarnessTasks", "find_tasks", "score_tasks"]

FILES = (".yaml", ".yml")
DEFAULT_BATCH = 8


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks with their data: lm-eval's own objects, and what it finds them with."""

    names: tuple[str, ...]
    tasks: Sequence[Any]
    manager: Any


def find_tasks(names: Sequence[str]) -> HarnessTasks:
    """Tasks, groups and tags that lm-eval knows by name, or its task files (.yaml); their data is fetched here.

    Raises MissingExtraError without lm-eval; DataError for a task that it does not know, and for one whose data cannot
    be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError(
            f"The task '{names[0]}' is lm-eval's, which is not installed: pip install lm-eval, "
            "or ask the questions of a .jsonl file."
        ) from error
    with _quiet():
        manager = TaskManager(include_defaults=not all(map(_is_file, names)))
        tasks = [task for name in names for task in _load(manager, name)]
    return HarnessTasks(tuple(names), tasks, manager)


def _is_file(name: str) -> bool:
    return Path(name).suffix.lower() in FILES


def _load(manager: Any, name: str) -> list[Any]:
    if _is_file(name):
        if not Path(name).is_file():
            raise DataError(f"There is no task file {name}: check the path.")
    elif name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
        nearest = f"near it are {', '.join(near)}" if near else "lm-eval ls tasks shows all"
        raise DataError(f"lm-eval {_version()} has no task '{name}': {nearest}.")
    try:
        found = manager.load([name])
    except OSError as error:
        raise DataError(
            f"The data of the task '{name}' cannot be fetched ({_said(error)}): it takes the network or a copy in "
            "the Hugging Face cache; offline, ask the questions of a .jsonl file."
        ) from error
    except Exception as error:  # whatever else lm-eval raises here is about this task
        raise DataError(
            f"lm-eval cannot load the task '{name}' ({_said(error)}): leave it out."
        ) from error
    if name in found["groups"]:
        return [found["groups"][name]]
    return list(found["tasks"].values())


@quick_float32()
def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    found: HarnessTasks,
    *,
    limit: int | None = None,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, TaskScore], int]:
    """lm-eval's figures by task and group, and how many inputs were cut on the left to fit the model.

    progress   called with (inputs done, in all), anew for every kind of request
    Raises DataError for tasks that lm-eval refuses to run.
    """
    from lm_eval import simple_evaluate

    with evaluating(model), _quiet():
        runner = _runner(model, tokenizer, batch or DEFAULT_BATCH, progress)
        try:
            results = simple_evaluate(
                model=runner, tasks=list(found.tasks), limit=limit, task_manager=found.manager
            )
        except (ValueError, AssertionError, KeyError, OSError, ImportError) as error:
            raise DataError(
                f"lm-eval cannot run {', '.join(found.names)} on this model ({_said(error)}): leave out what it names."
            ) from error
    return {
        name: _score(name, row, results) for name, row in results["results"].items()
    }, runner.cut


def _runner(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> Any:
    """lm-eval's runner of Hugging Face models, which says how far it is instead of printing it."""
    from lm_eval.models.huggingface import HFLM

    class Runner(HFLM):
        cut = total = done = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(self._starting(requests), disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(self._starting(requests), disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(self._starting(requests), disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            self.cut += sum(
                len(context) + len(after) > self.max_length + 1 for _, context, after in requests
            )
            return super()._loglikelihood_tokens(requests, *args, **options)

        def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *args, **options)
            self._ran(len(inps))
            return logits

        def _model_generate(self, context: torch.Tensor, *args: Any, **options: Any) -> Any:
            tokens = super()._model_generate(context, *args, **options)
            self._ran(len(context))
            return tokens

        def _starting(self, requests: Any) -> Any:
            self.total, self.done = len(requests), 0
            return requests

        def _ran(self, rows: int) -> None:
            self.done = min(self.done + rows, self.total)
            if progress is not None:
                progress(self.done, self.total)

    # It gives the tokenizer a padding token: a caller's own stays as it is.
    return Runner(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch)


# --- reading its results ---


def _score(name: str, row: Mapping[str, Any], results: Mapping[str, Any]) -> TaskScore:
    """A row of lm-eval's results, whose keys are "metric,filter" and "metric_stderr,filter"."""
    better = results["higher_is_better"].get(name, {})
    figures = {}
    for key, value in row.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        shown = metric if chosen == "none" else key
        error = _number(row.get(f"{metric}_stderr,{chosen}"))
        figures[shown] = Figure(_number(value), error, bool(better.get(metric)))
    members = [name, *results.get("group_subtasks", {}).get(name, ())]
    counts = [
        results["n-samples"][one]["effective"] for one in members if one in results["n-samples"]
    ]
    samples = results.get("samples", {}).get(name, ())
    return TaskScore(figures, questions=sum(counts), answers=_answers(samples))


def _number(value: Any) -> float | None:
    """A finite number; lm-eval says "N/A" where it has none."""
    number = float(value) if isinstance(value, (int, float)) else float("nan")
    return number if abs(number) < float("inf") else None


def _answers(samples: Sequence[Mapping[str, Any]]) -> tuple[Hashable, ...]:
    """What was answered: the likeliest choice, whether the target came first, or the text that was written."""
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    answers = [_answer(sample["filtered_resps"]) for sample in first]
    return () if None in answers else tuple(answers)


def _answer(responses: Sequence[Any]) -> Hashable | None:
    """Of one question; None where responses cannot be alike or not, as the likelihood of a whole text."""
    if not all(isinstance(response, (tuple, list)) for response in responses):
        texts = tuple(responses)
        return texts if all(isinstance(text, str) for text in texts) else None
    if len(responses) > 1:
        return max(range(len(responses)), key=lambda index: responses[index][0])
    return bool(responses[0][1])


# --- its manners ---


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its bars, warnings and prints; logging as it was, afterwards. What matters is raised or counted."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _said(error: Exception) -> str:
    said = str(error) if " " in str(error) else f"{type(error).__name__} {error}"
    return re.sub(r"\s+", " ", said)[:200].strip(" .")


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
