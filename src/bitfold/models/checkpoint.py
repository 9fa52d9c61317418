"""A checkpoint directory read lazily: every check that needs no weights first, then tensors by name."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitfold.errors import CheckpointError

__all__ = ["Checkpoint", "TensorInfo", "sha256_of", "tensor_bytes"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and what its header says of it."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


class Checkpoint:
    """The safetensors of one model directory.

    Attributes: path; config (config.json as a dict); tensors (name → TensorInfo, in the files' order).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_json(path, "config.json")
        self.tensors = dict(_headers(path))

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


def _read_json(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no {name}: give the directory of a Hugging Face checkpoint."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{file} is not valid JSON ({error}): restore it from its source."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object: restore it from its source.")
    return content


def _headers(path: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Every tensor of the checkpoint, index and files held against each other."""
    if (path / INDEX).is_file():
        weight_map = _read_json(path, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX} has no weight_map: restore it from its source.")
        files = sorted(set(map(str, weight_map.values())))
        if missing := [name for name in files if not (path / name).is_file()]:
            raise CheckpointError(
                f"{path} lacks {len(missing)} of {len(files)} weight files ({', '.join(missing[:3])}): "
                "download the checkpoint again."
            )
        found = {name: info for file in files for name, info in _file_header(path / file)}
        for name, file in weight_map.items():
            if name not in found or found[name].file != file:
                raise CheckpointError(
                    f"{path / INDEX} says that {name} is in {file}, but it is not: "
                    "index and weight files do not belong together; download both again."
                )
        yield from found.items()
    elif (path / SINGLE).is_file():
        yield from _file_header(path / SINGLE)
    elif any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path} has safetensors files but neither {SINGLE} nor {INDEX}: "
            "rename a single file, or restore the index of several."
        )
    elif any(path.glob("*.bin")) or any(path.glob("*.pt")):
        raise CheckpointError(
            f"{path} has only pickled weights, which bitfold does not load (a pickle can run code): "
            "convert them to safetensors."
        )
    else:
        raise CheckpointError(f"{path} has no {SINGLE}: there are no weights to read.")


def _file_header(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                part = handle.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in _DTYPES:
                    raise CheckpointError(
                        f"{file}: {name} has dtype {dtype}, which bitfold does not read."
                    )
                yield name, TensorInfo(file.name, _DTYPES[dtype], tuple(part.get_shape()))
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error}): download it again."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}).") from error


def _refuse_nonfinite(tensor: Tensor, name: str, file: Path) -> None:
    # The sum is finite unless an element is not (or the sum overflows): look closer only then.
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{name} in {file} holds {count} values that are NaN or infinite: the checkpoint is broken; "
            "download or train it again."
        )
