"""The head of a GGUF file, read: settings, and where tensors lie (ggml's docs/gguf.md, versions 2 and 3).

The package gguf reads it, too, element by element, which takes 15 seconds for a vocabulary of 128,000 tokens and its
merges; here it is less than one. Whatever a damaged file says, no more is read than it has.
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Head", "TensorInfo", "read_head"]

_VERSIONS = (2, 3)
_MAGIC, _STRING, _ARRAY = b"GGUF", 8, 9
# The numbers' types by their code, as `struct` has them.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorInfo:
    """shape: rows first. type: ggml's code. start: of its bytes, behind the head."""

    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True)
class Head:
    """settings: every key and its value. tensors: by name, in the file's order. end: where their bytes begin."""

    settings: dict[str, Any]
    tensors: dict[str, TensorInfo]
    end: int


def read_head(content: Any) -> Head:
    """Of a file's bytes (anything with a buffer); ValueError for what is no head, or ends before it should."""
    reader = _Reader(memoryview(content))
    if reader.take(4) != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    if (version := reader.number("I")) not in _VERSIONS:
        raise ValueError(f"version {version}, and 2 and 3 are read")
    count, keys = reader.number("Q"), reader.number("Q")
    settings: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.string()
        settings[key] = reader.value(reader.number("I"))
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        name, dimensions = reader.string(), reader.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(reader.number("Q") for _ in range(dimensions))
        if name in tensors:
            raise ValueError(f"{name} is there twice")
        tensors[name] = TensorInfo(shape[::-1], reader.number("I"), reader.number("Q"))
    alignment = settings.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment}")
    return Head(settings, tensors, -(-reader.place // alignment) * alignment)


class _Reader:
    """Goes through bytes, and stops at their end."""

    def __init__(self, content: memoryview) -> None:
        self._content, self.place = content, 0

    def take(self, count: int) -> bytes:
        if count > len(self._content) - self.place:
            raise ValueError("it ends within its head")
        self.place += count
        return bytes(self._content[self.place - count : self.place])

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _NUMBERS:
            raise ValueError(f"a setting of type {kind}")
        return self.number(_NUMBERS[kind])

    def _array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            code = _NUMBERS[kind]
            raw = self.take(count * struct.calcsize(code))
            numbers = np.frombuffer(raw, dtype=np.dtype(code).newbyteorder("<"))
            found: list[Any] = numbers.tolist()
            return found
        if kind != _STRING:
            raise ValueError(f"an array of type {kind}")
        if 8 * count > len(self._content) - self.place:
            raise ValueError("it ends within its head")
        return [self.string() for _ in range(count)]
