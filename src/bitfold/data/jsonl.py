"""Files of one JSON value a line: what calibration and multiple-choice questions share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitfold.data.text import read_text
from bitfold.errors import DataError

__all__ = ["check_characters", "json_lines"]


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each value stands, as errors say it ("a.jsonl, line 3"), and the value; empty lines are passed over.

    Raises DataError for a file that cannot be read, and for the first line that is no JSON.
    """
    # Not splitlines(): a JSON string may hold U+2028 and others that end no line here.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(
                    f"{where} is broken JSON ({error}): write one object per line."
                ) from error
            yield where, value


def check_characters(text: str, where: str) -> None:
    """Raise DataError for what JSON can spell and no tokenizer takes."""
    if re.search("[\ud800-\udfff]", text):
        raise DataError(f"{where} holds half of a \\u surrogate pair, which is no text: remove it.")
