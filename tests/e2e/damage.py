"""Ways of spoiling a model directory."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = [
    "cast",
    "cut",
    "drop",
    "edit_config",
    "edit_index",
    "edit_json",
    "flip_byte",
    "poison",
    "raw_header",
    "shard",
    "swap",
    "write",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A file of this content, in place of what was there."""

    def change(model: Path) -> None:
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def drop(name: str) -> Callable[[Path], None]:
    """Without this file."""
    return lambda model: (model / name).unlink()


def swap(name: str, other: str) -> Callable[[Path], None]:
    """With this file under another name."""
    return lambda model: (model / name).rename(model / other)


def cut(name: str) -> Callable[[Path], None]:
    """Half of this file."""

    def change(model: Path) -> None:
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[: len(content) // 2])

    return change


def poison(tensor: str, value: float) -> Callable[[Path], None]:
    """One element of a tensor is not finite."""

    def change(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        tensors[tensor].view(-1)[7] = value
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return change


def cast(tensor: str, dtype: torch.dtype) -> Callable[[Path], None]:
    """A tensor of another dtype."""

    def change(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        tensors[tensor] = tensors[tensor].to(dtype)
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return change


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Other values in a JSON file."""

    def change(model: Path) -> None:
        content = json.loads((model / name).read_text()) | changes
        (model / name).write_text(json.dumps(content))

    return change


def edit_config(**changes: Any) -> Callable[[Path], None]:
    """Other values in config.json."""
    return edit_json("config.json", **changes)


def shard(model: Path) -> None:
    """Two shards and an index instead of one file."""
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_index(**entries: str) -> Callable[[Path], None]:
    """Shards whose index has other entries."""

    def change(model: Path) -> None:
        shard(model)
        index = json.loads((model / INDEX).read_text())
        index["weight_map"] |= {name.replace("__", "."): file for name, file in entries.items()}
        (model / INDEX).write_text(json.dumps(index))

    return change


def flip_byte(name: str, tensor: str) -> Callable[[Path], None]:
    """One bit of a tensor is wrong, and the file is whole."""

    def change(model: Path) -> None:
        tensors = load_file(model / name)
        tensors[tensor].view(-1).view(torch.uint8)[100] ^= 1
        save_file(tensors, model / name, metadata={"format": "pt"})

    return change


def raw_header(dtype: str) -> bytes:
    """A safetensors file of one tensor in this dtype."""
    header = json.dumps({"odd": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)
