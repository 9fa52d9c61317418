"""A checkpoint directory read lazily: configuration and headers first, then tensors by name."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bitfold.errors import CheckpointError
from bitfold.models.headers import read_headers, read_json

__all__ = ["Checkpoint", "sha256_of", "tensor_bytes"]


class Checkpoint:
    """The safetensors of one model directory.

    Attributes: path; config (config.json as a dict, which has a `model_type`); tensors (name → TensorInfo, in the
    files' order).
    """

    def __init__(self, path: Path) -> None:
        """Read everything but the weights; CheckpointError where anything is missing, damaged or contradicts itself."""
        self.path = path
        self.config = read_json(path / "config.json")
        if not isinstance(self.config.get("model_type"), str):
            raise CheckpointError(
                f"{path / 'config.json'} names no model_type: give the config.json of a transformers model."
            )
        self.tensors = read_headers(path)

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return [self.path / name for name in sorted({info.file for info in self.tensors.values()})]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(
        self,
        names: Iterable[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """The tensors of these names, floating ones in `dtype` if given.

        Raises CheckpointError, naming tensor and file, where one holds NaN or infinity.
        The files are mapped only while reading, so that their pages do not stay resident.
        """
        result: dict[str, Tensor] = {}
        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            for name in names:
                info = self.tensors[name]
                if info.file not in handles:
                    handles[info.file] = stack.enter_context(
                        safe_open(self.path / info.file, framework="pt")
                    )
                tensor = handles[info.file].get_tensor(name)
                if tensor.is_floating_point():
                    tensor = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
                    _refuse_nonfinite(tensor, name, self.path / info.file)
                else:
                    tensor = tensor.to(device=device, copy=True)
                result[name] = tensor
        return result

    def fingerprint(self) -> str:
        """A quick identity: names, sizes and modification times of the files, and the config."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            stat = file.stat()
            digest.update(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
        return digest.hexdigest()


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that tensors take on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _refuse_nonfinite(tensor: Tensor, name: str, file: Path) -> None:
    # The sum is finite unless an element is not (or the sum overflows): look closer only then.
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"The tensor {name} in {file} is NaN or infinite in {count} of {tensor.numel()} values: "
            "the checkpoint is broken; download or train it again."
        )
