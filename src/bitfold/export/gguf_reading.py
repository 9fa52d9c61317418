"""A GGUF file, whoever wrote it: what it says of itself, and its tensors when they are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfold.errors import CheckpointError
from bitfold.export.ggml_unpacking import LAYOUTS, as_weight
from bitfold.export.gguf_head import TensorInfo, read_head
from bitfold.export.gguf_model import gguf_package
from bitfold.numerics import QuantizedTensor

__all__ = ["GgufFile", "GgufTensor", "open_gguf", "token_id"]

Bytes = NDArray[np.uint8]
_MAGIC = b"GGUF"
# What Python, numpy and the package gguf raise for a file that ends too early, or says nonsense.
_DAMAGE = (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError)
# What files say where a vocabulary lacks a special token: -1, as the unsigned numbers that the keys are too.
_NO_TOKEN = (-1, 2**32 - 1)
_WHOLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as it lies in the file: its type by ggml's name, its shape (rows first), and its bytes [rows, bytes of a
    row], not read yet."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: Bytes

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(self.data.nbytes)


@dataclass(frozen=True)
class GgufFile:
    """path; settings: every key of the head and its value; tensors: by name, in the file's order."""

    path: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family."""
        return str(self.settings["general.architecture"])

    def setting(self, key: str, default: Any = None) -> Any:
        """What stands at a key behind the architecture's name; CheckpointError where it is not there and has no
        default."""
        found = self.settings.get(f"{self.architecture}.{key}", default)
        if found is None:
            raise CheckpointError(
                f"{self.path} does not say {self.architecture}.{key}: it is incomplete; make or download it again."
            )
        return found

    def read(self, name: str) -> QuantizedTensor | Tensor:
        """A tensor: in the dtype that it has, a weight [out, in] with ggml's integers, or float32 where a type has no
        counterpart here; the values are ggml's, exactly.

        Raises CheckpointError for a type that cannot be read, and for values that are not finite.
        """
        tensor = self.tensors[name]
        try:
            value = _value(tensor)
        except (*_DAMAGE, NotImplementedError) as error:
            raise CheckpointError(
                f"{name} in {self.path} cannot be read as {tensor.type} ({_said(error)}): the file is damaged, or of a "
                "type that bitfold does not know; use another file."
            ) from error
        if isinstance(value, Tensor) and not torch.isfinite(value).all():
            raise CheckpointError(
                f"{name} in {self.path} is NaN or infinite in places: the file is broken; make or download it again."
            )
        return value


def open_gguf(path: Path) -> GgufFile:
    """The head of a file, and where its tensors lie.

    Raises CheckpointError for a file that is no GGUF file, or damaged; MissingExtraError without the package gguf.
    """
    try:
        with path.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): check the path."
        ) from error
    if magic != _MAGIC:
        raise CheckpointError(
            f"{path} is a file, but no GGUF file: give one, or the directory of a checkpoint."
        )
    gguf_package()
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r")
        head = read_head(content)
        tensors = {
            name: _tensor(name, info, content, head.end) for name, info in head.tensors.items()
        }
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({_said(error)}): make or download it again."
        ) from error
    settings = head.settings
    if not isinstance(settings.get("general.architecture"), str):
        raise CheckpointError(f"{path} names no architecture: it holds no model; use another file.")
    parts = settings.get("split.count", 1)
    if not isinstance(parts, int):
        raise CheckpointError(
            f"{path} is damaged (its split.count is {str(parts)[:40]!r}, no number): make or download it again."
        )
    if parts > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts of a model: join them first by llama.cpp's "
            "`llama-gguf-split --merge`."
        )
    return GgufFile(path, settings, tensors)


def token_id(settings: Mapping[str, Any], name: str, tokens: int) -> int | None:
    """The number of a special token (`bos`, `unknown` …) of so many; None where a file says that there is none.

    Raises ValueError for what is the number of no token.
    """
    found = settings.get(f"tokenizer.ggml.{name}_token_id")
    if found is None or found in _NO_TOKEN:
        return None
    if type(found) is not int or not 0 <= found < tokens:
        raise ValueError(f"its {name} token is {str(found)[:40]!r}, of {tokens} tokens")
    return found


def _tensor(name: str, info: TensorInfo, content: Bytes, end: int) -> GgufTensor:
    """A tensor and its bytes; ValueError for a type that is not known, and for one that goes beyond the file."""
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType(info.type)
    inputs, size = gguf.GGML_QUANT_SIZES[kind]
    *rest, columns = info.shape
    if columns % inputs:
        raise ValueError(f"{name} has rows of {columns}, and blocks of {inputs}")
    row, rows, start = columns // inputs * size, prod(rest), end + info.start
    if start + rows * row > len(content):
        raise ValueError(f"it ends within {name}")
    return GgufTensor(
        name, kind.name, info.shape, content[start : start + rows * row].reshape(*rest, row)
    )


def _value(tensor: GgufTensor) -> QuantizedTensor | Tensor:
    raw = np.array(tensor.data)  # a copy, so that the file is not kept open
    if tensor.type in _WHOLE:
        bits = torch.from_numpy(raw.reshape(-1))
        return bits.view(_WHOLE[tensor.type]).reshape(tensor.shape)
    if tensor.type in LAYOUTS and len(tensor.shape) == 2:
        return as_weight(raw, tensor.type)
    gguf = gguf_package()
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.type])
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(tensor.shape)


def _said(error: BaseException) -> str:
    said = " ".join(str(error).split()).rstrip(".")
    return said[:120] or type(error).__name__
