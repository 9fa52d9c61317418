"""Artifacts in vLLM. With BITFOLD_VLLM_PYTHON=DIRECTORY/bin/python (scripts/make_vllm_environment.sh) all of it."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitfold
from bitfold.assets import DEMO_MODEL
from bitfold.engines import verify as module
from bitfold.engines.compare import Distance
from bitfold.engines.simulation import Simulation
from bitfold.engines.verify import check_engine, verify_in_engine
from bitfold.errors import BitfoldError, EngineError, VerificationError
from bitfold.export.exporting import export_to
from bitfold.export.importing import import_checkpoint
from bitfold.pipeline.probe import PROBE_FILE

VLLM = os.environ.get("BITFOLD_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(VLLM is None, reason="BITFOLD_VLLM_PYTHON names no vLLM's python")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default scheme."""
    out = tmp_path_factory.mktemp("engines") / "w4a16g128"
    bitfold.quantize(DEMO_MODEL, out, method="rtn")
    return out


@pytest.fixture(scope="session")
def made_w8a8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "w8a8"
    bitfold.quantize(DEMO_MODEL, out, method="rtn", scheme="w8a8", set=["weight.symmetric=true"])
    return out


# --- before anything starts ---


def test_an_unknown_engine() -> None:
    with pytest.raises(EngineError, match="There is no engine 'vlm': did you mean 'vllm'"):
        check_engine("vlm", sys.executable)


def test_a_python_without_vllm(made: Path) -> None:
    with pytest.raises(EngineError, match=r"has no vLLM: make an environment by scripts/make_vllm"):
        verify_in_engine(made, engine="vllm", python=sys.executable)


def refused(out: Path, **options: Path) -> str:
    """The sentence that comes before any engine is looked for."""
    with pytest.raises(BitfoldError) as found:
        verify_in_engine(out, engine="vllm", python="there is none", **options)
    return str(found.value)


def test_bitfolds_own_format(tmp_path: Path) -> None:
    bitfold.quantize(DEMO_MODEL, tmp_path / "nf4", method="rtn", scheme="wnf4a16g64")
    sentence = refused(tmp_path / "nf4")
    assert (
        "is in bitfold's own format, which vLLM does not know: run it by `bitfold gen" in sentence
    )


def test_a_text_that_is_not_there_or_too_short(made: Path, tmp_path: Path) -> None:
    assert "There is no file" in refused(made, text=tmp_path / "nothing")
    (tmp_path / "short.txt").write_text("A few words.")
    sentence = refused(made, text=tmp_path / "short.txt")
    assert "but one window needs 256: give more text" in sentence


# --- what is asked and compared ---


def test_packed_weights_are_asked_for_in_the_dtype_of_serving(made: Path, made_w8a8: Path) -> None:
    assert module._dtypes_to_ask_for(made) == ("auto",)
    assert module._dtypes_to_ask_for(made_w8a8) == ("float32", "auto")


def test_windows_leave_room_for_a_token(made: Path, tmp_path: Path) -> None:
    windows = module._windows(made, None, made / PROBE_FILE)
    assert windows["text"].shape == (8, 256)
    out = Path(shutil.copytree(made, tmp_path / "short"))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    assert {rows.shape[1] for rows in module._windows(out, None, out / PROBE_FILE).values()} == {31}
    (out / "tokenizer.json").unlink()
    assert list(module._windows(out, None, out / PROBE_FILE)) == ["probe"]


def test_the_simulation_with_and_without_quantized_inputs(made: Path, made_w8a8: Path) -> None:
    tokens = torch.arange(2 * 16).reshape(2, 16)
    ids = tokens[:, 1:, None]
    weights_only, both = (Simulation(out, "cpu", "float32") for out in (made, made_w8a8))
    assert not weights_only.quantizes_inputs
    assert both.quantizes_inputs
    model = bitfold.load(made_w8a8, dtype="float32")
    with torch.no_grad():
        expected = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, ids)
        dense = bitfold.load(DEMO_MODEL, dtype="float32")
        for name, parameter in dense.named_parameters():
            parameter.copy_(model.get_parameter(name))
        without = dense(tokens).logits[:, :-1].log_softmax(-1).gather(-1, ids)
    # Float32's order of summation moves codes of inputs, so this is no equality.
    assert (both.answer(tokens, ids).logprobs - expected).abs().mean() < 0.05
    found = both.answer(tokens, ids, quantize_inputs=False).logprobs
    torch.testing.assert_close(found, without, atol=1e-3, rtol=0)
    assert (found - both.answer(tokens, ids).logprobs).abs().mean() > 0.005


ROUNDING = Distance(mean=0.01, max=0.1)


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (ROUNDING, True),
        (Distance(mean=0.019, max=0.4), True),
        (Distance(mean=0.03, max=0.1), False),
        (Distance(mean=0.01, max=0.7), False),
        (Distance(mean=float("nan"), max=float("nan")), False),
    ],
)
def test_the_tolerance(found: Distance, right: bool) -> None:
    tolerance = module._tolerance(ROUNDING)
    if right:
        module._check_distance("OUT in vllm", "text", found, tolerance)
        return
    with pytest.raises(
        VerificationError, match=r"The log-probabilities of OUT in vllm are not what"
    ):
        module._check_distance("OUT in vllm", "text", found, tolerance)


