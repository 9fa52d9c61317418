"""What all tests share: one thread, since pytest runs one process a core; and tiny checkpoints, each built once."""

from pathlib import Path

import pytest
import torch

from models_zoo import Zoo, build

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Builds each tiny checkpoint once; it is not to be changed."""
    built: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str, dtype: torch.dtype) -> Path:
        key = (family, dtype)
        if key not in built:
            built[key] = build(family, dtype, tmp_path_factory.mktemp(family))
        return built[key]

    return get
