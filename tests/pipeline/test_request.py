"""A run goes on, or is finished, only when everything its bytes depend on is the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bitfold.data import Calibration
from bitfold.models.checkpoint import Checkpoint
from bitfold.pipeline.request import request_hash
from bitfold.recipe import Recipe
from models_zoo import TOKENS, Zoo

CPU = torch.device("cpu")
TEXT = Calibration(TOKENS, "text", ())


def hashed(
    path: Path, recipe: Recipe | None = None, text: Calibration | None = TEXT, **more: object
) -> str:
    options = {"dtype": torch.float32, "device": CPU} | more
    return request_hash(Checkpoint(path), recipe or Recipe.make("rtn"), text, **options)


@pytest.fixture
def model(checkpoint: Zoo, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("llama", torch.float32), tmp_path / "model"))


def test_the_same_is_the_same(model: Path) -> None:
    assert hashed(model) == hashed(model)
    other_words = Calibration(TOKENS, "the same text by another name", ("a note",))
    assert hashed(model, text=other_words) == hashed(model)


OTHERS: dict[str, dict[str, object]] = {
    "scheme": {"recipe": Recipe.make("rtn", "w3a16")},
    "method": {"recipe": Recipe.make("awq")},
    "seed": {"recipe": Recipe.make("rtn", seed=1)},
    "option": {"recipe": Recipe.make("rtn", set=["weight_range=mse"])},
    "ignore": {"recipe": Recipe.make("rtn", ignore=["*.v_proj"])},
    "no text": {"text": None},
    "text": {"text": Calibration(TOKENS.flip(0), "text", ())},
    "dtype": {"dtype": torch.bfloat16},
    "device": {"device": torch.device("cuda")},
    "allocation": {"allocation": {"budget": {"bits": 3}}},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_request(name: str, model: Path) -> None:
    assert hashed(model, **OTHERS[name]) != hashed(model)


def test_another_checkpoint(model: Path) -> None:
    before = hashed(model)
    (model / "tokenizer.json").write_text("{}")
    with_tokenizer = hashed(model)
    assert with_tokenizer != before
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert hashed(model) not in (before, with_tokenizer)