def test_an_engine_that_leaves_inputs_as_they_are() -> None:
    found = Distance(mean=0.045, max=0.4)
    with pytest.raises(VerificationError, match="The inputs of OUT in vllm are not quantized"):
        module._check_inputs("OUT in vllm", found, replace(found, mean=0.014))
    module._check_inputs("OUT in vllm", found, replace(found, mean=0.043))


def test_what_vllm_says_is_shortened_to_what_helps() -> None:
    assert module._helpful("Failed to find a kernel. Reasons: \n") == "Failed to find a kernel"
    said = "1 validation error for VllmConfig\n  Assertion failed, [type=assertion_error, input_value=Args((), {})]"
    assert module._helpful(said) == "1 validation error for VllmConfig Assertion failed"
    said = "No scheme was found for layer_name='a.b', weight_quant=QuantizationArgs(num_bits=8,\n type='int')."
    assert module._helpful(said) == "No scheme was found for layer_name='a.b'"


# --- in vLLM ---


@needs_vllm
def test_the_default_scheme_in_vllm(made: Path) -> None:
    assert VLLM is not None
    steps: list[str] = []
    result = verify_in_engine(made, engine="vllm", python=VLLM, progress=steps.append)
    assert result.ok
    assert {"importing vLLM", "running vLLM on the text"} <= set(steps)
    text = result.texts["text"]
    assert (text.windows, text.tokens) == (8, 8 * 255)
    assert text.perplexity == pytest.approx(text.simulation_perplexity, rel=0.01)
    assert 0 < text.mean_difference < 0.03


@needs_vllm
def test_a_damaged_artifact_is_found_before_vllm_starts(made: Path, tmp_path: Path) -> None:
    assert VLLM is not None
    out = Path(shutil.copytree(made, tmp_path / "damaged"))
    sums = json.loads((out / "checksums.json").read_text())
    first = next(iter(sums))
    (out / "checksums.json").write_text(json.dumps(sums | {first: "0"}))
    steps: list[str] = []
    with pytest.raises(VerificationError, match=f"{first} in"):
        verify_in_engine(out, engine="vllm", python=VLLM, progress=steps.append)
    assert steps == ["checking tensors"]


@needs_vllm
def test_other_scales_are_found_in_vllm(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is given the artifact with one layer's scales 10 % larger, PyTorch the right one."""
    from safetensors.torch import load_file, save_file

    assert VLLM is not None
    out = Path(shutil.copytree(made, tmp_path / "damaged"))
    name = "model.layers.2.mlp.down_proj.weight_scale"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    file = out / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name] * 1.1
    save_file(tensors, file, metadata={"format": "pt"})
    ask = module._ask
    monkeypatch.setattr(
        module, "_ask", lambda python, directory, _, *rest: ask(python, directory, out, *rest)
    )
    with pytest.raises(VerificationError, match="are not what was simulated"):
        verify_in_engine(made, engine="vllm", python=VLLM)


@needs_vllm
def test_a_scheme_without_kernels_in_vllm(tmp_path: Path) -> None:
    assert VLLM is not None
    out = tmp_path / "w3"
    bitfold.quantize(DEMO_MODEL, out, method="rtn", scheme="w3a16g128")
    with pytest.raises(
        EngineError, match=r"does not run in vLLM \(Failed to find a kernel .*uint3"
    ):
        verify_in_engine(out, engine="vllm", python=VLLM)


@needs_vllm
def test_inputs_that_vllm_leaves_as_they_are(tmp_path: Path) -> None:
    """Its kernel for weights in 4 bits on a CPU, as of 0.32; when it learns to, docs/engines.md wants another line."""
    assert VLLM is not None
    out = tmp_path / "w4a8"
    bitfold.quantize(DEMO_MODEL, out, method="rtn", scheme="w4a8", set=["weight.symmetric=true"])
    with pytest.raises(VerificationError, match="in vllm are not quantized"):
        verify_in_engine(out, engine="vllm", python=VLLM)


@needs_vllm
@pytest.mark.parametrize(("format", "symmetric"), [("gptq", "true"), ("awq", "false")])
def test_packed_directories_are_held_against_their_integers(
    format: str, symmetric: str, tmp_path: Path
) -> None:
    bitfold.quantize(
        DEMO_MODEL,
        tmp_path / "a",
        method="rtn",
        set=f"weight.symmetric={symmetric}",
        meant_for=format,
    )
    out = export_to(tmp_path / "a", format, tmp_path / format).path
    result = verify_in_engine(out, engine="vllm", python=str(VLLM))
    text = result.texts["text"]
    assert 0 < text.mean_difference < text.mean_tolerance
    # One layer's scales made larger are seen: the engine is held against the file that it is given.
    name = "model.layers.3.mlp.down_proj.scales"
    file = next(file for file in out.glob("*.safetensors") if name in load_file(file))
    simulated = import_checkpoint(out, tmp_path / "simulated").path
    tensors = load_file(file)
    tensors[name] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "asked").mkdir()
    windows = module._windows(out, None, None)
    answers, _, dtype = module._ask(
        check_engine("vllm", str(VLLM)), tmp_path / "asked", out, windows, ("auto",), print
    )
    reference, rounded = (Simulation(simulated, "cpu", name) for name in ("float32", dtype))
    with pytest.raises(VerificationError, match="are not what was simulated"):
        module._compare("it", "text", answers["text"], windows["text"], reference, rounded)
