"""`--method vq`: within the bits of the integers it is asked for, better than gptq, and all commands know of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Run
from safetensors.torch import load_file
from test_resume import Death, Killed, contents
from transformers import AutoModelForCausalLM

import bitfold
from bitfold.assets import DEMO_MODEL
from bitfold.errors import RecipeError
from bitfold.numerics import Scheme
from models_zoo import TOKENS, Zoo

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    tokens = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(0))
    np.save(path, tokens.numpy())
    return path


def quantize(model: Path, out: Path, ids: Path, **options: Any) -> bitfold.Quantization:
    defaults = {"method": "vq", "scheme": "w2a16g32", "calibration": ids, "set": "vq.steps=3"}
    made = bitfold.quantize(model, out, **defaults | options)
    assert isinstance(made, bitfold.Quantization)
    return made


def integer_bits(notation: str, storage_bits: int, columns: int) -> float:
    """True bits per weight of asymmetric integers."""
    weight = Scheme.parse(notation).weight
    assert weight is not None
    return weight.bits + (storage_bits + weight.bits) / (weight.group_size or columns)


@pytest.mark.parametrize(
    ("family", "scheme", "dtype"),
    [
        ("llama", "w2a16g32", BF16),
        ("llama", "w3a16", torch.float16),
        ("mistral", "w4a16g32", torch.float32),
        ("opt", "w2a8g32", torch.float32),
        ("gemma3", "w3a16kv4g16", BF16),
        ("qwen3", "w2a4kv4", BF16),
    ],
)
def test_whatever_is_asked(
    family: str, scheme: str, dtype: torch.dtype, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = checkpoint(family, dtype)
    made = quantize(model, tmp_path / "out", ids, scheme=scheme)
    assert made.format == "bitfold"
    columns = {"down_proj": 96, "fc2": 96}
    for layer in made.layers:
        width = columns.get(layer["name"].rpartition(".")[2], 64)
        limit = integer_bits(scheme, dtype.itemsize * 8, width)
        assert 1 < layer["bits_per_weight"] <= limit
    assert bitfold.verify(tmp_path / "out").difference < 1e-6
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert torch.equal(loaded(TOKENS).logits, bitfold.load(tmp_path / "out")(TOKENS).logits)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the embedded model, not to be changed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    options = ("vq.steps=5", "vq.rounds=1")
    bitfold.quantize(
        DEMO_MODEL,
        out,
        method="vq",
        scheme="w2a16g64",
        samples=16,
        sequence_length=128,
        set=options,
    )
    return out


def test_it_is_better_than_gptq_in_fewer_bits(demo: Path, tmp_path: Path) -> None:
    gptq = bitfold.quantize(
        DEMO_MODEL,
        tmp_path / "gptq",
        method="gptq",
        scheme="w2a16g64",
        samples=16,
        sequence_length=128,
    )
    assert isinstance(gptq, bitfold.Quantization)
    report = json.loads((demo / "report.json").read_text())
    assert report["bits_per_weight"] < gptq.bits_per_weight
    assert all(layer["bits_per_weight"] <= 2.28125 for layer in report["layers"])
    assert report["probe"]["kl_mean"] < 0.7 * gptq.probe["kl_mean"]
    mine, theirs = (
        sum(layer["relative_error"] for layer in layers)
        for layers in (report["layers"], gptq.layers)
    )
    assert mine < 0.8 * theirs


def test_what_is_reported_is_what_is_stored(demo: Path) -> None:
    """Bits by the tensors' bytes: rows of the embedded model fill whole words."""
    report = json.loads((demo / "report.json").read_text())
    stored = {k: v for file in demo.glob("*.safetensors") for k, v in load_file(file).items()}
    bits = weights = 0
    for name, shape in ((k, v) for k, v in stored.items() if k.endswith(".weight_shape")):
        layer = name.removesuffix("_shape")
        parts = [stored[layer], stored[f"{layer}_scale"], stored[f"{layer}_codebook"]]
        bits += 8 * sum(part.nbytes for part in parts)
        weights += int(shape.prod())
    assert report["bits_per_weight"] == bits / weights


def test_the_commands_know_of_it(demo: Path, tmp_path: Path, run: Run) -> None:
    assert "2.2" in run(f"inspect {demo}").out
    inspected = run(f"inspect {demo} --json").json
    assert inspected["method"] == "vq"
    assert run(f"verify {demo} --json").json["ok"]
    assert "vq" in run("recipes --json").json
    line = f"quantize {DEMO_MODEL} -o {tmp_path}/out --method vq --scheme w2a16g64 --samples 4"
    foreseen = run(f"{line} --sequence-length 64 --set vq.steps=1 --dry-run --json").json
    size = sum(file.stat().st_size for file in demo.iterdir())
    assert abs(foreseen["size_bytes"] / size - 1) < 0.01
    assert not (tmp_path / "out").exists()


