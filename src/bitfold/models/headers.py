"""What a checkpoint directory says of itself before any weight is read: JSON files, index, safetensors headers.

transformers answers a damaged checkpoint with a traceback from deep inside, or not at all; every check here ends in
one sentence that names the file. It is quick whatever the size of the model.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitfold.errors import CheckpointError

__all__ = ["EXPORT", "INDEX", "WEIGHTS", "TensorInfo", "is_export", "read_headers", "read_json"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPORT = "export.json"
"""Of a directory that bitfold exported for an engine that takes no checkpoint."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
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
        """Bytes of its elements."""
        return self.dtype.itemsize * prod(self.shape)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a model directory; CheckpointError if it is not there or not one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{file.parent} has no {file.name}: give the directory of a Hugging Face checkpoint."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
        what = "is not valid JSON" if file.stat().st_size else "is empty, not valid JSON"
        raise CheckpointError(
            f"{file} {what} ({_first_line(error)}): copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file} must hold a JSON object, not a {type(content).__name__}: copy or download it again."
        )
    return content


def is_export(directory: Path) -> bool:
    """Whether a directory was exported by bitfold for an engine, and is no checkpoint."""
    weights = (directory / WEIGHTS).is_file() or (directory / INDEX).is_file()
    return (directory / EXPORT).is_file() and not weights


def read_headers(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint by name, in the files' order; index and files are held against each other.

    As in transformers a single file comes before an index. Raises CheckpointError where anything is missing, damaged
    or contradicts itself, and where the weights are pickles.
    """
    if (directory / WEIGHTS).is_file():
        return _file_header(directory / WEIGHTS)
    if (directory / INDEX).is_file():
        return _sharded_headers(directory)
    if is_export(directory):
        format = read_json(directory / EXPORT).get("format")
        raise CheckpointError(
            f"{directory} is an export in the format {format}, which runs in its own engine and is no checkpoint: "
            "`bitfold verify` of it runs it there; give the artifact that it was made from."
        )
    if pickles := sorted(found.name for glob in PICKLES for found in directory.glob(glob)):
        raise CheckpointError(
            f"{directory} has its weights only in {pickles[0]}, a pickle, which can run any code when opened and is "
            "refused: convert it to safetensors."
        )
    if others := sorted(found.name for found in directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{directory} has {others[0]}, but neither {WEIGHTS} nor {INDEX}: rename a single file to {WEIGHTS}, or "
            "restore the index of several."
        )
    raise CheckpointError(
        f"{directory} has no weights (neither {WEIGHTS} nor {INDEX}): copy or download them."
    )


def _sharded_headers(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: copy or download it again.")
    for name, shard in weight_map.items():
        # A shard outside the directory would make the checkpoint read files it was not given.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index} places {name} in {shard!r}, which is no file name: copy or download it again."
            )
    found: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).is_file():
            raise CheckpointError(
                f"{directory} has no {shard}, which {INDEX} names: copy or download it again."
            )
        found |= _file_header(directory / shard)
    absent = [n for n, shard in weight_map.items() if n not in found or found[n].file != shard]
    if absent:
        raise CheckpointError(
            f"{directory / weight_map[absent[0]]} does not hold {absent[0]}, as {INDEX} says ({len(absent)} missing): "
            "shards and index are of different checkpoints; copy or download both again."
        )
    return found


def _file_header(file: Path) -> dict[str, TensorInfo]:
    result: dict[str, TensorInfo] = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                part = handle.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in _DTYPES:
                    raise CheckpointError(
                        f"The tensor {name} in {file} has dtype {dtype}, which bitfold does not read: "
                        "convert the checkpoint to bfloat16."
                    )
                result[name] = TensorInfo(file.name, _DTYPES[dtype], tuple(part.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({_first_line(error)}): copy or download it again."
        ) from error
    return result


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
