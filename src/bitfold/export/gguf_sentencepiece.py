"""SentencePiece's BPE from a tokenizer.json: what llama.cpp joins pieces by, scores, from the order of merges.

llama.cpp joins, again and again, the two neighbours whose join is the piece of the best score; a tokenizer.json those
whose merge comes first. They are the same where every two pieces that make a piece are a merge, and the merges of one
piece stand together, as they do where they came from a SentencePiece model. That is checked.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitfold.errors import ExportError

__all__ = ["SPACE", "byte_pieces", "piece_scores", "puts_space_first", "spares_space"]

SPACE = "\u2581"
"""What stands for a space in the pieces: ▁."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}


def puts_space_first(content: Mapping[str, Any]) -> bool | None:
    """Whether a tokenizer.json of SentencePiece's kind puts a space before a text; None for one of another kind.

    One that does so only where there is none yet (`Metaspace`, see `spares_space`) counts as one that does.
    """
    model = content["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        return None
    normalizer, before = content.get("normalizer") or {}, content.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    # Gemma's: it splits at spaces, of which the normalizer has left none.
    if not steps and spares_space(content):
        return True
    idle = before is None or (before["type"] == "Split" and before["pattern"] == {"String": " "})
    if idle and steps == [_PREPEND, _REPLACE]:
        return True
    if idle and steps == [_REPLACE]:
        return False
    return None


def spares_space(content: Mapping[str, Any]) -> bool:
    """Whether no space is put before a text that begins with one, where llama.cpp puts one before every text."""
    before = content.get("pre_tokenizer") or {}
    wanted = {"type": "Metaspace", "replacement": SPACE, "split": False}
    schemes = ("first", "always")
    return wanted.items() <= before.items() and before.get("prepend_scheme") in schemes


def byte_pieces(vocabulary: Mapping[str, int], file: Path) -> list[int]:
    """The numbers of the pieces that stand for bytes; ExportError where one is missing, with which llama.cpp stops."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if missing := [name for name in names if name not in vocabulary]:
        raise ExportError(
            f"{file} has no piece {missing[0]}, and llama.cpp needs one for every byte: use another --to."
        )
    return [vocabulary[name] for name in names]


def piece_scores(content: Mapping[str, Any], apart: set[str], file: Path) -> dict[str, float]:
    """The score of every piece that is the join of two: 0, −1, … in the order of merges. apart: tokens that are never
    joined, such as special ones.

    Raises ExportError where llama.cpp would join in another order, naming the piece.
    """
    vocabulary = content["model"]["vocab"]
    pieces = {name for name in vocabulary if name not in apart and not _BYTE.fullmatch(name)}
    merges = [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in content["model"]["merges"]
    ]
    scores: dict[str, float] = {}
    last = ""
    for first, second in merges:
        joined = first + second
        if joined in scores and joined != last:
            raise ExportError(
                f"{file} joins '{joined}' of some pieces before, and of others after another piece, and llama.cpp goes "
                "by pieces alone: use another --to."
            )
        scores.setdefault(joined, -float(len(scores)))
        last = joined
    known = set(merges)
    for piece in pieces:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair not in known and pair[0] in pieces and pair[1] in pieces:
                raise ExportError(
                    f"{file} does not join '{pair[0]}' and '{pair[1]}', and llama.cpp would, since '{piece}' is a "
                    "piece: its merges are not those of a SentencePiece model; use another --to."
                )
    return scores
