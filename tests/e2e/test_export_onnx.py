"""`bitfold export --to onnx`, and `bitfold verify` of what it wrote, from the command line."""

import json
from pathlib import Path

import pytest
from commands import Run

pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")


def test_onnx_from_the_command_line(run: Run, artifact: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "model", tmp_path / "text.txt"
    made = run(f"export {artifact} --to onnx -o {out} --json").json
    assert made["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    again = run(f"export {artifact} --to onnx -o {out}")
    assert again.code == 1
    assert "is there already: add --overwrite" in again.err
    assert run(f"export {artifact} --to onnx -o {out} --overwrite").code == 0

    verified = run(f"verify {out} --json").json
    assert verified["engine"] == "ONNX Runtime"
    seen = run(f"inspect {out} --json").json
    assert (seen["kind"], seen["format"]) == ("exported for ONNX Runtime", "onnx")
    assert verified["difference"] < verified["tolerance"]
    text.write_text("The history of the world is long, and most of it was never written. " * 200)
    compared = run(f"verify {out} --against {artifact} --text {text} --json").json["text"]
    assert abs(compared["perplexity_engine"] / compared["perplexity_simulation"] - 1) < 0.01
    assert "ONNX Runtime differ" in " ".join(run(f"verify {out}").out.split())
    assert "give both, or neither" in run(f"verify {out} --text {text}").err
    assert "leave --engine" in run(f"verify {out} --engine vllm").err


def test_damage_is_named_from_the_command_line(run: Run, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert run(f"export {artifact} --to onnx -o {out}").code == 0
    name = "model.layers.1.mlp.gate_proj.weight"
    place = json.loads((out / "export.json").read_text())["tensors"][name]
    raw = bytearray((out / "model.onnx.data").read_bytes())
    raw[place["offset"]] ^= 128
    (out / "model.onnx.data").write_bytes(raw)
    found = run(f"verify {out}")
    assert found.code == 1
    assert name in found.err
