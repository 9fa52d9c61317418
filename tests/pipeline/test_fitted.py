"""What `--for` says before quantizing is what the exporters do afterwards."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold
from bitfold.allocation import Mixed, candidates
from bitfold.assets import DEMO_MODEL
from bitfold.errors import BitfoldError, ExportError, MissingExtraError, RecipeError
from bitfold.export.exporting import TARGETS, export_to
from bitfold.export.reading import read_model
from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.numerics.stored_scale import block_steps
from models_zoo import build

LAYER = "model.layers.3.mlp.down_proj.weight"
CASES = [
    ("w4a16g32", ("weight.symmetric=true",)),
    ("w4a16g128", ()),
    ("w3a16", ()),
    ("w8a8", ("weight.symmetric=true",)),
    ("w4a16q4kv4", ()),
    ("wnf4a16", ()),
    ("w6a16g64", ()),
]


@pytest.mark.parametrize(("scheme", "changed"), CASES)
def test_what_is_said_before_is_what_happens(
    scheme: str, changed: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    options = {"method": "rtn", "scheme": scheme, "set": changed}
    bitfold.quantize(DEMO_MODEL, tmp_path / "a", **options)
    pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    for format in TARGETS:
        said = exported = notes = ""
        try:
            bitfold.quantize(DEMO_MODEL, tmp_path / "b", **options, meant_for=format, dry_run=True)
        except ExportError as error:
            said = str(error)
        try:
            notes = " ".join(export_to(tmp_path / "a", format, tmp_path / format).notes)
        except MissingExtraError:
            pass  # an extra for phones: all else was right
        except BitfoldError as error:
            exported = str(error)
        stops = bool(exported) or "written in floating point" in notes
        assert bool(said) == stops, (format, said, exported, notes)


def test_no_scale_is_rounded_at_export(tmp_path: Path) -> None:
    """Of a checkpoint in float32, whose scales would be."""
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    model = tmp_path / "model"
    bitfold.load(DEMO_MODEL, dtype="float32").save_pretrained(model)
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, model)
    common = {"method": "rtn", "scheme": "w4a16g32", "set": "weight.symmetric=true"}
    bitfold.quantize(model, tmp_path / "a", **common)
    bitfold.quantize(model, tmp_path / "b", **common, meant_for="gguf")
    assert any(
        "rounded" in note for note in export_to(tmp_path / "a", "gguf", tmp_path / "a.gguf").notes
    )
    assert not export_to(tmp_path / "b", "gguf", tmp_path / "b.gguf").notes


def test_scales_in_blocks_are_taken_where_llama_cpp_has_them(tmp_path: Path) -> None:
    result = bitfold.quantize(
        DEMO_MODEL, tmp_path / "a", method="gptq+distil", scheme="w3a16g16", meant_for=["gguf"],
        set=("weight.symmetric=true", "distil.epochs=1"), samples=4, sequence_length=64,
    )  # fmt: skip
    weight = read_model(result.out).read(LAYER)
    assert isinstance(weight, QuantizedTensor)
    assert block_steps(weight.scale, weight.scheme) is not None
    types = export_to(tmp_path / "a", "gguf", tmp_path / "a.gguf").types
    assert "Q3_K" in types
    plain = bitfold.quantize(
        DEMO_MODEL, tmp_path / "b", method="rtn", scheme="w3a16g16", set="weight.symmetric=true"
    )
    other = read_model(plain.out).read(LAYER)
    assert isinstance(other, QuantizedTensor)
    assert block_steps(other.scale, other.scheme) is None


def test_the_usual_scheme_of_gguf(tmp_path: Path) -> None:
    result = bitfold.quantize(DEMO_MODEL, tmp_path / "a", method="rtn", meant_for="gguf")
    assert result.scheme == "w4a16g32"
    assert not [note for note in result.notes if "gguf" in note]
    types = export_to(tmp_path / "a", "gguf", tmp_path / "a.gguf").types
    assert set(types) == {"Q4_0", "BF16", "F32"}


def test_all_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    model = build("opt", torch.float32, tmp_path / "model")
    with pytest.raises(ExportError) as error:
        bitfold.quantize(
            model, tmp_path / "a", method="rtn", scheme="w3a8", meant_for=["gguf", "awq", "vllm"]
        )
    said = str(error.value)
    assert all(f"({number})" in said for number in (1, 2, 3))
    assert "not for 'opt'" in said
    assert "integers of 4 bits, not int of 3" in said
    assert "weight.symmetric=true" in said
    assert not (tmp_path / "a").exists()


def test_unknown_engines_and_uniform_formats(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="did you mean 'gguf'"):
        bitfold.quantize(DEMO_MODEL, tmp_path / "a", meant_for="ggufs")
    with pytest.raises(RecipeError, match="gptq has one scheme for all layers"):
        bitfold.quantize(DEMO_MODEL, tmp_path / "a", method="rtn", bits=3.5, meant_for="gptq")


def test_with_a_budget_what_is_found_is_judged(tmp_path: Path) -> None:
    """And not the scheme that the bits are looked for from: asymmetric weights of 8 bits have no block in llama.cpp, of
    4 they have one."""
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    common: dict[str, Any] = {"method": "rtn", "scheme": "w8a16g32", "meant_for": "gguf"}
    small = Mixed(bits=(4,), group_sizes=(32,), windows=1, length=32)
    with pytest.raises(ExportError, match="which no block of llama"):
        bitfold.quantize(DEMO_MODEL, tmp_path / "a", **common)
    found = bitfold.quantize(
        DEMO_MODEL, tmp_path / "a", **common, bits=5.0, mixed=small, dry_run=True
    )
    assert not [note for note in found.notes if "int8" in note]
    with pytest.raises(ExportError, match="which no block of llama"):
        bitfold.quantize(
            DEMO_MODEL, tmp_path / "a", **common, bits=9.0, dry_run=True,
            mixed=Mixed(bits=(8,), group_sizes=(32,), windows=1, length=32),
        )  # fmt: skip


def test_with_a_budget_no_note_is_of_the_scheme_it_began_with(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    common: dict[str, Any] = {"method": "rtn", "scheme": "w3a16g32", "meant_for": "gguf"}
    common["set"] = "weight.symmetric=true"
    assert any("which llama.cpp holds as" in note for note in bitfold.quantize(
        DEMO_MODEL, tmp_path / "a", **common, dry_run=True).notes)  # fmt: skip
    mixed = Mixed(bits=(4,), group_sizes=(32,), windows=1, length=32)
    found = bitfold.quantize(
        DEMO_MODEL, tmp_path / "a", **common, bits=5.0, mixed=mixed, dry_run=True
    )
    assert not [note for note in found.notes if "gguf" in note]


def test_what_no_bits_mend_is_refused_before_they_are_looked_for(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ExportError, match="leave q and kv out of the scheme"):
        bitfold.quantize(
            DEMO_MODEL, tmp_path / "a", method="rtn", scheme="w4a16kv4", meant_for="onnx", bits=4.5,
            progress=lambda done, total, what: said.append(what),
        )  # fmt: skip
    assert not said


def test_precision_is_kept_through_mixed_bits() -> None:
    template = TensorScheme(bits=3, granularity="group", group_size=16, scales="blocks")
    found = {
        c.scheme.bits: c.scheme.scales for c in candidates(template, (4, 3), (16,)) if c.scheme
    }
    assert found == {4: "half", 3: "blocks"}


def test_half_precision_is_in_the_stored_recipe(tmp_path: Path) -> None:
    result = bitfold.quantize(DEMO_MODEL, tmp_path / "a", method="rtn", meant_for="gptq")
    assert "scales: half" in (result.out / "recipe.yaml").read_text()
    weight = read_model(result.out).read(LAYER)
    assert isinstance(weight, QuantizedTensor)
    assert torch.equal(weight.scale.half().to(weight.scale.dtype), weight.scale)
