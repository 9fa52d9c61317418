"""An ONNX directory in ONNX Runtime computes what the artifact computes, and damage to it is named."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_models import DEMO, IDS, distance, edit, exactly, flip, quantized
from transformers import AutoConfig, AutoTokenizer

import bitfold
from bitfold.errors import (
    BitfoldError,
    CheckpointError,
    ExportError,
    MissingExtraError,
    OutputError,
    VerificationError,
)
from bitfold.export.exporting import export_to
from models_zoo import CONFIGS, TOKENS, Zoo

pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")

from bitfold.engines.onnx_runtime import OnnxRuntime
from bitfold.engines.verify_onnx import verify_onnx

TEXT = "The tower was built in 1889 and"


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_itself(family: str, checkpoint: Zoo, tmp_path: Path) -> None:
    model = checkpoint(family, torch.float32)
    export_to(model, "onnx", tmp_path / "model")
    engine, tokens = OnnxRuntime(tmp_path / "model"), TOKENS[0]
    with torch.no_grad():
        expected = exactly(model)(TOKENS[:1]).logits[0]
    assert distance(engine.logits(tokens), expected) < 1e-5
    # In pieces, each going on from the cache.
    engine.start()
    pieces = [engine.decode(tokens[:7].tolist()), engine.decode(tokens[7:9].tolist())]
    pieces += [engine.decode([int(token)]) for token in tokens[9:]]
    assert distance(torch.cat(pieces), expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "rotary"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0}),
        ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 16}),
        ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ],
)  # fmt: skip
def test_rotary_embeddings(
    family: str, rotary: dict[str, object], checkpoint: Zoo, tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoint(family, torch.float32), tmp_path / "model")
    edit(model / "config.json", rope_parameters=rotary | {"rope_theta": 10000.0})
    export_to(model, "onnx", tmp_path / "out")
    with torch.no_grad():
        expected = exactly(model)(TOKENS[:1]).logits[0]
    assert distance(OnnxRuntime(tmp_path / "out").logits(TOKENS[0]), expected) < 1e-5


def test_a_batch_with_padding(checkpoint: Zoo, tmp_path: Path) -> None:
    """Shorter texts on the right end of a batch: their own logits, whatever stands before them."""
    import onnxruntime

    model = checkpoint("llama", torch.float32)
    export_to(model, "onnx", tmp_path / "model")
    session = onnxruntime.InferenceSession(tmp_path / "model" / "model.onnx")
    mask = torch.ones_like(TOKENS)
    mask[1, :9] = 0
    feeds = {
        "input_ids": TOKENS.numpy(),
        "attention_mask": mask.numpy(),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0).numpy(),
    }
    feeds |= {
        entry.name: np.zeros((2, entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
        for entry in session.get_inputs()[3:]
    }
    logits = torch.from_numpy(session.run(["logits"], feeds)[0])
    with torch.no_grad():
        first, second = (
            exactly(model)(TOKENS[:1]).logits[0],
            exactly(model)(TOKENS[1:, 9:]).logits[0],
        )
    assert distance(logits[0], first) < 1e-5
    assert distance(logits[1, 9:], second) < 1e-5


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("onnx") / "artifact", "w4a16g128")


@pytest.fixture(scope="module")
def directory(artifact: Path) -> Path:
    out = artifact.parent / "model"
    export_to(artifact, "onnx", out)
    return out


WEIGHTS = {
    "w4a16g128": ("w4a16g128", "INT4", "INT4"),
    "symmetric": ("w4a16 weight.symmetric=true", "INT4", "INT4"),
    "w3a16g128": ("w3a16g128", "INT4", "INT4"),
    "w2a16g64": ("w2a16g64", "INT4", "INT2"),
    "w2a16": ("w2a16", "INT4", "INT2"),
    "w5a16g32": ("w5a16g32", "2 × INT4", "INT8"),
    "w8a16": ("w8a16", "2 × INT4", "INT8"),
    "small groups": ("w4a16g8", "FLOAT", "FLOAT"),
    "nf4": ("wnf4a16g64", "FLOAT", "FLOAT"),
    "fp8": ("wfp8a16", "FLOAT", "FLOAT"),
    "mxfp4": ("wmxfp4a16", "BFLOAT16", "BFLOAT16"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_themselves(case: str, tmp_path: Path) -> None:
    asked, fast, compact = WEIGHTS[case]
    model = quantized(tmp_path / "artifact", *asked.split())
    with torch.no_grad():
        expected = exactly(model)(IDS[None]).logits[0]
    for form, kind in (("fast", fast), ("compact", compact)):
        exported = export_to(model, "onnx", tmp_path / form, form=form)
        assert exported.types[kind] >= 4_718_592
        assert distance(OnnxRuntime(tmp_path / form).logits(IDS), expected) < 3e-5


def test_columns_that_are_kept(tmp_path: Path) -> None:
    model = quantized(tmp_path / "artifact", "w3a16", method="salient")
    export_to(model, "onnx", tmp_path / "model")
    with torch.no_grad():
        expected = exactly(model)(IDS[None]).logits[0]
    assert distance(OnnxRuntime(tmp_path / "model").logits(IDS), expected) < 3e-5


# What test_onnx_activations.py holds number against number, in whole models.
INPUTS = {
    "dynamic": ("w8a8", "INT8"),
    "dynamic, symmetric weights": ("w8a8 weight.symmetric=true", "INT8"),
    "static": ("w8a8 weight.symmetric=true activation.static=true", "INT8"),
    "static, asymmetric": ("w8a8 activation.static=true activation.symmetric=false", "INT8"),
    "of 6 bits": ("w6a6", "2 × INT4"),
    "w4a8": ("w4a8", "INT4"),
    "w4a4": ("w4a4", "INT4"),
    "groups": ("w4a4 activation.group_size=64", "INT4"),
    "clusters": ("w4a8 activation.clusters=4 activation.static=true", "INT4"),
    "clipped": ("w4a4 activation.clipped=true", "INT4"),
    "fp8": ("wfp8afp8", "FLOAT"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_are_rounded_as_in_the_simulation(case: str, tmp_path: Path) -> None:
    asked, kind = INPUTS[case]
    model = quantized(tmp_path / "artifact", *asked.split())
    exported = export_to(model, "onnx", tmp_path / "model")
    assert exported.types[kind] >= 4_718_592
    with torch.no_grad():
        expected = exactly(model)(IDS[None]).logits[0]
    # A difference of 1e-7 is enough for another integer now and then; another scale or zero-point makes more than this.
    difference = (OnnxRuntime(tmp_path / "model").logits(IDS) - expected).square().mean().sqrt()
    assert difference / expected.std() < (0.03 if "a8" in asked or "afp8" in asked else 0.15)


def test_generation_is_that_of_transformers(artifact: Path, directory: Path) -> None:
    prompt = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
    expected = exactly(artifact).generate(
        torch.tensor([prompt]),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert OnnxRuntime(directory).generate(prompt, 24) == expected[0, len(prompt) :].tolist()


def test_an_artifact_is_itself(artifact: Path, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The river runs to the sea, and the sea to the sky. " * 40)
    result = verify_onnx(directory, against=artifact, text=tmp_path / "text.txt", window_count=1)
    assert result.difference is not None
    assert result.difference < 0.005  # the simulation's weights are rounded to bfloat16
    assert result.tensors == len(json.loads((directory / "export.json").read_text())["tensors"])
    assert result.text is not None
    assert abs(result.text.perplexity_engine / result.text.perplexity_simulation - 1) < 0.01


def test_what_belongs_to_a_model_arrives(artifact: Path, tmp_path: Path) -> None:
    source = shutil.copytree(artifact, tmp_path / "artifact")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    export_to(source, "onnx", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert not hasattr(config, "quantization_config")
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert (genai["type"], genai["eos_token_id"], genai["vocab_size"]) == ("llama", 0, 4096)


def test_the_graph_is_valid_onnx(directory: Path) -> None:
    import onnx

    onnx.checker.check_model(directory / "model.onnx")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight.zero_points",
        "model.layers.5.self_attn.o_proj.weight.scales",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_flipped_bit_is_named(directory: Path, tmp_path: Path, name: str) -> None:
    damaged = shutil.copytree(directory, tmp_path / "damaged")
    place = json.loads((damaged / "export.json").read_text())["tensors"][name]
    flip(damaged / "model.onnx.data", place["offset"] + place["length"] // 2)
    with pytest.raises(VerificationError, match=f"{name} in .* is not what was written"):
        verify_onnx(damaged)


@pytest.mark.parametrize(
    "name", ["model.onnx", "tokenizer.json", "config.json", "verification.npz"]
)
def test_a_file_that_was_changed_is_named(directory: Path, tmp_path: Path, name: str) -> None:
    damaged = shutil.copytree(directory, tmp_path / "damaged")
    flip(damaged / name, (damaged / name).stat().st_size // 2)
    with pytest.raises(VerificationError, match=rf"{name} is not what was written"):
        verify_onnx(damaged)
    (damaged / name).unlink()
    with pytest.raises(VerificationError, match=rf"{name} is missing from"):
        verify_onnx(damaged)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(
    directory: Path, tmp_path: Path, name: str, kept: float
) -> None:
    short = shutil.copytree(directory, tmp_path / "short")
    raw = (short / name).read_bytes()
    (short / name).write_bytes(raw[: int(kept * len(raw))])
    with pytest.raises(VerificationError, match="export it again"):
        verify_onnx(short)
    with pytest.raises(CheckpointError, match=r"ONNX Runtime does not load .* export it again"):
        OnnxRuntime(short)


def test_foreign_files_are_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"):
        verify_onnx(directory / "model.onnx")
    with pytest.raises(VerificationError, match="was not written by bitfold"):
        verify_onnx(tmp_path)
    (tmp_path / "model.onnx").write_text("not a model" * 100)
    with pytest.raises(CheckpointError, match="does not load"):
        OnnxRuntime(tmp_path)
    (tmp_path / "export.json").write_text('{"format": "onnx", "tensors": {"a": 1}}')
    with pytest.raises(VerificationError, match=r"export.json is damaged"):
        verify_onnx(tmp_path)
    (tmp_path / "export.json").write_text("{")
    with pytest.raises(BitfoldError, match=r"export.json"):
        verify_onnx(tmp_path)


def test_another_model_is_told_by_its_logits(directory: Path, tmp_path: Path) -> None:
    """What the sums do not see, the probe does: here one that was recorded for another model."""
    other = quantized(tmp_path / "other", "w2a16g64")
    swapped = shutil.copytree(directory, tmp_path / "swapped")
    shutil.copy(other / "verification.npz", swapped)
    content = json.loads((swapped / "export.json").read_text())
    del content["files"]["verification.npz"]
    (swapped / "export.json").write_text(json.dumps(content))
    with pytest.raises(VerificationError, match="differ from the simulation by"):
        verify_onnx(swapped)


def test_missing_packages_are_said(
    artifact: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install -c constraints.txt '\.\[onnx\]'"):
        export_to(artifact, "onnx", tmp_path / "model")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install -c constraints.txt '\.\[onnx\]'"):
        OnnxRuntime(directory)


@pytest.mark.parametrize(
    ("scheme", "sentence"),
    [
        ("w4a16kv8", "quantizes queries, keys or values"),
        ("wmxfp4amxfp4", r"q_proj has inputs on the grid mxfp4"),
    ],
)
def test_what_has_no_nodes_is_refused(tmp_path: Path, scheme: str, sentence: str) -> None:
    model = quantized(tmp_path / "artifact", scheme)
    with pytest.raises(ExportError, match=sentence):
        export_to(model, "onnx", tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["artifact"]


def test_maps_that_run_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", torch.arange(64).reshape(2, 32).numpy())
    bitfold.quantize(
        DEMO, tmp_path / "artifact", method="quarot", scheme="w4a4", calibration=tmp_path / "ids.npy",
        samples=2,
    )  # fmt: skip
    with pytest.raises(ExportError, match="has maps that run at inference"):
        export_to(tmp_path / "artifact", "onnx", tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "ids.npy"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model_type": "phi"}, "ONNX is written for llama"),
        ({"hidden_act": "tanh"}, "activation is tanh"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "of type 'dynamic'"),
    ],
)  # fmt: skip
def test_models_that_are_not_written(
    settings: dict[str, object], sentence: str, checkpoint: Zoo, tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoint("llama", torch.float32), tmp_path / "model")
    edit(model / "config.json", **settings)
    with pytest.raises(ExportError, match=sentence):
        export_to(model, "onnx", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_places_that_cannot_be_written(artifact: Path, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is there already: add --overwrite"):
        export_to(artifact, "onnx", directory)
    export_to(artifact, "onnx", directory, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, and onnx is a directory"):
        export_to(artifact, "onnx", tmp_path / "file")
    with pytest.raises(OutputError, match="is no model's directory"):
        export_to(artifact, "onnx", tmp_path, overwrite=True)
    with pytest.raises(ExportError, match="did you mean 'compact'"):
        export_to(artifact, "onnx", tmp_path / "model", form="compat")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
