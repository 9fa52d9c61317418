"""Tables of what was measured: on texts, on tasks, against llama.cpp's logits."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from bitfold.report.terminal import human_bytes, table

__all__ = ["evaluation_table", "kl_base_table", "tasks_table", "written_sentence"]


_Row = tuple[str, Callable[[Mapping[str, Any]], str]]
"""What a row of a table is called, and how its cell is said."""

_PERPLEXITY: _Row = (
    "perplexity",
    lambda row: _with_error(row["perplexity"], row["perplexity_se"], ".3f"),
)
_TOKENS: _Row = ("tokens", lambda row: f"{row['tokens']:,}")
_WINDOWS: _Row = ("windows", lambda row: f"{row['windows']} of {row['sequence_length']} tokens")
_DIVERGENCE: tuple[_Row, ...] = (
    ("KL to the original, mean", lambda row: _with_error(row["kl_mean"], row["kl_se"], ".5f")),
    ("KL, median", lambda row: _number(row["kl_median"], ".5f")),
    ("KL, 99th percentile", lambda row: _number(row["kl_p99"], ".5f")),
    ("top-1 agreement", lambda row: _with_error(row["top1_agreement"], row["top1_se"], ".2%")),
)


def evaluation_table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `evaluate` found, a column per text."""
    rows: list[_Row] = [_PERPLEXITY, _TOKENS, _WINDOWS]
    if any("kl_mean" in row for row in figures.values()):
        rows += _DIVERGENCE
    cells = [[name, *(say(row) for row in figures.values())] for name, say in rows]
    return table(["", *figures], cells)


def tasks_table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `evaluate_tasks` found, a row per task and figure; `same`: the share of answers that are the original's."""
    compared = any("original" in task for task in figures.values())
    columns = ["task", "n", "figure", "value"]  # short: a terminal has 80 columns
    columns += ["original", "recovery", "same"] if compared else []
    rows = []
    for name, task in figures.items():
        figures_of_it = [key for key in task if f"{key}_se" in task]
        for figure in figures_of_it:
            cells = [name, f"{task['questions']:,}", figure, _figure(task, figure)]
            if "original" in task:
                cells += [
                    _figure(task["original"], figure),
                    _number(task["recovery"].get(figure), ".1%"),
                    # Of the answers that `acc`, the first figure, counts.
                    _number(task["same_answers"], ".1%") if figure == figures_of_it[0] else "",
                ]
            rows.append(cells)
    return table(columns, rows)


def kl_base_table(figures: Mapping[str, Any]) -> Table:
    """What `evaluate_kl_base` found."""
    ratio = _with_error(figures["perplexity_ratio"], figures["perplexity_ratio_se"], ".5f")
    base = _with_error(figures["base_perplexity"], figures["base_perplexity_se"], ".3f")
    rows = [
        [_PERPLEXITY[0], _PERPLEXITY[1](figures)],
        ["perplexity of the file's logits", base],
        ["ratio of the two", ratio],
        *([name, say(figures)] for name, say in (_TOKENS, _WINDOWS, *_DIVERGENCE)),
    ]
    return table(["", "second halves of windows"], rows)


def written_sentence(figures: Mapping[str, Any]) -> str:
    """What `write_kl_base` wrote, and how it is used."""
    windows = f"{figures['windows']} windows of {figures['sequence_length']} tokens"
    return (
        f"{figures['path']}: {human_bytes(figures['bytes'])}, {windows}, perplexity of their second halves "
        f"{_with_error(figures['perplexity'], figures['perplexity_se'], '.3f')}\n"
        f"  bitfold eval MODEL --kl-base {figures['path']}\n"
        f"  llama-perplexity -m MODEL.gguf -c {figures['sequence_length']} --kl-divergence "
        f"--kl-divergence-base {figures['path']}"
    )


def _figure(task: Mapping[str, Any], name: str) -> str:
    """Accuracies are shares; what goes beyond 1 is none, as a perplexity."""
    value, error = task.get(name), task.get(f"{name}_se")
    return _with_error(value, error, ".1%" if value is None or 0 <= value <= 1 else ".3f")


def _with_error(value: float | None, error: float | None, form: str) -> str:
    return _number(value, form) + (f" ± {error:{form}}" if error is not None else "")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
