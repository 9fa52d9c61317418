"""A directory that appears whole or not at all, and the sums that tell damage to it by name."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitfold.models.checkpoint import sha256_of

__all__ = ["SUMS_FILE", "complete", "staged"]

# What every directory that is exported has.
SUMS_FILE = "export.json"


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write into, that takes its place at the end; after an error nothing is left of it."""
    partial, before = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.before")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            shutil.rmtree(before, ignore_errors=True)
            os.replace(out, before)
        os.replace(partial, out)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def complete(
    directory: Path, format: str, tensors: Mapping[str, Any], more: Mapping[str, Any]
) -> None:
    """Write export.json: the format, what each tensor's bytes sum to, and each small file's SHA-256.

    The file with the tensors has no sum of its own: its tensors have.
    """
    files = {
        file.name: sha256_of(file) for file in sorted(directory.iterdir()) if file.suffix != ".data"
    }
    content = {"format": format, **more, "tensors": dict(tensors), "files": files}
    (directory / SUMS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
