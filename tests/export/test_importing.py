"""What others quantized computes the same once it is imported."""

import json
from pathlib import Path

import pytest
import torch

import bitfold
from bitfold.assets import DEMO_MODEL
from bitfold.errors import CheckpointError, OutputError
from bitfold.export.exporting import export_to
from bitfold.export.importing import import_checkpoint
from bitfold.export.reading import read_model
from bitfold.numerics import QuantizedTensor

TOKENS = torch.arange(24)[None] * 37 % 4096


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return bitfold.load(path, dtype="float32")(TOKENS).logits


def exact(path: Path) -> dict[str, torch.Tensor]:
    """Every parameter's values in float64."""
    stored = read_model(path)
    read = {name: stored.read(name) for name in stored.names}
    return {
        name: value.dequantize(torch.float64) if isinstance(value, QuantizedTensor) else value
        for name, value in read.items()
    }


@pytest.mark.parametrize(
    ("format", "scheme", "symmetric"),
    [
        ("gptq", "w4a16g128", "false"),
        ("gptq", "w3a16", "true"),
        ("awq", "w4a16g64", "false"),
        ("awq", "w4a16", "true"),
    ],
)
def test_there_and_back(format: str, scheme: str, symmetric: str, tmp_path: Path) -> None:
    artifact, theirs, ours = (tmp_path / name for name in ("artifact", "theirs", "ours"))
    bitfold.quantize(
        DEMO_MODEL, artifact, method="rtn", scheme=scheme, set=[f"weight.symmetric={symmetric}"]
    )
    export_to(artifact, format, theirs)
    imported = import_checkpoint(theirs, ours)
    assert imported.types[f"{scheme[1]} bits"] == 4_718_592
    before, after = exact(artifact), exact(ours)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    difference = logits(ours) - logits(artifact)  # whose weights transformers may round to bfloat16
    assert float(difference.square().mean().sqrt() / logits(ours).std()) < 0.01


def test_compressed_tensors_keep_their_activations(tmp_path: Path) -> None:
    bitfold.quantize(
        DEMO_MODEL, tmp_path / "a", method="rtn", scheme="w4a8", set=["weight.symmetric=true"]
    )
    import_checkpoint(tmp_path / "a", tmp_path / "b")
    assert torch.allclose(logits(tmp_path / "b"), logits(tmp_path / "a"), atol=1e-4)


def test_static_inputs_come_along(tmp_path: Path) -> None:
    bitfold.quantize(
        DEMO_MODEL, tmp_path / "a", method="rtn", scheme="w8a8", samples=2, sequence_length=64,
        set=["weight.symmetric=true", "activation.static=true"],
    )  # fmt: skip
    import_checkpoint(tmp_path / "a", tmp_path / "b")
    assert torch.allclose(logits(tmp_path / "b"), logits(tmp_path / "a"), atol=1e-4)


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_gptq_exported_again_is_the_same(symmetric: str, tmp_path: Path) -> None:
    """Zero-points are stored in two ways: the file must be in the one that its config says."""
    bitfold.quantize(
        DEMO_MODEL,
        tmp_path / "a",
        method="rtn",
        scheme="w4a16g128",
        set=f"weight.symmetric={symmetric}",
    )
    for source, target in (("a", "b"), ("b", "c")):
        export_to(tmp_path / source, "gptq", tmp_path / target)
    before, after = exact(tmp_path / "a"), exact(tmp_path / "c")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_directory_that_is_no_model_is_not_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "out" / "letters.txt"
    precious.parent.mkdir()
    precious.write_text("dear")
    with pytest.raises(OutputError, match="is no model's directory"):
        import_checkpoint(DEMO_MODEL, tmp_path / "out", overwrite=True)
    assert precious.read_text() == "dear"


def test_zero_points_of_a_format_that_says_it_has_none(tmp_path: Path) -> None:
    bitfold.quantize(DEMO_MODEL, tmp_path / "a", method="rtn", scheme="w4a16g128")
    export_to(tmp_path / "a", "gptq", tmp_path / "b")
    file = tmp_path / "b" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["sym"] = True
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="not in the middle of the grid"):
        import_checkpoint(tmp_path / "b", tmp_path / "c")


def test_what_cannot_be_imported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not quantized"):
        import_checkpoint(DEMO_MODEL, tmp_path / "out")
    with pytest.raises(OutputError, match="There is no directory"):
        import_checkpoint(DEMO_MODEL, tmp_path / "none" / "out")
    with pytest.raises(OutputError, match="is there already"):
        import_checkpoint(DEMO_MODEL, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"quant_method": "exl3"}, "is quantized as 'exl3'"),
        ({"dynamic": {"+:a": {}}}, "settings of its own"),
        ({"checkpoint_format": "marlin"}, "in the version 'marlin'"),
        ({"bits": 9}, "cannot read"),
        ({"bits": 8}, "does not hold the weight"),
    ],
)
def test_settings_that_bitfold_cannot_read(
    change: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    bitfold.quantize(DEMO_MODEL, tmp_path / "artifact", method="rtn", scheme="w4a16g128")
    export_to(tmp_path / "artifact", "gptq", tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=sentence):
        import_checkpoint(tmp_path / "theirs", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "theirs"]
