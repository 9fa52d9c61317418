"""`export.json`: what an exported directory's bytes sum to, so that damage is told by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitfold.models.checkpoint import sha256_of
from bitfold.models.headers import EXPORT

__all__ = ["SUMS_FILE", "write_sums"]

SUMS_FILE = EXPORT


def write_sums(
    directory: Path, format: str, tensors: Mapping[str, Any], more: Mapping[str, Any], *, data: str
) -> None:
    """Write the format, the sum of each tensor's bytes (the caller's), and each small file's SHA-256.

    data: the file with the tensors, which has no sum of its own: its tensors have.
    """
    files = {
        file.name: sha256_of(file) for file in sorted(directory.iterdir()) if file.name != data
    }
    content = {"format": format, **more, "tensors": dict(tensors), "files": files}
    (directory / SUMS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
