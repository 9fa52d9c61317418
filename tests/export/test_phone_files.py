"""Files for ExecuTorch and LiteRT in those engines: they hold our integers, and compute what was simulated."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_models import exactly, flip
from test_phone_rules import phone_scheme
from tiny_artifacts import everywhere, logits, quantize, simulate, write

from bitfold.engines.phone_engine import check_phone_python, phone_engine
from bitfold.engines.verify_phone import verify_phone
from bitfold.errors import CheckpointError, EngineError, VerificationError
from bitfold.export import compressed_tensors
from bitfold.export.exporting import export_to
from bitfold.export.stored_bytes import halves
from models_zoo import TOKENS, Zoo


def need(engine: str) -> None:
    """Skips without the engine."""
    module = {"executorch": "executorch", "litert": "ai_edge_litert"}[engine]
    pytest.importorskip(module, reason=f"the extra '{engine}' is not installed")


def answers(directory: Path, engine: str) -> torch.Tensor:
    """Logits of `TOKENS`, the first window in pieces."""
    with phone_engine(directory, engine, check_phone_python(engine, None)) as running:
        whole = torch.stack([running.logits(tokens) for tokens in TOKENS])
        running.start()
        pieces = [running.decode(piece.tolist()) for piece in TOKENS[0].split([9, 1, 1, 13])]
        assert torch.allclose(torch.cat(pieces), whole[0], atol=1e-4)
        generated = running.generate(TOKENS[0, :4].tolist(), 3)
        assert generated[0] == int(whole[0, 3].argmax())
    return whole


@pytest.mark.parametrize("family", ["llama-biased", "mistral", "qwen2", "qwen3"])
def test_families_are_themselves_in_litert(family: str, checkpoint: Zoo, tmp_path: Path) -> None:
    need("litert")
    model = checkpoint(family, torch.float32)
    export_to(model, "litert", tmp_path / "model", form="256")
    with torch.no_grad():
        expected = exactly(model)(TOKENS).logits
    found = answers(tmp_path / "model", "litert")
    assert float((found - expected).abs().max() / expected.std()) < 1e-4


CASES = [("litert", "w8a8"), ("litert", "w4a8"), ("litert", "w4a8g32"), ("executorch", "w4a8g32")]


@pytest.mark.parametrize(("engine", "notation"), CASES)
def test_schemes_are_the_simulation(
    engine: str, notation: str, checkpoint: Zoo, tmp_path: Path
) -> None:
    need(engine)
    made = quantize(
        checkpoint("llama", torch.bfloat16), everywhere(phone_scheme(notation, scales="half"))
    )
    choice = write(made, tmp_path / "artifact", compressed_tensors)
    exported = export_to(tmp_path / "artifact", engine, tmp_path / "model", form="256")
    assert exported.types[f"{notation[1]} bits"] > 0
    assert not any("rounded" in note for note in exported.notes)
    expected = logits(simulate(made, choice, torch.float32))
    found = answers(tmp_path / "model", engine)
    # Sums in another order now and then make another integer of an input.
    assert float((found - expected).square().mean().sqrt() / expected.std()) < 0.05

    content = json.loads((tmp_path / "model" / "export.json").read_text())
    raw = np.fromfile(next((tmp_path / "model").glob("model.*")), dtype=np.uint8)
    for name, value in made.weights.items():
        place = content["tensors"][f"{name}.weight"]
        ours = value.codes.numpy().reshape(-1).view(np.uint8)
        if notation.startswith("w4"):
            ours = halves(value.codes, 8 if engine == "executorch" else 0)
        assert np.array_equal(raw[place["offset"] :][: place["length"]], ours)


@pytest.fixture
def directory(checkpoint: Zoo, tmp_path: Path) -> Path:
    need("litert")
    made = quantize(checkpoint("llama", torch.bfloat16), everywhere(phone_scheme("w8a8")))
    write(made, tmp_path / "artifact", compressed_tensors)
    export_to(tmp_path / "artifact", "litert", tmp_path / "model", form="256")
    return tmp_path / "model"


def test_damage_is_named(directory: Path, tmp_path: Path) -> None:
    assert verify_phone(directory).difference is None  # no probe was recorded
    tensors = json.loads((directory / "export.json").read_text())["tensors"]
    for name in ("model.layers.1.mlp.up_proj.weight", "the graph"):
        damaged = shutil.copytree(directory, tmp_path / f"damaged {name}")
        place = tensors[name]
        flip(damaged / "model.tflite", place["offset"] + place["length"] // 2)
        with pytest.raises(VerificationError, match=f"{name} in .* is not what was written"):
            verify_phone(damaged)
    short = shutil.copytree(directory, tmp_path / "short")
    raw = (short / "model.tflite").read_bytes()
    (short / "model.tflite").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(VerificationError, match="was cut off or changed"):
        verify_phone(short)
    (short / "export.json").unlink()
    with pytest.raises((VerificationError, CheckpointError)):
        verify_phone(short)


def test_a_file_that_does_not_load(directory: Path) -> None:
    (directory / "model.tflite").write_bytes(b"no model")
    with (
        pytest.raises(EngineError, match="does not run in LiteRT"),
        phone_engine(directory, "litert", check_phone_python("litert", None)),
    ):
        pass
