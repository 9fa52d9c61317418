"""A checkpoint directory written anew from a stored model: each weight said in another way, all else as it is."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from bitfold.errors import OutputError
from bitfold.export.artifact import copy_companions, index_json, shard_name, tensor_sums
from bitfold.export.exported import Progress
from bitfold.export.reading import StoredModel
from bitfold.numerics import QuantizedTensor

__all__ = ["appearing", "bytes_of", "write_directory", "write_shards"]

# A layer's name and its weight, as the tensors that stand for it.
Pack = Callable[[str, QuantizedTensor], dict[str, Tensor]]
Read = Callable[[str], QuantizedTensor | Tensor]


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A directory to write into, which takes the place of `out` at the end, and is gone after an error.

    Raises OutputError where something cannot be written.
    """
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written ({error.strerror or error}): make room, or choose another -o."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_directory(
    model: StoredModel, out: Path, pack: Pack, config: Mapping[str, Any], progress: Progress
) -> dict[str, int]:
    """Write weights, file by file as the model has them, index, checksums, config.json and tokenizer; returns how many
    weights there are of each type."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for name in model.names:
        by_file[model.file_of(name)].append(name)
    types = write_shards(list(by_file.values()), model.read, out, pack, progress)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_companions(model.checkpoint.path, out)
    progress(1, 1, "done")
    return types


def write_shards(
    parts: Sequence[Sequence[str]], read: Read, out: Path, pack: Pack, progress: Progress
) -> dict[str, int]:
    """Write weights, each part of them in a file of its own, index and checksums; returns how many weights there are of
    each type. read: the parameter of a full name."""
    shards: dict[str, list[str]] = {}
    sums: dict[str, str] = {}
    types: dict[str, int] = defaultdict(int)
    done, count, total = 0, sum(map(len, parts)), 0
    for number, names in enumerate(parts):
        tensors: dict[str, Tensor] = {}
        for name in names:
            progress(done, count, name)
            done += 1
            value = read(name)
            if isinstance(value, QuantizedTensor):
                tensors |= pack(name.removesuffix(".weight"), value)
                types[f"{value.scheme.bits} bits"] += value.shape.numel()
            else:
                tensors[name] = value
                types[str(value.dtype).removeprefix("torch.")] += value.numel()
        file = shard_name(number, len(parts))
        save_file(tensors, out / file, metadata={"format": "pt"})
        shards[file] = list(tensors)
        sums |= tensor_sums(tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (out / "model.safetensors.index.json").write_text(index_json(shards, total))
    (out / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
    return dict(types)


def bytes_of(directory: Path) -> int:
    """Of all its files."""
    return sum(file.stat().st_size for file in directory.iterdir())
