"""An OpenVINO directory computes what the artifact computes, and damage to it is named."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from exact_models import DEMO, IDS, distance, edit, exactly, flip, quantized
from transformers import AutoTokenizer

from bitfold.errors import (
    CheckpointError,
    EngineError,
    ExportError,
    MissingExtraError,
    OutputError,
    VerificationError,
)
from bitfold.export.exporting import export_to
from models_zoo import CONFIGS, TOKENS, Zoo

pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
pytest.importorskip("onnx", reason="the extra 'openvino' is not installed")

from bitfold.engines.openvino_runtime import OpenVino
from bitfold.engines.verify_openvino import verify_openvino

if "jemalloc" in os.environ.get("LD_PRELOAD", ""):
    pytest.skip("OpenVINO aborts where jemalloc is preloaded", allow_module_level=True)

TEXT = "The tower was built in 1889 and"


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_itself(family: str, checkpoint: Zoo, tmp_path: Path) -> None:
    model = checkpoint(family, torch.float32)
    export_to(model, "openvino", tmp_path / "model")
    engine, tokens = OpenVino(tmp_path / "model"), TOKENS[0]
    with torch.no_grad():
        expected = exactly(model)(TOKENS[:1]).logits[0]
    assert distance(engine.logits(tokens), expected) < 1e-5
    # In pieces, each going on from the cache.
    engine.start()
    pieces = [engine.decode(tokens[:7].tolist()), engine.decode(tokens[7:9].tolist())]
    pieces += [engine.decode([int(token)]) for token in tokens[9:]]
    assert distance(torch.cat(pieces), expected) < 1e-5


def test_a_batch_with_padding_whose_rows_change_places(checkpoint: Zoo, tmp_path: Path) -> None:
    """As engines that search in beams have it: beam_idx says which row of the cache each row goes on from."""
    import openvino

    model = checkpoint("llama", torch.float32)
    export_to(model, "openvino", tmp_path / "model")
    compiled = openvino.Core().compile_model(
        tmp_path / "model" / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    request = compiled.create_infer_request()
    mask = torch.ones_like(TOKENS)
    mask[1, :9] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)

    def run(columns: slice, order: list[int], rows: torch.Tensor) -> torch.Tensor:
        feeds = {
            "input_ids": TOKENS[rows, columns],
            "attention_mask": mask[rows, : columns.stop],
            "position_ids": places[rows, columns],
            "beam_idx": torch.tensor(order, dtype=torch.int32),
        }
        found = request.infer({name: value.numpy() for name, value in feeds.items()})
        return torch.from_numpy(found["logits"].copy())

    first = run(slice(0, 20), [0, 1], torch.tensor([0, 1]))
    second = run(slice(20, 24), [1, 0], torch.tensor([1, 0]))
    with torch.no_grad():
        whole = exactly(model)(TOKENS[:1]).logits[0]
        padded = exactly(model)(TOKENS[1:, 9:]).logits[0]
    assert distance(first[0], whole[:20]) < 1e-5
    assert distance(first[1, 9:], padded[:11]) < 1e-5
    assert distance(second[0], padded[11:]) < 1e-5
    assert distance(second[1], whole[20:]) < 1e-5


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("openvino") / "artifact", "w4a16g128")


@pytest.fixture(scope="module")
def directory(artifact: Path) -> Path:
    out = artifact.parent / "model"
    export_to(artifact, "openvino", out)
    return out


# Scheme, OpenVINO's element type, and how many bytes a weight takes there at most, scales and all.
WEIGHTS = {
    "w4a16g128": ("w4a16g128", "U4", 0.54),
    "symmetric": ("w4a16 weight.symmetric=true", "I4", 0.52),
    "w3a16g128": ("w3a16g128", "U4", 0.54),
    "w2a16g64": ("w2a16g64", "U2", 0.33),
    "w2a16, symmetric": ("w2a16 weight.symmetric=true", "U2", 0.27),
    "w5a16g32": ("w5a16g32", "U8", 1.16),
    "w8a16": ("w8a16", "U8", 1.02),
    "small groups": ("w4a16g8", "U4", 1.07),
    "nf4": ("wnf4a16g64", "NF4", 0.57),
    "fp8": ("wfp8a16", "F8E4M3", 1.02),
    "mxfp4": ("wmxfp4a16", "F4E2M1", 0.63),
    "nvfp4": ("wnvfp4a16", "F4E2M1", 0.76),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_themselves(case: str, tmp_path: Path) -> None:
    asked, kind, most = WEIGHTS[case]
    model = quantized(tmp_path / "artifact", *asked.split())
    exported = export_to(model, "openvino", tmp_path / "model")
    assert exported.types[kind] == 4_718_592
    sums = json.loads((tmp_path / "model" / "export.json").read_text())["tensors"]
    taken = sum(entry["length"] for name, entry in sums.items() if "_proj.weight" in name)
    assert taken <= most * 4_718_592
    with torch.no_grad():
        expected = exactly(model)(IDS[None]).logits[0]
    assert distance(OpenVino(tmp_path / "model").logits(IDS), expected) < 3e-5


@pytest.mark.parametrize(("scheme", "method"), [("w3a16", "salient"), ("w3a16", "vq")])
def test_columns_that_are_kept_and_codebooks(scheme: str, method: str, tmp_path: Path) -> None:
    model = quantized(tmp_path / "artifact", scheme, method=method)
    exported = export_to(model, "openvino", tmp_path / "model")
    with torch.no_grad():
        expected = exactly(model)(IDS[None]).logits[0]
    assert distance(OpenVino(tmp_path / "model").logits(IDS), expected) < 3e-5
    assert any("floating point" in note for note in exported.notes) == (method == "vq")


INTEGER_PRODUCTS = torch.cpu._is_vnni_supported()
"""Whether this processor sums products of 8 bits in 32 (VNNI)."""

INPUTS = {
    "dynamic": "w8a8",
    "static": "w8a8 weight.symmetric=true activation.static=true",
    "static, asymmetric inputs": "w8a8 weight.symmetric=true activation.static=true "
    "activation.symmetric=false",
    "static, asymmetric weights": "w8a8 activation.static=true",
    "static, asymmetric": "w8a8 activation.static=true activation.symmetric=false",
    "w4a4": "w4a4",
    "groups": "w4a4 activation.group_size=64",
    "clusters": "w4a8 activation.clusters=4 activation.static=true",
    "fp8": "wfp8afp8",
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_are_rounded_as_in_the_simulation(case: str, tmp_path: Path) -> None:
    asked = INPUTS[case]
    model = quantized(tmp_path / "artifact", *asked.split())
    export_to(model, "openvino", tmp_path / "model")
    with torch.no_grad():
        expected = exactly(model)(IDS[None]).logits[0]
    # As for ONNX: a difference of 1e-7 is enough for another integer now and then.
    if case in ("static", "static, asymmetric inputs") and not INTEGER_PRODUCTS:
        allowed = 0.1  # pairs of products are clipped to 16 bits (docs/openvino.md)
    else:
        allowed = 0.15 if "a4" in asked else 0.04 if "fp8" in asked else 0.02
    difference = (OpenVino(tmp_path / "model").logits(IDS) - expected).square().mean().sqrt()
    assert difference / expected.std() < allowed


def test_its_own_settings_keep_it_exact(artifact: Path, directory: Path) -> None:
    """Without the two that the file has, OpenVINO would round inputs and the cache to 8 bits."""
    import openvino

    def logits(**settings: str) -> torch.Tensor:
        core = openvino.Core()
        file = directory / "openvino_model.xml"
        asked = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1} | settings
        request = core.compile_model(file, "CPU", asked).create_infer_request()
        found = request.infer(
            {
                "input_ids": IDS[None].numpy(),
                "attention_mask": torch.ones(1, 48, dtype=torch.int64).numpy(),
                "position_ids": torch.arange(48)[None].numpy(),
                "beam_idx": torch.zeros(1, dtype=torch.int32).numpy(),
            }
        )
        return torch.from_numpy(found["logits"][0].copy())

    with torch.no_grad():
        expected = exactly(artifact)(IDS[None]).logits[0]
    assert distance(logits(), expected) < 3e-5
    if not INTEGER_PRODUCTS:
        return  # OpenVINO rounds no inputs where it would gain nothing.
    assert distance(logits(DYNAMIC_QUANTIZATION_GROUP_SIZE="32"), expected) > 1e-3


def test_generation_is_that_of_transformers(artifact: Path, directory: Path) -> None:
    prompt = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
    expected = exactly(artifact).generate(
        torch.tensor([prompt]),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert OpenVino(directory).generate(prompt, 24) == expected[0, len(prompt) :].tolist()


def test_an_artifact_is_itself(artifact: Path, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The river runs to the sea, and the sea to the sky. " * 40)
    result = verify_openvino(
        directory, against=artifact, text=tmp_path / "text.txt", window_count=1
    )
    assert result.difference is not None
    assert result.difference < 0.005  # the simulation's weights are rounded to bfloat16
    assert result.text is not None
    assert abs(result.text.perplexity_engine / result.text.perplexity_simulation - 1) < 0.01


def test_what_belongs_to_a_model_arrives_and_nothing_else(artifact: Path, directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (directory / name).read_bytes() == (artifact / name).read_bytes()
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    assert not [file for file in directory.iterdir() if "onnx" in file.name]


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
    flip(damaged / "openvino_model.bin", place["offset"] + place["length"] // 2)
    with pytest.raises(VerificationError, match=f"{name} in .* is not what was written"):
        verify_openvino(damaged)


def test_sums_are_of_every_weight(directory: Path) -> None:
    """So that no byte but those between tensors goes unseen."""
    tensors = json.loads((directory / "export.json").read_text())["tensors"]
    seen = torch.zeros((directory / "openvino_model.bin").stat().st_size, dtype=torch.bool)
    for entry in tensors.values():
        seen[entry["offset"] : entry["offset"] + entry["length"]] = True
    between = (~seen).nonzero().flatten().tolist()
    raw = (directory / "openvino_model.bin").read_bytes()
    assert len(between) < 64 * len(tensors)
    assert not any(raw[place] for place in between)


@pytest.mark.parametrize("name", ["openvino_model.xml", "tokenizer.json", "verification.npz"])
def test_a_file_that_was_changed_is_named(directory: Path, tmp_path: Path, name: str) -> None:
    damaged = shutil.copytree(directory, tmp_path / "damaged")
    flip(damaged / name, (damaged / name).stat().st_size // 2)
    with pytest.raises(VerificationError, match=rf"{name} is not what was written"):
        verify_openvino(damaged)
    (damaged / name).unlink()
    with pytest.raises(VerificationError, match=rf"{name} is missing from"):
        verify_openvino(damaged)


@pytest.mark.parametrize("name", ["openvino_model.xml", "openvino_model.bin"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(
    directory: Path, tmp_path: Path, name: str, kept: float
) -> None:
    short = shutil.copytree(directory, tmp_path / "short")
    raw = (short / name).read_bytes()
    (short / name).write_bytes(raw[: int(kept * len(raw))])
    with pytest.raises(VerificationError, match="export it again"):
        verify_openvino(short)
    with pytest.raises(CheckpointError, match=r"OpenVINO does not load .* export it again"):
        OpenVino(short)


def test_foreign_files_are_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"):
        verify_openvino(directory / "openvino_model.xml")
    with pytest.raises(VerificationError, match="was not written by bitfold"):
        verify_openvino(tmp_path)
    with pytest.raises(CheckpointError, match="does not load"):
        OpenVino(tmp_path)
    (tmp_path / "export.json").write_text('{"format": "onnx", "tensors": {}, "files": {}}')
    with pytest.raises(VerificationError, match=r"export.json is damaged, or of another format"):
        verify_openvino(tmp_path)


def test_missing_packages_are_said(
    artifact: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install -c constraints.txt '\.\[openvino\]'"):
        export_to(artifact, "openvino", tmp_path / "model")
    with pytest.raises(MissingExtraError, match=r"pip install -c constraints.txt '\.\[openvino\]'"):
        OpenVino(directory)
    assert not list(tmp_path.iterdir())


def test_jemalloc_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
    with pytest.raises(EngineError, match="take it out of LD_PRELOAD"):
        OpenVino(directory)


def test_what_it_cannot_say_is_refused(checkpoint: Zoo, tmp_path: Path) -> None:
    model = quantized(tmp_path / "artifact", "w4a16kv8")
    with pytest.raises(ExportError, match="quantizes queries, keys or values, which OpenVINO"):
        export_to(model, "openvino", tmp_path / "model")
    capped = shutil.copytree(checkpoint("gemma3", torch.float32), tmp_path / "capped")
    edit(capped / "config.json", attn_logit_softcapping=50.0)
    with pytest.raises(ExportError, match="attn_logit_softcapping"):
        export_to(capped, "openvino", tmp_path / "model")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["artifact", "capped"]


def test_places_that_cannot_be_written(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is there already: add --overwrite"):
        export_to(DEMO, "openvino", directory)
    with pytest.raises(ExportError, match="openvino has no form 'fast'"):
        export_to(DEMO, "openvino", tmp_path / "model", form="fast")
