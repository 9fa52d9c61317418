"""FlatQuant's Kronecker products, in closed form and learned, from `--method flat` to a loaded model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold
from models_zoo import Zoo

FLOAT32, BF16 = torch.float32, torch.bfloat16


def _quantize(model: Path, tokens: Path, out: Path, **more: Any) -> dict[str, Any]:
    options = {"method": "flat", "scheme": "w4a4", "samples": 4, "set": ("affine.epochs=1",)}
    bitfold.quantize(model, out, calibration=tokens, **options | more)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt"])
def test_what_loads_is_what_was_simulated(
    family: str, dtype: torch.dtype, checkpoint: Zoo, tokens: Path, tmp_path: Path
) -> None:
    report = _quantize(checkpoint(family, dtype), tokens, tmp_path / "out")
    assert max(report["folding_errors"]) < (1e-4 if dtype == FLOAT32 else 2e-2)
    assert bitfold.verify(tmp_path / "out").difference < 1e-5
    assert report["online"]["maps"] == 8  # two norms, o_proj and down_proj or fc2, in two blocks
    for fits in report["fits"]:
        assert fits[0]["best"] <= fits[0]["start"]


def test_the_closed_form_alone(checkpoint: Zoo, tokens: Path, tmp_path: Path) -> None:
    report = _quantize(
        checkpoint("llama", FLOAT32), tokens, tmp_path / "out", set=("affine.epochs=0",)
    )
    assert bitfold.verify(tmp_path / "out").difference < 1e-5
    loaded = bitfold.load(tmp_path / "out")
    left = loaded.get_parameter("model.layers.0.mlp.down_proj.online.left")
    right = loaded.get_parameter("model.layers.0.mlp.down_proj.online.right")
    assert (left.shape[0] * right.shape[0], left.shape[0]) == (96, 8)
    assert (left - torch.eye(8)).abs().max() > 0.1
    assert report["online"]["bytes"] == 4 * sum(
        value.numel() for name, value in loaded.named_parameters() if "online" in name
    )


def test_another_rounding(checkpoint: Zoo, tokens: Path, tmp_path: Path) -> None:
    _quantize(checkpoint("llama", FLOAT32), tokens, tmp_path / "out", method="flat+gptaq")
    assert bitfold.verify(tmp_path / "out").difference < 1e-5
