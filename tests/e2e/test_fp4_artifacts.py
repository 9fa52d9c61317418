"""mxfp4 and nvfp4 from the scheme to an artifact that plain transformers loads, by every kind of method."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bitfold
from bitfold.assets import DEMO_MODEL
from bitfold.errors import RecipeError
from models_zoo import TOKENS, Zoo

BITS = {"mxfp4": 4 + 8 / 32, "nvfp4": 4 + 8 / 16}
SCHEMES = ["wmxfp4a16", "wnvfp4a16", "wmxfp4amxfp4", "wnvfp4anvfp4"]


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 96, (16, 24)))
    return path


def quantize(model: Path, out: Path, ids: Path, scheme: str, method: str, *set: str) -> Path:
    bitfold.quantize(model, out, scheme=scheme, method=method, set=set, calibration=ids)
    assert bitfold.verify(out).ok
    return out


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_commands(scheme: str, run: Run, tmp_path: Path) -> None:
    line = f"quantize {DEMO_MODEL} --method rtn --scheme {scheme} -o {tmp_path}/out --samples 2 --sequence-length 64"
    said, made = run(f"{line} --dry-run --json").json, run(f"{line} --json").json
    assert made["scheme"] == scheme
    assert made["format"] == said["format"] == "compressed-tensors"
    grid = scheme[1:].partition("a")[0]
    assert made["bits_per_weight"] == pytest.approx(BITS[grid], abs=0.001)
    assert (
        made["bits_per_weight"] > BITS[grid] or grid == "mxfp4"
    )  # one number more for each tensor
    assert said["size_bytes"] == pytest.approx(made["size_bytes"], rel=0.01)
    assert run(f"verify {tmp_path}/out").code == 0
    shown = run(f"inspect {tmp_path}/out").out
    assert f"{BITS[grid]:.3f}" in shown
    assert scheme in shown


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_plain_transformers_gives_the_simulations_logits(
    family: str, scheme: str, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    """Of a checkpoint in bfloat16, simulated in it: difference 0."""
    out = tmp_path / "out"
    model = checkpoint(family, torch.bfloat16)
    bitfold.quantize(model, out, scheme=scheme, method="rtn", dtype="bfloat16", calibration=ids)
    assert bitfold.verify(out).max_difference == 0
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.dtype == torch.bfloat16
    with torch.no_grad():
        found = plain.eval()(TOKENS).logits
        expected = bitfold.load(out, dtype="bfloat16")(TOKENS).logits
    assert torch.equal(found, expected)


def test_global_scales(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    """Layers that share an input share both; an input's is the largest power of two with which nothing is clipped."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint("llama", torch.bfloat16), model)
    stored = load_file(model / "model.safetensors")
    for layer, factor in (("self_attn.k_proj", 8), ("mlp.up_proj", 1 / 16)):
        stored[f"model.layers.1.{layer}.weight"] *= factor
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    out = quantize(model, tmp_path / "out", ids, "wnvfp4anvfp4", "rtn", "weight_range=mse")
    tensors = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    for kind in ("weight_global_scale", "input_global_scale"):
        for shared in (("self_attn.q_proj", "self_attn.k_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            one, other = (tensors[f"model.layers.1.{layer}.{kind}"] for layer in shared)
            assert torch.equal(one, other)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seen: list[float] = []
    first = plain.get_submodule("model.layers.0.self_attn.q_proj")
    first.register_forward_pre_hook(lambda module, args: seen.append(float(args[0].abs().max())))
    plain(torch.from_numpy(np.load(ids)))
    found = float(tensors["model.layers.0.self_attn.q_proj.input_global_scale"])
    assert math.frexp(found)[0] == 0.5
    assert found * max(seen) / 6 <= 448 < 2 * found * max(seen) / 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_with_activations_other_dtypes_are_in_the_own_format(
    dtype: torch.dtype, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    out = quantize(checkpoint("llama", dtype), tmp_path / "out", ids, "wnvfp4anvfp4", "rtn")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitfold"
    assert any("come out in bfloat16" in note for note in report(out)["notes"])


@pytest.mark.parametrize("scheme", ["wmxfp4a16", "wnvfp4anvfp4"])
@pytest.mark.parametrize("method", ["gptq", "gptaq", "qronos", "qep+gptq", "magr+gptq"])
def test_roundings(method: str, scheme: str, checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    """They find other codes than nearest; GPTQ, which looks at each layer's own output alone, with less error there."""
    model = checkpoint("llama", torch.bfloat16)
    nearest = quantize(model, tmp_path / "nearest", ids, scheme, "rtn")
    out = quantize(model, tmp_path / "out", ids, scheme, method)
    sums = [json.loads((one / "checksums.json").read_text()) for one in (nearest, out)]
    assert sums[0].keys() == sums[1].keys()
    packed = [name for name in sums[0] if name.endswith("weight_packed")]
    assert all(sums[0][name] != sums[1][name] for name in packed)
    if method == "gptq":
        errors = [sum(x["relative_error"] for x in report(one)["layers"]) for one in (nearest, out)]
        assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("scheme", ["wnvfp4a16", "wmxfp4amxfp4", "wnvfp4anvfp4"])
@pytest.mark.parametrize(
    "method", ["smoothquant", "awq", "wush", "rotation", "affine", "omniquant"]
)
def test_transforms_fold(
    method: str, scheme: str, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = checkpoint("llama", torch.float32)
    options = ["affine.epochs=2"] if method in ("affine", "omniquant") else []
    out = quantize(model, tmp_path / "out", ids, scheme, method, *options)
    assert max(report(out)["folding_errors"]) < 1e-4
    for fits in report(out).get("fits", []):
        for fit in fits:
            assert fit["best"] <= fit["start"]


@pytest.mark.parametrize("range", ["mse", "percentile", "kl", "output_error"])
def test_ranges(range: str, checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model = checkpoint("llama", torch.float32)
    quantize(model, tmp_path / "out", ids, "wnvfp4a16", "rtn", f"weight_range={range}")


@pytest.mark.parametrize("scheme", ["wmxfp4a16", "wnvfp4anvfp4"])
def test_distillation_trains_norms_and_leaves_scales(
    scheme: str, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = checkpoint("qwen2", torch.bfloat16)
    plain = quantize(model, tmp_path / "plain", ids, scheme, "rtn")
    out = quantize(model, tmp_path / "out", ids, scheme, "rtn+distil", "distil.codes=true")
    found = report(out)["distillation"]
    assert found["after"] <= found["before"]
    assert found["trained"]["scales"] == 0
    assert found["trained"]["norms"] > 0
    assert not found["trained"].get("codes")
    for file in out.glob("*.safetensors"):
        before, after = load_file(plain / file.name), load_file(file)
        for name, value in before.items():
            assert value.ndim == 1 or torch.equal(value.float(), after[name].float()), name


def test_nothing_to_distil(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model = checkpoint("llama", torch.bfloat16)
    out = quantize(model, tmp_path / "out", ids, "wmxfp4a16", "rtn+distil", "distil.norms=false")
    assert any("nothing that it could train" in note for note in report(out)["notes"])


def test_signround_is_refused(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model = checkpoint("llama", torch.float32)
    with pytest.raises(RecipeError, match="q_proj has the grid nvfp4: choose another rounding"):
        quantize(model, tmp_path / "out", ids, "wnvfp4a16", "signround")


def test_bits_are_not_found_for_it(run: Run, tmp_path: Path) -> None:
    outcome = run(
        f"quantize {DEMO_MODEL} -o {tmp_path}/out --method rtn --scheme wmxfp4a16 --bits 3.5"
    )
    assert outcome.code == 1
    assert "integer grids, and the scheme's weights are mxfp4" in outcome.err


def test_keys_and_values_in_mxfp4(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    """Heads of 32, in bitfold's own format."""
    model = checkpoint("qwen3", torch.float32)
    out = quantize(model, tmp_path / "out", ids, "wmxfp4a16qmxfp4kvmxfp4", "rtn")
    assert "import bitfold" in (out / "README.md").read_text()


def test_a_mixture_of_grids(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    rules = "layers=[{match: '*.o_proj', scheme: wnvfp4anvfp4}, {match: '*.up_proj', scheme: w8a8}]"
    model = checkpoint("llama", torch.bfloat16)
    out = quantize(model, tmp_path / "out", ids, "wmxfp4amxfp4", "gptq", rules)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert len(config["config_groups"]) == 3
