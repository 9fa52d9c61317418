"""Multiple-choice questions to test with: how does a sentence of the embedded text go on?"""

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bitfold.assets import EVALUATION_TEXT

__all__ = ["QUESTIONS", "write_lines"]


def _make() -> list[dict[str, Any]]:
    chosen = random.Random(0)
    text = EVALUATION_TEXT.read_text(encoding="utf-8")
    sentences = [s.split() for s in re.split(r" \. |\n", text) if 8 <= len(s.split()) <= 20]
    questions = []
    for number in range(40):
        right, *wrong = chosen.sample(sentences, 4)
        cut = len(right) * 2 // 3
        endings = [" ".join(words[-(len(right) - cut) :]) for words in (right, *wrong)]
        # Some questions end in white space, some choices in characters of several bytes, some have one token.
        question = " ".join(right[:cut]) + ("  " if number % 5 == 0 else "")
        if number % 7 == 0:
            endings = [f"{ending} — é" for ending in endings]
        if number % 6 == 1:
            endings = ["the", "of", "was", "it"]
        choices = chosen.sample(endings, 4)
        questions.append(
            {"question": question, "choices": choices, "answer": choices.index(endings[0])}
        )
    return questions


QUESTIONS = _make()


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path
