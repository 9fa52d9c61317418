"""Rotary embeddings that are scaled compute in llama.cpp what they compute in PyTorch, and come back by an import."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import changed, distance, logits, small

from bitfold.errors import CheckpointError, ExportError
from bitfold.export.exporting import export_to
from bitfold.export.importing import import_checkpoint
from bitfold.models.headers import read_json

pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
pytest.importorskip("xllamacpp", reason="the extra 'gguf' is not installed")

TOKENS = torch.arange(120) * 37 % 4096
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", LLAMA3),
    "llama3-mistral": ("mistral", LLAMA3),
    "yarn": ("llama", YARN),
    "yarn-qwen2": ("qwen2", YARN),
    "yarn-qwen3": ("qwen3", YARN | {"beta_fast": 32.0, "beta_slow": 1.0}),
    "yarn-attention": ("llama", YARN | {"attention_factor": 0.7}),
    "linear": ("llama", LINEAR),
}


@pytest.mark.parametrize("case", CASES)
def test_scaled_rotary_embeddings(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, rope = CASES[case]
    settings: dict[str, Any] = {"rope_parameters": rope, "head_dim": 32}
    if family == "mistral":
        settings["sliding_window"] = None
    if family == "qwen2":  # whose heads are as wide as they must be
        del settings["head_dim"]
    model = small(family, tmp_path / "model", monkeypatch, **settings)
    file = tmp_path / "model.gguf"
    export_to(model, "gguf", file)
    assert distance(file, model, TOKENS) < 0.005  # keys and values in half precision
    usual = {"rope_type": "default", "rope_theta": 10000.0}
    plain = small(family, tmp_path / "plain", monkeypatch, **settings | {"rope_parameters": usual})
    assert distance(file, plain, TOKENS) > 0.05  # so the scaling is seen at these lengths

    import_checkpoint(file, tmp_path / "back")
    before, after = logits(model, TOKENS), logits(tmp_path / "back", TOKENS)
    assert float((before - after).abs().max() / before.std()) < 2e-4
    found = read_json(tmp_path / "back" / "config.json")["rope_parameters"]
    for key in rope.keys() - {"beta_fast", "beta_slow"}:
        assert found[key] == pytest.approx(rope[key]), key


def test_what_llama_cpp_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "qwen2": (LLAMA3, "is of type 'llama3', and bitfold writes"),
        "gemma": (YARN, "is of type 'yarn', and bitfold writes"),
        "llama": (YARN | {"truncate": False}, "a yarn with truncate=False, and llama.cpp computes"),
        "qwen3": (YARN | {"beta_slow": 2.0}, "a yarn with beta_slow=2.0, and llama.cpp computes"),
        "mistral": (
            {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, "is of type 'dynamic'"
        ),
    }  # fmt: skip
    for family, (rope, sentence) in cases.items():
        model = small(family, tmp_path / family, monkeypatch, rope_parameters=rope)
        with pytest.raises(ExportError, match=sentence):
            export_to(model, "gguf", tmp_path / "model.gguf")


def test_factors_of_no_llama_3_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"rope_parameters": LLAMA3, "head_dim": 32}
    model = small("llama", tmp_path / "model", monkeypatch, **settings)
    export_to(model, "gguf", tmp_path / "model.gguf")

    def other(name: str, data: np.ndarray, type: Any) -> tuple[np.ndarray, Any]:
        if name == "rope_freqs.weight":
            data = np.linspace(1, 9, len(data)).astype(np.float32)
        return data, type

    file = changed(tmp_path / "model.gguf", tmp_path / "other.gguf", other)
    with pytest.raises(CheckpointError, match="that are not those of a Llama 3"):
        import_checkpoint(file, tmp_path / "back")
