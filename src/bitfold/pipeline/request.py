"""What a run was asked for, as one hash: the same request onto the same place goes on, or is finished already."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from bitfold.data.calibration import Calibration
from bitfold.export.artifact import companion_files
from bitfold.models.checkpoint import Checkpoint, sha256_of
from bitfold.recipe import Recipe
from bitfold.version import VERSION

__all__ = ["request_hash"]


def request_hash(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | None,
    dtype: torch.dtype,
    device: torch.device,
    allocation: Mapping[str, Any] | None = None,
) -> str:
    """Everything the artifact's bytes depend on, hashed; hexadecimal. allocation: how bits were found, as reported."""
    parts: dict[str, Any] = {
        "bitfold": VERSION,
        "source": checkpoint.fingerprint(),
        "companions": {file.name: sha256_of(file) for file in companion_files(checkpoint.path)},
        "recipe": recipe.to_yaml(),
        "calibration": calibration.sha256 if calibration else None,
        "dtype": str(dtype),
        "device": device.type,
    }
    if allocation is not None:
        parts["allocation"] = allocation
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
