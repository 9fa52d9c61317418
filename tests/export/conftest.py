"""Fixtures of the export formats' tests."""

from pathlib import Path

import pytest
import torch
from tiny_artifacts import Checkpoint, build


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Builds each tiny checkpoint once."""
    built: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str, dtype: torch.dtype) -> Path:
        key = (family, dtype)
        if key not in built:
            built[key] = build(family, dtype, tmp_path_factory.mktemp(family))
        return built[key]

    return get
