"""What all tests share: one thread, since pytest runs one process a core; hypothesis; tiny checkpoints, built once."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from models_zoo import Zoo, build

torch.set_num_threads(1)
# The same examples every time: a test that fails, fails for everybody.
settings.register_profile("bitfold", derandomize=True, deadline=None)
settings.load_profile("bitfold")


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
