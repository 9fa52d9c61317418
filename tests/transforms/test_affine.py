"""The fit keeps the best state it saw, goes back to it from a loss that is not finite, and is free at inference."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import bitfold
from bitfold.errors import EquivalenceError
from bitfold.models.family import NormSite
from bitfold.numerics import Scheme
from bitfold.transforms.affine import Affine
from bitfold.transforms.block_transform import BlockProblem, Restore, Terms
from bitfold.transforms.groups import HeadMatrix, Heads
from models_zoo import build

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "opt", "opt-350m")


def _problem(spoil_at: int | None = None) -> tuple[BlockProblem, list[float]]:
    """One linear layer behind a norm, its inputs with a large channel; the loss is the layer's output error.
    From call `spoil_at` on three losses are NaN."""
    torch.manual_seed(0)
    weight = torch.randn(24, 16)
    inputs = torch.randn(8, 12, 16)
    inputs[..., 0] *= 30
    seen: list[float] = []

    def loss(weights: Mapping[str, Tensor], windows: Tensor, terms: str, low: bool) -> Tensor:
        x = inputs[windows] * weights["norm.weight"]
        value = (x @ weights["linear.weight"].T - inputs[windows] @ weight.T).square().mean()
        seen.append(float(value.detach()))
        if spoil_at is not None and spoil_at <= len(seen) < spoil_at + 3:
            return value * math.nan
        return value

    def linear_loss(
        weights: Mapping[str, Tensor], windows: Tensor, terms: str, low: bool, restore: Restore
    ) -> Tensor:
        return loss(weights, windows, terms, low)

    problem = BlockProblem(
        weights={"norm.weight": torch.ones(16), "linear.weight": weight},
        sites=(NormSite("norm", ("linear",)),),
        schemes={"linear": Scheme.parse("w3a16")},
        heads=Heads(1, 1, 16),
        windows=8,
        loss=loss,
        linear_loss=linear_loss,
        seed=0,
        report=lambda done, total, what: None,
    )
    return problem, seen


def test_the_fit_lowers_the_loss_and_says_so() -> None:
    problem, _ = _problem()
    fit = Affine(epochs=10, compute="float32").fit(problem)
    assert fit.report["best"] < 0.8 * fit.report["start"]
    assert len(fit.report["losses"]) == 10
    assert set(fit.clipping) == {"linear"}


def test_on_another_grid_matrices_are_learned_and_no_clipping() -> None:
    problem = replace(_problem()[0], schemes={"linear": Scheme.parse("wnvfp4a16")})
    fit = Affine(epochs=10, compute="float32").fit(problem)
    assert fit.report["best"] < 0.9 * fit.report["start"]
    assert fit.clipping == {}


def test_no_epochs_does_nothing() -> None:
    problem, _ = _problem()
    fit = Affine(epochs=0).fit(problem)
    assert fit.transforms == []
    assert fit.clipping == {}


def test_a_fit_that_only_gets_worse_does_nothing() -> None:
    problem, _ = _problem()
    fit = Affine(epochs=2, scale_rate=50.0, clip_rate=50.0, compute="float32").fit(problem)
    assert fit.report["best"] <= fit.report["start"]


def test_a_loss_that_is_not_finite_goes_back_halves_the_step_and_says_so() -> None:
    problem, _ = _problem(spoil_at=20)
    fit = Affine(epochs=6, compute="float32").fit(problem)
    assert any("not finite" in note for note in fit.report["notes"])
    assert math.isfinite(fit.report["best"])
    assert fit.report["best"] < fit.report["start"]
    for transform in fit.transforms:
        assert torch.isfinite(transform.matrix).all()


def test_the_same_seed_gives_the_same_fit() -> None:
    fits = [Affine(epochs=3, compute="float32").fit(_problem()[0]) for _ in range(2)]
    assert torch.equal(fits[0].transforms[0].matrix, fits[1].transforms[0].matrix)


def _shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_folded_and_costs_nothing(family: str, tmp_path: Path) -> None:
    """The artifact has the tensors of plain RTN's, folding changed nothing, and the block error went down."""
    model = build(family, torch.float32, tmp_path / "model")
    tokens = np.random.default_rng(0).integers(0, 96, (8, 24))
    np.save(tmp_path / "tokens.npy", tokens)
    for method, options in (("rtn", ()), ("affine", ("affine.epochs=3",))):
        bitfold.quantize(
            model,
            tmp_path / method,
            method=method,
            scheme="w4a4q4kv4",
            set=options,
            calibration=[tmp_path / "tokens.npy"],
        )
    assert _shapes(tmp_path / "affine") == _shapes(tmp_path / "rtn")
    content = json.loads((tmp_path / "affine" / "report.json").read_text())
    assert max(content["folding_errors"]) < 1e-4
    for fits in content["fits"]:
        assert fits[0]["best"] <= fits[0]["start"]
    assert bitfold.verify(tmp_path / "affine").ok


def _quantized(model: Path, out: Path, tokens: Path, *options: str, **more: str) -> dict[str, Any]:
    """report.json of an affine run."""
    bitfold.quantize(model, out, method="affine", set=options, calibration=[tokens], **more)
    return json.loads((out / "report.json").read_text())


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 96, (8, 24)))
    return tmp_path / "tokens.npy"


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_other_precisions_of_the_run(family: str, dtype: str, tokens: Path, tmp_path: Path) -> None:
    model = build(family, torch.float32, tmp_path / "model")
    report = _quantized(
        model, tmp_path / "out", tokens, "affine.epochs=4", scheme="w4a4q4kv4", dtype=dtype
    )
    assert max(report["folding_errors"]) < {"float64": 1e-6, "bfloat16": 5e-2}[dtype]
    for fits in report["fits"]:
        assert fits[0]["best"] < fits[0]["start"]
    assert bitfold.verify(tmp_path / "out").ok


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["float32", "float64", "mixed"])
def test_the_scope_of_each_linear_layer(
    family: str, precision: str, tokens: Path, tmp_path: Path
) -> None:
    model = build(family, torch.float32, tmp_path / "model")
    options = ("affine.epochs=8", "affine.scope=linear", f"affine.precision={precision}")
    report = _quantized(model, tmp_path / "out", tokens, *options, scheme="w3a8")
    assert max(report["folding_errors"]) < 1e-4
    for fits in report["fits"]:
        assert fits[0]["best"] < fits[0]["start"]


def test_what_is_no_equivalence_is_named_by_its_site(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", torch.float32, tmp_path / "model")
    right = HeadMatrix.fold

    def wrong(self: HeadMatrix, *arguments: Any) -> dict[str, Tensor]:
        return right(replace(self, blocks=self.blocks * 1.5), *arguments)

    monkeypatch.setattr(HeadMatrix, "fold", wrong)
    with pytest.raises(EquivalenceError, match=r"self_attn\.v_proj -> self_attn\.o_proj"):
        _quantized(model, tmp_path / "out", tokens, "affine.epochs=1", scheme="w4a16")
    assert not (tmp_path / "out").exists()


def test_half_precision_is_not_tried_where_it_is_slow() -> None:
    """On a CPU without instructions for bfloat16 one product in it takes as long as a hundred."""
    problem, _ = _problem()
    lows: list[bool] = []

    def loss(weights: Mapping[str, Tensor], windows: Tensor, terms: Terms, low: bool) -> Tensor:
        lows.append(low)
        return problem.loss(weights, windows, terms, low)

    Affine(epochs=2).fit(replace(problem, loss=loss, low_is_quick=False))
    assert lows
    assert not any(lows)
    Affine(epochs=2).fit(replace(problem, loss=loss))
    assert any(lows)
