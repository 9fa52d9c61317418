"""`+distil`: lower KL on held-back windows, codes as they were, an artifact that verifies, and resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_resume import Death, Killed, contents
from torch import Tensor

import bitfold
from bitfold.errors import DataError, RecipeError
from models_zoo import Zoo


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    tokens = torch.randint(0, 96, (32, 24), generator=torch.Generator().manual_seed(0))
    np.save(path, tokens.numpy())
    return path


def quantize(model: Path, out: Path, ids: Path, **options: Any) -> bitfold.Quantization:
    made = bitfold.quantize(model, out, **{"method": "rtn+distil", "calibration": ids} | options)
    assert isinstance(made, bitfold.Quantization)
    return made


def tensors(out: Path) -> dict[str, Tensor]:
    return {
        name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("family", "scheme", "dtype"),
    [
        ("llama", "w2a16g32", torch.float32),
        ("llama", "w3a16g32", torch.bfloat16),
        ("opt", "w4a4", torch.float32),
        ("qwen2", "w4a4", torch.bfloat16),
        ("qwen3", "w3a8kv4", torch.float32),
        ("gemma", "wnf4a16g16", torch.float32),
        ("opt-350m", "w2a16g16", torch.float32),
    ],
)
def test_the_kl_falls_and_the_codes_stay(
    family: str, scheme: str, dtype: torch.dtype, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = checkpoint(family, dtype)
    made = quantize(model, tmp_path / "distilled", ids, scheme=scheme)
    plain = quantize(model, tmp_path / "plain", ids, scheme=scheme, method="rtn")
    found = made.distillation
    assert found is not None
    assert plain.distillation is None
    assert found["after"] < found["before"]
    assert found["trained"]["scales"] > 0
    assert found["trained"]["norms"] > 0
    bitfold.verify(tmp_path / "distilled")
    bitfold.load(tmp_path / "distilled")
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "distilled")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    for name, value in before.items():
        assert after[name].shape == value.shape
        assert after[name].dtype == value.dtype
    assert all(n.endswith("weight_scale") or before[n].ndim == 1 for n in changed)
    report = json.loads((tmp_path / "distilled" / "report.json").read_text())
    note = report["distillation"]["note"]
    assert note.startswith("Distilled (")
    assert note in (tmp_path / "distilled" / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("llama", "w2a16g32"), ("opt", "w3a16"), ("qwen3", "w2a8"), ("gemma3", "w2a16g16")],
)
def test_codes_move_where_they_are_asked_to_and_the_kl_falls_further(
    family: str, scheme: str, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = checkpoint(family, torch.float32)
    settings = ["distil.epochs=20", "distil.codes=true"]  # with 8 few codes have moved yet
    moved = quantize(model, tmp_path / "moved", ids, scheme=scheme, set=settings)
    plain = quantize(model, tmp_path / "plain", ids, scheme=scheme, set=settings[:1])
    assert moved.distillation is not None
    assert plain.distillation is not None
    assert moved.distillation["after"] < plain.distillation["after"]
    assert moved.distillation["trained"]["codes"] > moved.distillation["trained"]["scales"]
    assert "codes" not in plain.distillation["trained"]
    bitfold.verify(tmp_path / "moved")
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "moved")
    changed = {
        name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])
    }
    assert changed & {"weight_packed", "weight"}


@pytest.mark.parametrize(("own", "count"), [("written=6", 34), ("resampled=2", 3 * 28)])
def test_windows_of_the_model_s_own_are_trained_on_not_judged_by(
    own: str, count: int, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = checkpoint("llama", torch.float32)
    settings = ["distil.codes=true", f"distil.{own}"]
    made = quantize(model, tmp_path / "out", ids, scheme="w2a16g32", set=settings)
    assert made.distillation is not None
    assert (made.distillation["held_back"], made.distillation["training"]) == (4, count)
    again = quantize(model, tmp_path / "again", ids, scheme="w2a16g32", set=settings)
    assert again.distillation == made.distillation


def test_too_many_codes_stay_and_that_is_said(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    settings = ["distil.codes=true", "distil.written=6", "distil.most_codes=1000"]
    made = quantize(
        checkpoint("llama", torch.float32), tmp_path / "out", ids, scheme="w2a16g32", set=settings
    )
    assert made.distillation is not None
    assert "codes" not in made.distillation["trained"]
    assert made.distillation["training"] == 28
    assert any("most_codes" in note for note in made.notes)


def test_the_head_stays_as_a_rule_quantized_it(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: rtn+distil\nscheme: w3a16g32\nlayers: [{match: lm_head, scheme: w8a16}]\n"
    )
    made = bitfold.quantize(
        checkpoint("llama", torch.float32), tmp_path / "out", recipe=recipe, calibration=ids
    )
    assert made.distillation["after"] < made.distillation["before"]
    bitfold.verify(tmp_path / "out")


@pytest.mark.parametrize("setting", ["distil.norms=false", "distil.biases=false"])
def test_what_is_not_asked_for_is_not_trained(
    setting: str, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    made = quantize(
        checkpoint("opt", torch.float32), tmp_path / "out", ids, scheme="w3a16g32", set=setting
    )
    assert made.distillation is not None
    kind = setting.partition(".")[2].partition("=")[0]
    assert [k for k, count in made.distillation["trained"].items() if not count] == [kind]


def test_with_rotation_and_online_matrices(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    for method in ("rotation+distil", "affine-online+distil"):
        settings = ["affine.epochs=1"] if method.startswith("affine") else []
        made = quantize(
            checkpoint("llama", torch.float32),
            tmp_path / method,
            ids,
            method=method,
            scheme="w3a16g32",
            set=settings,
        )
        assert made.distillation is not None
        assert made.distillation["after"] <= made.distillation["before"]
        bitfold.verify(tmp_path / method)


def test_a_rate_that_diverges_changes_nothing(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model = checkpoint("llama", torch.float32)
    made = quantize(model, tmp_path / "far", ids, scheme="w8a16", set="distil.rate=0.9")
    quantize(model, tmp_path / "plain", ids, scheme="w8a16", method="rtn")
    assert made.distillation is not None
    assert made.distillation["kept"] == 0
    assert made.distillation["after"] == made.distillation["before"]
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "far")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_moment(
    checkpoint: Zoo, tmp_path: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A death before each change to the file system; what was learned is not learned again."""
    model = checkpoint("llama", torch.float32)
    options = {"scheme": "w3a16g32", "samples": 8, "set": "distil.epochs=1"}
    with monkeypatch.context() as patch:
        death = Death(patch, 999)
        quantize(model, tmp_path / "whole", ids, **options)
        changes = 999 - death.left
    expected = contents(tmp_path / "whole")
    for moment in range(changes):
        out = tmp_path / "cut" / "out"
        out.parent.mkdir()
        with monkeypatch.context() as patch:
            Death(patch, moment)
            with pytest.raises(Killed):
                quantize(model, out, ids, **options)
        if out.exists():
            assert contents(out) == expected
        quantize(model, out, ids, **options)
        assert contents(out) == expected
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out.parent)


