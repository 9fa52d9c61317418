"""`--method salient`: counted, stored, loaded; refused where it makes no sense."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Run
from safetensors.torch import load_file

import bitfold
from bitfold.errors import RecipeError
from models_zoo import Zoo


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    tokens = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(0))
    np.save(path, tokens.numpy())
    return path


@pytest.mark.parametrize(
    ("family", "method", "scheme"),
    [
        ("llama", "salient", "w3a16g32"),
        ("opt", "wush+salient", "w4a8kv4"),
        ("qwen2", "magr+salient+distil", "wnf4a16"),
    ],
)
def test_whatever_is_asked(
    family: str, method: str, scheme: str, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = checkpoint(family, torch.bfloat16)
    made = bitfold.quantize(
        model,
        tmp_path / "out",
        method=method,
        scheme=scheme,
        calibration=ids,
        set="salient.share=0.05",
    )
    assert isinstance(made, bitfold.Quantization)
    assert made.format == "bitfold"
    assert bitfold.verify(tmp_path / "out").difference < 1e-6
    plain = bitfold.quantize(model, tmp_path / "plain", method="rtn", scheme=scheme)
    assert isinstance(plain, bitfold.Quantization)
    for mine, theirs in zip(made.layers, plain.layers, strict=True):
        rows = 96 if mine["name"].endswith(("gate_proj", "up_proj", "fc1")) else None
        columns = 96 if mine["name"].endswith(("down_proj", "fc2")) else 64
        rows = rows or (
            32 if mine["name"].endswith(("k_proj", "v_proj")) and family != "opt" else 64
        )
        extra = round(0.05 * columns) * (16 * rows + 32) / (rows * columns)
        assert mine["bits_per_weight"] == pytest.approx(theirs["bits_per_weight"] + extra)


def test_the_commands(checkpoint: Zoo, tmp_path: Path, ids: Path, run: Run) -> None:
    line = f"quantize {checkpoint('llama', torch.bfloat16)} -o {tmp_path}/out --calibration {ids}"
    line += " --method salient --scheme w3a16g32 --json"
    foreseen = run(f"{line} --dry-run").json["size_bytes"]
    made = run(line).json
    assert abs(made["size_bytes"] / foreseen - 1) < 0.05
    assert run(f"verify {tmp_path}/out").code == 0
    stored = {
        k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()
    }
    assert stored["model.layers.0.mlp.down_proj.weight_kept"].shape == (64, 1)
    weight = load_file(checkpoint("llama", torch.bfloat16) / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    column = int(stored[f"{name}_columns"])
    assert torch.equal(stored[f"{name}_kept"][:, 0], weight[name][:, column])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"set": "salient.share=0"}, "salient cannot have share=0"),
        ({"set": "weight.kept=2"}, "have to be chosen: use --method salient, and salient.share"),
        ({"set": "activation.kept=2", "scheme": "w3a8g32"}, "the activation keeps no columns"),
        ({"bits": 3.5}, "Bits are found for integers, and salient stores something else"),
        (
            {"set": ("weight.grid=codebook",)},
            "has to be learned: choose --method vq",
        ),
    ],
)
def test_refusals(
    options: dict[str, object], said: str, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = checkpoint("llama", torch.bfloat16)
    with pytest.raises(RecipeError, match=said):
        bitfold.quantize(
            model,
            tmp_path / "out",
            **{"method": "salient", "scheme": "w3a16g32", "calibration": ids} | options,
        )
