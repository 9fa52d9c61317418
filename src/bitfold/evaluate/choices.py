"""Multiple-choice questions from a local file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfold.data.jsonl import check_characters, json_lines
from bitfold.errors import DataError

__all__ = ["Question", "read_questions"]

KEYS = ("question", "choices", "answer")


@dataclass(frozen=True)
class Question:
    """A text, how it may go on, and which of the choices is right.

    where    file and line, for errors
    answer   index of the right choice
    """

    where: str
    text: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path) -> list[Question]:
    """The questions of a .jsonl file, an object with `question`, `choices` and `answer` a line.

    `answer` is an index from 0, a letter from A, or the text of the choice.

    Raises DataError for a file that cannot be read and, naming the line, for a question that cannot be asked.
    """
    return [_question(record, where) for where, record in json_lines(path)]


def _question(record: Any, where: str) -> Question:
    if not isinstance(record, dict) or not record.keys() >= set(KEYS):
        raise DataError(f"{where} lacks one of {', '.join(KEYS)}: give every line all three.")
    text, choices = record["question"], record["choices"]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: 'question' must be a text that is not empty: correct it.")
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{where}: 'choices' must be a list of at least two texts: correct it.")
    for place, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise DataError(
                f"{where}: choice {place} must be a text that is not empty: correct or remove it."
            )
    for part in (text, *choices):
        check_characters(part, where)
    return Question(where, text, tuple(choices), _answer(record["answer"], choices, where))


def _answer(answer: Any, choices: list[str], where: str) -> int:
    """The index that an answer means; a text of one letter may be a choice itself, which must agree."""
    meant = set()
    if isinstance(answer, str):
        meant |= {choices.index(answer)} if answer in choices else set()
        meant |= {ord(answer) - ord("A")} if len(answer) == 1 and "A" <= answer <= "Z" else set()
    elif isinstance(answer, int) and not isinstance(answer, bool):
        meant.add(answer)
    if len(meant) == 2:
        raise DataError(
            f"{where}: the answer '{answer}' is a letter and the text of another choice: write its index, from 0."
        )
    if not meant or not 0 <= min(meant) < len(choices):
        raise DataError(
            f"{where}: the answer {answer!r} is none of the {len(choices)} choices: "
            f"write an index from 0 to {len(choices) - 1}, a letter from A, or the text of a choice."
        )
    return meant.pop()