def test_damage_to_what_was_learned_starts_afresh(
    checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = checkpoint("llama", torch.float32)
    options = {"scheme": "w3a16g32", "samples": 8, "set": "distil.epochs=1"}
    quantize(model, tmp_path / "whole", ids, **options)

    def stop(done: float, total: int, what: str) -> None:
        if what.startswith("writing block 2"):
            raise Killed

    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", ids, progress=stop, **options)
    learned = tmp_path / ".out.partial" / "distilled.safetensors"
    learned.write_bytes(learned.read_bytes()[:-1] + b"\x01")
    made = quantize(model, tmp_path / "out", ids, **options)
    assert made.resumed_blocks == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_one_window_is_refused(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    with pytest.raises(DataError, match="more --samples"):
        quantize(checkpoint("llama", torch.float32), tmp_path / "out", ids, samples=1,
                 scheme="w3a16g32")  # fmt: skip


def test_nothing_to_train_is_refused(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    with pytest.raises(RecipeError, match="nothing to train"):
        quantize(
            checkpoint("llama", torch.float32),
            tmp_path / "out",
            ids,
            scheme="w16a8",
            set=["distil.norms=false"],
        )


def test_a_dry_run_counts_it(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model, options = checkpoint("llama", torch.float32), {"scheme": "w3a16g32"}
    said = [
        bitfold.quantize(
            model, tmp_path / "out", method=method, calibration=ids, dry_run=True, **options
        )
        for method in ("gptq", "gptq+distil")
    ]
    assert said[1].disk_bytes > said[0].disk_bytes
    assert said[1].seconds > said[0].seconds
    # The weights take the same; only the report has more to say.
    assert 0 <= said[1].size_bytes - said[0].size_bytes < 1_000
