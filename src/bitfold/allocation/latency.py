"""Measured seconds of a linear layer, by the shape of its weight and its bits: a table that the user brings."""

import json
from collections.abc import Mapping
from pathlib import Path

from bitfold.errors import DataError

__all__ = ["Latencies", "read_latencies"]

Latencies = Mapping[tuple[int, int, str], float]
"""(outputs, inputs, name of the candidate) → seconds."""

_EXAMPLE = '[{"shape": [4096, 4096], "bits": 4, "group_size": 128, "seconds": 0.00012}]'


def read_latencies(file: Path) -> dict[tuple[int, int, str], float]:
    """Read a JSON list of entries with `shape` [out, in], `bits` (16: left alone), `group_size` (null without) and
    `seconds`.

    Raises DataError naming the file and the entry that is wrong.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"The table of latencies {file} cannot be read ({error}): write {_EXAMPLE}."
        ) from error
    if not isinstance(entries, list):
        raise DataError(f"The table of latencies {file} is no list: write {_EXAMPLE}.")
    table = {}
    for entry in entries:
        try:
            outputs, inputs = (int(size) for size in entry["shape"])
            bits, group = int(entry["bits"]), entry.get("group_size")
            seconds = float(entry["seconds"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"The entry {entry!r} of {file} is no latency: write as in {_EXAMPLE}."
            ) from error
        if not 0 <= seconds < float("inf"):
            raise DataError(f"The entry {entry!r} of {file} takes no possible time: correct it.")
        table[outputs, inputs, f"{bits}g{int(group)}" if group else str(bits)] = seconds
    return table
