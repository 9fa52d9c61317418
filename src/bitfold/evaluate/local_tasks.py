"""Multiple-choice questions of a local file, asked and scored as lm-eval does, without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitfold.data.text import check_vocabulary
from bitfold.errors import DataError
from bitfold.evaluate.choices import Question
from bitfold.evaluate.likelihood import (
    Continuation,
    encode_pair,
    log_likelihoods,
    longest_input,
)
from bitfold.evaluate.models import vocab_size
from bitfold.evaluate.scores import Figure, TaskScore, mean_figure

__all__ = ["score_questions"]

DELIMITER = " "
"""Between question and choice: lm-eval's default."""

LENGTHS: dict[str, Callable[[str], int]] = {
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode("utf-8")),
}
"""What a choice's log-likelihood is divided by before the largest is taken, by lm-eval's name of the figure."""


def score_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TaskScore:
    """The fraction of questions whose right choice is the likeliest after "question choice".

    Raises DataError, naming the line, for a choice that adds no token, or more than the model takes.
    """
    longest = longest_input(model, tokenizer)
    pairs = [
        _pair(tokenizer, question, choice, longest)
        for question in questions
        for choice in question.choices
    ]
    largest = max((max(pair.context + pair.tokens) for pair in pairs), default=0)
    check_vocabulary(torch.tensor([largest]), vocab_size(model))
    cut = sum(len(pair.context) + len(pair.tokens) > longest + 1 for pair in pairs)
    every = iter(log_likelihoods(model, pairs, longest, batch=batch, progress=progress))
    found = [[next(every) for _ in question.choices] for question in questions]
    nonfinite = sum(any(math.isnan(value) for value in values) for values in found)
    picks = {
        name: [
            _likeliest(values, [length(choice) for choice in question.choices])
            for question, values in zip(questions, found, strict=True)
        ]
        for name, length in LENGTHS.items()
    }
    return TaskScore(
        figures={
            name: Figure(None, None) if nonfinite else _accuracy(chosen, questions)
            for name, chosen in picks.items()
        },
        questions=len(questions),
        cut=cut,
        nonfinite=nonfinite,
        answers=() if nonfinite else tuple(picks["acc"]),
    )


def _pair(
    tokenizer: PreTrainedTokenizerBase, question: Question, choice: str, longest: int
) -> Continuation:
    pair = encode_pair(tokenizer, question.text, DELIMITER + choice)
    if not pair.tokens:
        raise DataError(
            f"{question.where}: the choice '{choice}' adds no token to the question: rephrase it."
        )
    if len(pair.tokens) > longest:
        raise DataError(
            f"{question.where}: a choice of {len(pair.tokens)} tokens is beyond the {longest} that the model takes: "
            "shorten it."
        )
    return pair


def _likeliest(values: Sequence[float], lengths: Sequence[int]) -> int:
    """The first of the largest."""
    shares = [value / length for value, length in zip(values, lengths, strict=True)]
    return max(range(len(shares)), key=shares.__getitem__)


def _accuracy(chosen: Sequence[int], questions: Sequence[Question]) -> Figure:
    right = zip(chosen, questions, strict=True)
    return mean_figure([float(index == question.answer) for index, question in right])
