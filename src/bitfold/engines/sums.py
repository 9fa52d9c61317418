"""An exported directory's bytes held against the sums in its export.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfold.errors import CheckpointError, VerificationError
from bitfold.export.artifact import tensor_sum
from bitfold.export.sums import SUMS_FILE
from bitfold.models.checkpoint import sha256_of
from bitfold.models.headers import read_json

__all__ = ["check_files", "check_tensors", "format_of", "read_sums"]


def format_of(directory: Path) -> str | None:
    """The format that an export.json names; None where there is none, or one that is damaged."""
    file = directory / SUMS_FILE
    found = read_json(file).get("format") if file.is_file() else None
    return found if isinstance(found, str) else None


def read_sums(directory: Path, format: str) -> dict[str, Any]:
    """What export.json says. Raises CheckpointError where there is no directory, VerificationError for another file
    than one of this format."""
    file = directory / SUMS_FILE
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory, which this export is: name one.")
    if not file.is_file():
        raise VerificationError(
            f"{directory} was not written by bitfold (it has no {SUMS_FILE}): there is nothing to verify it against."
        )
    content = read_json(file)
    try:
        whole = content["format"] == format and isinstance(content["files"], dict)
        whole = whole and all(
            {"offset", "length", "sum"} <= entry.keys() for entry in content["tensors"].values()
        )
    except (KeyError, AttributeError):
        whole = False
    if not whole:
        raise VerificationError(f"{file} is damaged, or of another format: export it again.")
    return content


def check_files(directory: Path, content: Mapping[str, Any]) -> None:
    """Raises VerificationError for the first file that is missing, or not what was written."""
    for name, wanted in content["files"].items():
        file = directory / name
        if not file.is_file():
            raise VerificationError(f"{name} is missing from {directory}: export it again.")
        if sha256_of(file) != wanted:
            raise VerificationError(
                f"{file} is not what was written: the file was changed or damaged; export it again."
            )


def check_tensors(data: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises VerificationError for the first tensor of a file that is not what was written. tensors: by name, where
    (`offset`, `length`) and of what sum."""
    if not data.is_file():
        raise VerificationError(f"{data.name} is missing from {data.parent}: export it again.")
    end = max((entry["offset"] + entry["length"] for entry in tensors.values()), default=0)
    if data.stat().st_size != end:
        raise VerificationError(
            f"{data} has {data.stat().st_size} bytes of {end}: it was cut off or changed; export it again."
        )
    with data.open("rb") as stream:
        for name, entry in tensors.items():
            stream.seek(entry["offset"])
            raw = np.frombuffer(bytearray(stream.read(entry["length"])), dtype=np.uint8)
            if tensor_sum(torch.from_numpy(raw)) != entry["sum"]:
                raise VerificationError(
                    f"{name} in {data} is not what was written: the file was changed or damaged; export it again."
                )
