"""A stored model read layer by layer is the model that loads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bitfold
from bitfold.export.reading import read_model
from bitfold.numerics import QuantizedTensor
from bitfold.runtime.load import load
from bitfold.runtime.quantized_linear import QuantizedLinear
from models_zoo import TOKENS, Zoo

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SCHEMES = (
    *("w4a16g32", "w3a16", "w2a16g32", "w8a8", "w4a8g32", "wfp8afp8", "wnf4a16g32"),
    *("wmxfp4a16", "wnvfp4a16", "w4a4", "w8a16", "w4a16kv8", "w4a4q4kv4"),
)


def artifact(checkpoint: Zoo, out: Path, scheme: str, *settings: str, method: str = "rtn") -> Path:
    np.save(out / "ids.npy", TOKENS.numpy())
    bitfold.quantize(
        str(checkpoint("llama", BFLOAT16)), out / "artifact", method=method, scheme=scheme, set=settings,
        calibration=out / "ids.npy", samples=2,
    )  # fmt: skip
    return out / "artifact"


def loaded_weights(path: Path) -> dict[str, Tensor]:
    """Every parameter of the model that loads, quantized ones as they are multiplied."""
    model = load(path, dtype=FLOAT32)
    weights = {name: value for name, value in model.state_dict().items() if "." in name}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weights[f"{name}.weight"] = module.dequantize(FLOAT32)
    return weights


def values(read: QuantizedTensor | Tensor, config: dict[str, Any]) -> Tensor:
    """As loaders unpack them: those that turn weights back into floating point at once do it in the scales' dtype."""
    if not isinstance(read, QuantizedTensor):
        return read.float()
    at_once = config["quantization_config"].get("dequantize")
    return read.dequantize(BFLOAT16 if at_once else FLOAT32).float()


def _symmetry(scheme: str, symmetric: str) -> list[str]:
    return [f"weight.symmetric={symmetric}"] if scheme[1].isdigit() else []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_every_parameter_is_the_one_that_loads(
    checkpoint: Zoo, tmp_path: Path, scheme: str, symmetric: str
) -> None:
    path = artifact(checkpoint, tmp_path, scheme, *_symmetry(scheme, symmetric))
    stored, weights = read_model(path), loaded_weights(path)
    names = list(stored.names)
    assert len(set(names)) == len(names)
    for name in names:
        assert torch.equal(values(stored.read(name), stored.config), weights[name].float()), name
    parameters = set(read_model(checkpoint("llama", BFLOAT16)).names)
    assert set(names) == parameters
    quantized = [n for n in names if isinstance(stored.read(n), QuantizedTensor)]
    assert len(quantized) == 14
    assert stored.quantizes_heads == ("kv" in scheme)
    assert stored.runs == ()


def test_maps_that_run_are_named(checkpoint: Zoo, tmp_path: Path) -> None:
    stored = read_model(artifact(checkpoint, tmp_path, "w4a4", method="quarot"))
    assert "model.layers.0.mlp.down_proj" in stored.runs
