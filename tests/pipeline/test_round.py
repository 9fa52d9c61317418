"""What a rounding is told of an input is what the layer will be given: earlier layers rounded, inputs quantized."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import bitfold
from bitfold.pipeline import measure
from bitfold.rounding import Gptq
from bitfold.statistics import InputStatistics
from models_zoo import TOKENS, build


def test_statistics_are_of_rounded_layers_and_quantized_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", torch.float32, tmp_path / "model")
    seen: dict[str, Tensor] = {}
    real_update, real_solve = InputStatistics.update, Gptq.solve

    def update(self: InputStatistics, x: Tensor, original: Tensor | None = None) -> None:
        for token in x.flatten(0, -2)[:4]:
            assert token.unique().numel() <= 16, "an input that is not in 4 bits was measured"
        real_update(self, x, original)

    def solve(self, layers, scale_dtype, statistics=None):
        for name, layer in layers.items():
            seen.setdefault(name, layer.weight.clone())
        return real_solve(self, layers, scale_dtype, statistics)

    weights: dict[str, list[Tensor]] = {}
    real_run = measure.run_for_inputs

    def run_for_inputs(block, names, run):
        # partial(skeleton.run, index, weights, batch)
        index, given = run.args[0], run.args[1]
        if index == 0:
            for name in names:
                weights.setdefault(name, []).append(given["self_attn.q_proj.weight"].clone())
        real_run(block, names, run)

    monkeypatch.setattr(InputStatistics, "update", update)
    monkeypatch.setattr(Gptq, "solve", solve)
    monkeypatch.setattr(measure, "run_for_inputs", run_for_inputs)
    np.save(tmp_path / "tokens.npy", TOKENS.numpy())
    bitfold.quantize(
        model, tmp_path / "out", method="gptq", scheme="w4a4", calibration=[tmp_path / "tokens.npy"]
    )
    original = seen["self_attn.q_proj"]
    assert torch.equal(weights["self_attn.q_proj"][0], original)
    rounded = weights["self_attn.o_proj"][0]
    assert not torch.equal(rounded, original)
    assert all(row.unique().numel() <= 16 for row in rounded)
