"""A GGUF file in llama.cpp computes what the artifact computes, and damage to it is named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_models import DEMO, TEXT, distance, small

import bitfold
from bitfold.errors import (
    BitfoldError,
    CheckpointError,
    ExportError,
    OutputError,
    VerificationError,
)
from bitfold.export.exporting import export_to
from bitfold.runtime.load import load_tokenizer

pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
pytest.importorskip("xllamacpp", reason="the extra 'gguf' is not installed")

from bitfold.engines.llama_cpp import LlamaCpp
from bitfold.engines.verify_gguf import verify_gguf


@pytest.mark.parametrize(
    "family", ["llama", "llama-biased", "mistral", "qwen2", "qwen3", "gemma", "gemma3"]
)
def test_every_family_is_itself(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(family, tmp_path / "model", monkeypatch)
    export_to(model, "gguf", tmp_path / "model.gguf")
    assert distance(tmp_path / "model.gguf", model) < 0.005  # keys and values in half precision


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "artifact"
    bitfold.quantize(DEMO, out, method="rtn", scheme="w4a16g128")
    return out


@pytest.fixture(scope="module")
def file(artifact: Path) -> Path:
    out = artifact.parent / "model.gguf"
    export_to(artifact, "gguf", out)
    return out


def test_an_artifact_is_itself(artifact: Path, file: Path) -> None:
    result = verify_gguf(file)
    assert result.difference is not None
    assert result.difference < 0.05
    assert result.tensors == 56
    assert distance(file, artifact) < 0.05


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("w4a16", "Q4_K"),
        ("w3a16g128", "Q4_0"),
        ("w2a16", "Q2_K"),
        ("w6a16g64", "Q8_0"),
        ("wmxfp4a16", "MXFP4"),
    ],
)
def test_other_bits_are_themselves(tmp_path: Path, scheme: str, kind: str) -> None:
    bitfold.quantize(DEMO, tmp_path / "artifact", method="rtn", scheme=scheme)
    exported = export_to(tmp_path / "artifact", "gguf", tmp_path / "model.gguf")
    assert exported.types[kind] == 4_718_592
    assert exported.notes == ()
    assert distance(tmp_path / "model.gguf", tmp_path / "artifact") < 0.1


def test_the_tokenizer_is_the_same(artifact: Path, file: Path) -> None:
    with LlamaCpp(file, context=8) as engine:
        assert engine.tokenize(TEXT) == load_tokenizer(artifact)(TEXT)["input_ids"]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    bitfold.quantize(DEMO, tmp_path / "artifact", method="rtn", scheme="wnf4a8kv8")
    exported = export_to(tmp_path / "artifact", "gguf", tmp_path / "model.gguf")
    assert [next(w for w in ("nf4", "activations", "keys") if w in n) for n in exported.notes] == [
        "nf4",
        "activations",
        "keys",
    ]
    assert distance(tmp_path / "model.gguf", tmp_path / "artifact") < 0.1


def test_a_flipped_bit_is_named(file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    shutil.copy(file, damaged)
    with damaged.open("r+b") as stream:
        stream.seek(-100_000, 2)
        byte = stream.read(1)
        stream.seek(-100_000, 2)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(
        VerificationError, match=r"blk\.\d\.\w+\.weight in .* is not what was written"
    ):
        verify_gguf(damaged)


@pytest.mark.parametrize("kept", [10, 1000, 100_000, 5_000_000])
def test_a_truncated_file_is_refused(file: Path, tmp_path: Path, kept: int) -> None:
    (tmp_path / "short.gguf").write_bytes(file.read_bytes()[:kept])
    with pytest.raises(BitfoldError, match="export it again"):
        verify_gguf(tmp_path / "short.gguf")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model" * 1000)
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        verify_gguf(tmp_path / "text.gguf")
    with pytest.raises(CheckpointError, match="does not load"):
        LlamaCpp(tmp_path / "text.gguf", context=8)


def test_maps_that_run_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", torch.arange(64).reshape(2, 32).numpy())
    bitfold.quantize(
        DEMO, tmp_path / "artifact", method="quarot", scheme="w4a4", calibration=tmp_path / "ids.npy",
        samples=2,
    )  # fmt: skip
    with pytest.raises(ExportError, match="has maps that run at inference"):
        export_to(tmp_path / "artifact", "gguf", tmp_path / "model.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "ids.npy"]


def test_places_that_cannot_be_written(artifact: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is there already: add --overwrite"):
        export_to(artifact, "gguf", file)
    with pytest.raises(OutputError, match="is a directory"):
        export_to(artifact, "gguf", tmp_path)
    with pytest.raises(OutputError, match="There is no directory"):
        export_to(artifact, "gguf", tmp_path / "none" / "model.gguf")
    with pytest.raises(ExportError, match="did you mean 'gguf'"):
        export_to(artifact, "ggufs", tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "word"), [("tokenizer.json", "tokenizer.json"), ("config.json", "config.json")]
)
def test_what_is_missing_is_named(artifact: Path, tmp_path: Path, name: str, word: str) -> None:
    shutil.copytree(artifact, tmp_path / "artifact")
    (tmp_path / "artifact" / name).unlink()
    with pytest.raises(BitfoldError, match=word):
        export_to(tmp_path / "artifact", "gguf", tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*gguf*"))


def test_families_that_llama_cpp_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="not for 'opt'"):
        export_to(small("opt", tmp_path / "model", monkeypatch), "gguf", tmp_path / "model.gguf")


def test_a_pattern_of_layers_that_llama_cpp_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small("gemma3", tmp_path / "model", monkeypatch)
    config = model / "config.json"
    config.write_text(config.read_text().replace('"full_attention"\n', '"sliding_attention"\n', 1))
    with pytest.raises(ExportError, match="Gemma 3"):
        export_to(model, "gguf", tmp_path / "model.gguf")
