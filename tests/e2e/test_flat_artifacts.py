"""FlatQuant's Kronecker products, in closed form and learned, from `--method flat` to a loaded model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold
from models_zoo import TOKENS, Zoo

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
    assert bitfold.verify(tmp_path / "out").difference == 0
    assert report["online"]["maps"] == 8  # two norms, o_proj and down_proj or fc2, in two blocks
    for fits in report["fits"]:
        assert fits[0]["best"] <= fits[0]["start"]


def test_the_closed_form_alone(checkpoint: Zoo, tokens: Path, tmp_path: Path) -> None:
    report = _quantize(
        checkpoint("llama", FLOAT32), tokens, tmp_path / "out", set=("affine.epochs=0",)
    )
    assert bitfold.verify(tmp_path / "out").difference == 0
    loaded = bitfold.load(tmp_path / "out")
    left = loaded.get_parameter("model.layers.0.mlp.down_proj.online.left")
    right = loaded.get_parameter("model.layers.0.mlp.down_proj.online.right")
    assert (left.shape[0] * right.shape[0], left.shape[0]) == (96, 8)
    assert (left - torch.eye(8)).abs().max() > 0.1
    assert report["online"]["bytes"] == 4 * sum(
        value.numel() for name, value in loaded.named_parameters() if "online" in name
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt"])
@pytest.mark.parametrize("learned", [False, True])
def test_keys_have_matrices_of_their_own_where_they_are_quantized(
    family: str, learned: bool, checkpoint: Zoo, tokens: Path, tmp_path: Path
) -> None:
    settings = (f"affine.epochs={int(learned)}", "affine.clipping=false")
    report = _quantize(
        checkpoint(family, FLOAT32), tokens, tmp_path / "out", scheme="w4a4kv4", set=settings
    )
    assert bitfold.verify(tmp_path / "out").difference == 0
    folds = family == "opt"  # no rotary embedding: nothing runs there
    assert report["online"]["maps"] == (8 if folds else 10)
    model = bitfold.load(tmp_path / "out")
    names = [name for name, _ in model.named_parameters() if name.endswith("online.keys")]
    assert len(names) == (0 if folds else 2)
    if folds:
        return
    keys = model.get_parameter(names[0])
    assert keys.shape == (2, keys.shape[-1], keys.shape[-1])
    assert (keys - torch.eye(keys.shape[-1])).abs().max() > 0.1
    # A packed cache keeps turned keys.
    ids = TOKENS[:1, :20]
    with torch.no_grad():
        at_once = model(ids, use_cache=False).logits
        cache = bitfold.quantized_cache(model)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([12, 1, 7], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), at_once, atol=1e-2 * float(at_once.abs().max()))


def test_another_rounding(checkpoint: Zoo, tokens: Path, tmp_path: Path) -> None:
    _quantize(checkpoint("llama", FLOAT32), tokens, tmp_path / "out", method="flat+gptaq")
    assert bitfold.verify(tmp_path / "out").difference == 0