def test_the_recipe_that_is_stored_gives_the_same(
    checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = checkpoint("llama", BF16)
    quantize(model, tmp_path / "out", ids)
    bitfold.quantize(
        model, tmp_path / "again", recipe=tmp_path / "out" / "recipe.yaml", calibration=ids
    )
    one, other = (
        json.loads((tmp_path / n / "checksums.json").read_text()) for n in ("out", "again")
    )
    assert one == other


def test_options_overrule(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model = checkpoint("llama", BF16)
    options = ("vq.dim=2", "vq.books=4", "vq.rounds=1", "vq.steps=2")
    made = quantize(model, tmp_path / "out", ids, scheme="w2a16g16", set=options)
    assert made.bits_per_weight <= integer_bits("w2a16g16", 16, 64)
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name.endswith("weight_codebook"):
                assert tensor.shape[0::2] == (4, 2)


@pytest.mark.parametrize("method", ["wush+vq", "rotation+wush+qep+vq", "awq+vq", "affine+magr+vq"])
def test_after_transforms_and_corrections(
    method: str, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    few = ("affine.epochs=1",) if "affine" in method else ()
    made = quantize(
        checkpoint("llama", BF16), tmp_path / "out", ids, method=method, set=("vq.steps=3", *few)
    )
    assert made.format == "bitfold"
    assert bitfold.verify(tmp_path / "out").ok


def test_scales_are_distilled_and_codes_stay(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model = checkpoint("llama", BF16)
    plain = quantize(model, tmp_path / "plain", ids, scheme="w2a16g32")
    options = ("vq.steps=3", "distil.codes=true", "distil.epochs=1")
    made = quantize(
        model, tmp_path / "out", ids, method="vq+distil", scheme="w2a16g32", set=options
    )
    assert made.distillation is not None
    assert made.distillation["trained"]["scales"] > 0
    assert "codes" not in made.distillation["trained"]
    assert made.bits_per_weight == plain.bits_per_weight
    for file in (tmp_path / "plain").glob("*.safetensors"):
        after = load_file(tmp_path / "out" / file.name)
        for name, tensor in load_file(file).items():
            if name.endswith(("proj.weight", "weight_codebook")):
                assert torch.equal(tensor, after[name])
    assert bitfold.verify(tmp_path / "out").ok


def test_rules_leave_some_layers_integers_of_other_bits(
    checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: vq\nscheme: w2a16g32\nlayers: [{match: '*.down_proj', scheme: w4a16g32}, "
        "{match: lm_head, scheme: w8a16}]\nignore: ['*.o_proj']\n"
    )
    model = checkpoint("llama", BF16)
    made = bitfold.quantize(model, tmp_path / "out", recipe=recipe, calibration=ids)
    assert isinstance(made, bitfold.Quantization)
    bits = {layer["name"].rpartition(".")[2]: layer["bits_per_weight"] for layer in made.layers}
    assert "o_proj" not in bits
    assert bits["q_proj"] <= 2.5625 < 3 < bits["down_proj"] <= 4.625
    assert bitfold.verify(tmp_path / "out").ok


@pytest.mark.parametrize("moment", [3, 14, 20])
def test_a_killed_run_gives_the_same_bytes(
    moment: int, checkpoint: Zoo, tmp_path: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(checkpoint("llama", BF16), tmp_path / "model"))
    with monkeypatch.context() as patch:
        Death(patch, moment)
        with pytest.raises(Killed):
            quantize(model, tmp_path / "out", ids)
    quantize(model, tmp_path / "out", ids)
    quantize(model, tmp_path / "whole", ids)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "wnf4a16"}, "vq reads from a scheme of integers"),
        (
            {"set": ("weight.grid=codebook", "weight.symmetric=true"), "method": "gptq"},
            "has to be learned: choose --method vq",
        ),
        ({"set": "weight_range=mse"}, "vq learns what values there are and reads no weight_range"),
        ({"method": "vq+awq"}, None),
        ({"set": "vq.dim=5"}, "No codebook of vq.dim=5 for the weight"),
        ({"set": "vq.dimm=4"}, "did you mean 'dim'"),
        ({"bits": 2.5}, "Bits are found for integers, and vq stores something else"),
    ],
)
def test_refusals(
    options: dict[str, Any], said: str | None, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = checkpoint("llama", BF16)
    with pytest.raises(RecipeError, match=said):
        quantize(model, tmp_path / "out", ids, **options)
    assert not (tmp_path / "out").exists()
