"""Where weights lie in a file that a library wrote: found by their bytes, which shows that they are what was given."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitfold.errors import ExportError
from bitfold.export.artifact import tensor_sum
from bitfold.export.onnx_graph import Stored

__all__ = ["halves", "stored_in"]

# What libraries align a tensor's bytes to, at least; and the bytes that it is looked for by.
_STEP, _KEY = 16, 8
Bytes = NDArray[np.uint8]


def stored_in(
    file: Path, needed: Mapping[str, Bytes], others: Mapping[str, Bytes]
) -> dict[str, Stored]:
    """Of every weight its place in a file, and of what lies between them, under `the graph`; together they are the
    whole file. needed, others: by name the bytes, uint8, that must be there and may be there.

    Raises ExportError for the first of `needed` that is not there.
    """
    raw = np.fromfile(file, dtype=np.uint8)
    wanted = {**others, **needed}
    places = _places(raw, wanted)
    for name in needed:
        if name not in places:
            raise ExportError(
                f"The integers of {name} are not in {file.name} as they were given to the library that writes it: use "
                "the version that pyproject.toml names."
            )
    spans: list[tuple[str, int, int]] = []
    end = 0
    for name, start in sorted(places.items(), key=lambda item: item[1]):
        if start < end:
            continue  # the same bytes as another's
        if start > end:
            spans.append((_graph(spans), end, start))
        end = start + wanted[name].size
        spans.append((name, start, end))
    if end < raw.size:
        spans.append((_graph(spans), end, raw.size))
    return {
        name: Stored(start, stop - start, tensor_sum(torch.from_numpy(raw[start:stop])))
        for name, start, stop in spans
    }


def halves(codes: torch.Tensor, offset: int) -> Bytes:
    """Codes [out, in] int8 of 4 bits in halves of bytes, the first in the lower one. offset: what is added to them."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))  # a row begins with a byte
    shifted = (padded + offset).numpy().astype(np.uint8) & 15
    flat = shifted.reshape(-1, 2)
    return np.asarray(flat[:, 0] | (flat[:, 1] << 4), dtype=np.uint8)


def _places(raw: Bytes, wanted: Mapping[str, Bytes]) -> dict[str, int]:
    """Where in a file each of these bytes lie first; none for those that lie nowhere."""
    by_key: dict[int, list[str]] = {}
    for name, content in wanted.items():
        if content.size >= _KEY:
            key = int(np.ascontiguousarray(content[:_KEY]).view("<u8")[0])
            by_key.setdefault(key, []).append(name)
    keys = raw[: raw.size // _STEP * _STEP].view("<u8")[:: _STEP // _KEY]
    hits = np.flatnonzero(np.isin(keys, np.array(list(by_key), dtype="<u8")))
    found: dict[str, int] = {}
    for hit in hits.tolist():
        start = hit * _STEP
        for name in by_key[int(keys[hit])]:
            content = wanted[name]
            if name not in found and np.array_equal(raw[start : start + content.size], content):
                found[name] = start
    return found


def _graph(spans: list[tuple[str, int, int]]) -> str:
    """A name for what lies between weights."""
    count = sum(name.startswith("the graph") for name, _, _ in spans)
    return f"the graph, part {count + 1}" if count else "the graph"
