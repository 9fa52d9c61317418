"""What the benchmarks build on: checkpoints moved to other families, variants that can be asked for, rows that stay."""

import importlib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from models_zoo import CONFIGS, TOKENS, random_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "largest"),
    [("mistral", 0.0), ("gemma", 0.03), ("qwen2", 0.5), ("qwen3", 0.7), ("gemma3_text", 0.7)],
)
def test_moved_weights(
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    family: str,
    largest: float,
    tied: bool,
) -> None:
    """The Llama's weights in another family are near its function, and bitfold knows all of the other's weights."""
    config = deepcopy(CONFIGS["llama"])
    config.tie_word_embeddings = tied
    monkeypatch.setitem(CONFIGS, "llama", config)
    llama = random_model("llama", torch.float32)
    torch.manual_seed(0)
    other = module("make_families").moved(llama, family, TOKENS)
    with torch.no_grad():
        wanted, found = (model(input_ids=TOKENS).logits for model in (llama, other.eval()))
    assert (found - wanted).norm() <= largest * wanted.norm()
    other.save_pretrained(tmp_path)
    assert Skeleton(Checkpoint(tmp_path)).family.name == family


def test_every_variant_can_be_asked_for(module: Any) -> None:
    studies, measuring = module("studies"), module("measuring")
    for name, study in studies.STUDIES.items():
        asked = [
            measuring.Asked.parse("affine", "w4a4", *variant.set)
            for variant in study.variants.values()
        ]
        recipes = [str(one.recipe()) for one in asked]
        assert name == "samples" or len(set(recipes)) == len(recipes), name


def test_every_granularity_of_the_cache_can_be_asked_for(module: Any) -> None:
    measuring = module("measuring")
    recipes = [
        str(measuring.Asked.parse("rtn", "w16a16kv4", *choice).recipe())
        for choice in module("kv_cache").GRANULARITIES.values()
    ]
    assert len(set(recipes)) == len(recipes)


def test_a_cache_fills_the_memory_that_it_says(module: Any) -> None:
    """8 layers, 8 KV heads of 128 dimensions; keys in groups of 32 tokens, values of 32 dimensions."""
    tokens, numbers = 512, 8 * 8 * 128 * 512
    found = module("kv_cache").fill(tokens, 4)
    assert found["bf16_mb"] * 2**20 == 2 * numbers * 2
    assert found["cache_mb"] * 2**20 == 2 * numbers * (4 + 24 / 32) / 8


def test_what_happened(module: Any) -> None:
    """A run that left the plain way says so, and in which blocks."""
    happened = module("studies").happened
    plain = {"block": 0, "start": 1.0, "best": 0.8, "best_epoch": 2, "losses": [0.9, 0.8]}
    plain |= {"notes": []}
    assert happened({"fits": [plain]}) == []
    wild = plain | {"block": 3, "best_epoch": None, "losses": [float("nan"), 1.2], "notes": ["!"]}
    assert happened({"fits": [plain, wild]}) == [
        "loss or gradient not finite, went back to the best state (block 3)",
        "loss above the start's (block 3)",
        "left as it was (block 3)",
    ]
    assert happened({"failed": "Folding changed it."}) == ["Folding changed it."]


def test_order_of_methods(module: Any) -> None:
    families = module("families")
    methods = {
        name: {"texts": {"text": {"kl_mean": kl}}}
        for name, kl in {"rtn": 0.1, "omniquant": 0.05, "affine": 0.0504, "awq": None}.items()
    }
    assert families.violations({"methods": methods}, 0.01) == ["awq ÷ affine inf"]
    assert families.violations({"methods": methods}, 0.001) == [
        "affine ÷ omniquant 1.008",
        "awq ÷ affine inf",
    ]


def test_finished_rows_are_not_made_again(module: Any, tmp_path: Path) -> None:
    rows = module("measuring").Rows
    of = {"model": "a", "settings": {"windows": None, "length": 256}}
    made = rows(tmp_path / "rows.jsonl", tuple(of)).get(of, lambda: {"kl": 1.0}, "a")
    again = rows(tmp_path / "rows.jsonl", tuple(of))
    assert again.get(of, pytest.fail, "a") == made
    assert again.get(of | {"model": "b"}, lambda: {"kl": 2.0}, "b")["kl"] == 2.0
    assert made["bitfold"].startswith(bitfold.__version__)


def test_decoding_compares_with_what_transformers_computes(module: Any, tmp_path: Path) -> None:
    """Token by token through a cache are the logits of one pass, on the model that is timed."""
    decoding = module("decoding")
    model = decoding.plain(decoding.random_llama(tmp_path / "model", 256, 1), "float32")
    ids = decoding.text_of(6)
    found, wanted = decoding.by_token(model, ids), model(input_ids=ids).logits[0]
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert decoding.write_plainly(model, ids, 5) == decoding.write_quickly(model, ids, 5)
