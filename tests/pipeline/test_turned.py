"""A turned checkpoint computes what it did, and what is quantized from it loads; on every family that has the site."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bitfold
from bitfold.errors import EquivalenceError, RecipeError
from bitfold.models.checkpoint import Checkpoint
from bitfold.pipeline.turned import TurnedSkeleton, skeleton_for
from bitfold.recipe import Recipe
from bitfold.transforms.rotation import Rotation
from models_zoo import build

OPEN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "opt", "opt-projected")
CPU = torch.device("cpu")


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 96, (8, 24)))
    return tmp_path / "tokens.npy"


@pytest.mark.parametrize("size", [1, 2, 12, 64, 65])
@pytest.mark.parametrize("keeps_ones", [False, True])
def test_rotations_are_members_of_the_streams_group(size: int, keeps_ones: bool) -> None:
    found = Rotation().matrix(size, keeps_ones=keeps_ones, seed=3)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(found @ found.T, eye)
    if keeps_ones:
        torch.testing.assert_close(found.sum(dim=1), torch.ones(size, dtype=torch.float64))
    if size > 2:
        assert not torch.allclose(found, Rotation().matrix(size, keeps_ones=keeps_ones, seed=4))


@pytest.mark.parametrize("family", OPEN)
def test_artifacts_of_turned_models_load_and_are_better(
    family: str, tokens: Path, tmp_path: Path
) -> None:
    model = build(family, torch.float32, tmp_path / "model")
    bitfold.quantize(
        model, tmp_path / "out", method="rotation+wush", scheme="w8a16", calibration=[tokens]
    )
    assert bitfold.verify(tmp_path / "out").ok
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["probe"]["kl_mean"] < 1e-3  # 8 bits: all that is left is rounding
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = AutoModelForCausalLM.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if original.config.tie_word_embeddings:
        assert config["tie_word_embeddings"] is False
    batch = torch.from_numpy(np.load(tokens)).long()
    with torch.no_grad():
        change = (loaded(batch).logits - original(batch).logits).norm() / original(
            batch
        ).logits.norm()
    assert change < 0.05


def test_where_possible_leaves_what_takes_none_as_it_is(tmp_path: Path) -> None:
    recipe = Recipe.make("rotation", set=["rotation.where_possible=true"])
    for family, turned in (("gemma3", False), ("llama", True)):
        skeleton = skeleton_for(
            Checkpoint(build(family, torch.float32, tmp_path / family)), recipe, CPU
        )
        assert isinstance(skeleton, TurnedSkeleton) == turned


@pytest.mark.parametrize(
    ("family", "turned"),
    [
        ("llama", True),  # its head is a tensor of its own already
        ("qwen2", False),  # its head is its embeddings: turned, it would have to be stored
        ("gemma3", False),  # its stream takes no rotation
    ],
)
def test_where_free_turns_only_what_costs_nothing(
    family: str, turned: bool, tokens: Path, tmp_path: Path
) -> None:
    model = build(family, torch.float32, tmp_path / "model")
    asked = {"method": "rotation", "scheme": "w4a16", "calibration": [tokens]}
    free = bitfold.quantize(model, tmp_path / "free", set=["rotation.where_free=true"], **asked)
    plain = bitfold.quantize(model, tmp_path / "plain", **(asked | {"method": "rtn"}))
    skeleton = skeleton_for(
        Checkpoint(model), Recipe.make("rotation", set=["rotation.where_free=true"]), CPU
    )
    assert isinstance(skeleton, TurnedSkeleton) == turned
    assert tensor_shapes(free.out) == tensor_shapes(plain.out)
    config = json.loads((free.out / "config.json").read_text())
    original = json.loads((model / "config.json").read_text())
    assert config.get("tie_word_embeddings") == original.get("tie_word_embeddings")


def tensor_shapes(artifact: Path) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(value.shape)
        for file in artifact.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def test_a_killed_run_of_a_turned_model_resumes(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitfold.pipeline import quantize as pipeline

    model = build("llama", torch.float32, tmp_path / "model")
    request = {"method": "rotation", "scheme": "w4a16", "calibration": [tokens]}
    bitfold.quantize(model, tmp_path / "whole", **request)
    real, calls = pipeline.step, []

    def dies(*arguments: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(pipeline, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        bitfold.quantize(model, tmp_path / "killed", **request)
    monkeypatch.setattr(pipeline, "step", real)
    result = bitfold.quantize(model, tmp_path / "killed", **request)
    assert result.resumed_blocks == 1
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


def test_norms_behind_the_halves_take_no_rotation(tokens: Path, tmp_path: Path) -> None:
    model = build("gemma3", torch.float32, tmp_path / "model")
    with pytest.raises(RecipeError, match="takes no rotation"):
        bitfold.quantize(
            model, tmp_path / "out", method="rotation", scheme="w4a16", calibration=[tokens]
        )
    assert not (tmp_path / "out").exists()


def test_a_basis_that_is_no_equivalence_is_found_out(tmp_path: Path) -> None:
    model = build("llama", torch.float32, tmp_path / "model")
    skeleton = skeleton_for(Checkpoint(model), Recipe.make("rotation"), CPU)
    assert isinstance(skeleton, TurnedSkeleton)
    tokens = torch.arange(20).view(1, 20)
    right = _logits(skeleton, tokens)
    skeleton.check(tokens, right, torch.float32)
    skeleton.bases.stream[0] *= 1.3
    with pytest.raises(EquivalenceError, match="changed the logits"):
        skeleton.check(tokens, _logits(skeleton, tokens), torch.float32)


def _logits(skeleton: TurnedSkeleton, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        outer = skeleton.load_outer(torch.float32)
        hidden = skeleton.embed(outer, tokens)
        for index in range(len(skeleton.blocks)):
            hidden = skeleton.run(index, skeleton.load_block(index, torch.float32), hidden)
        return skeleton.head(outer, hidden)
