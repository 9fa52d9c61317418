"""Mixed precision from a budget to the artifact: budgets are kept, choices are rules, the same gives the same bytes."""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import bitfold
from bitfold.errors import DataError, RecipeError
from bitfold.pipeline.estimate import Estimate
from bitfold.recipe import Recipe
from models_zoo import TOKENS, Zoo

FEW = bitfold.Mixed(bits=(16, 8, 4, 2), windows=2, length=24)
# Shares of a scale are 32 bits in a float32 checkpoint: groups of 32 inputs cost a bit and more.
SCHEME = "w4a16g32"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "tokens.npy"
    np.save(file, TOKENS.numpy())
    return file


@pytest.fixture
def make(checkpoint: Zoo, text: Path, tmp_path: Path) -> Any:
    """Quantizes a tiny model, by default the bfloat16 Llama, to tmp_path/out."""

    def run(family: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
        given = {"scheme": None if "recipe" in options else SCHEME, "mixed": FEW, "out": "out"}
        given |= {"calibration": text} | options
        out = tmp_path / given.pop("out")
        return bitfold.quantize(checkpoint(family, dtype), out, **given)

    return run


def weights(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.glob("*.safetensors"))}


def files(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_mean_bits(make: Any, family: str) -> None:
    options = bitfold.Mixed(bits=(8, 4, 2), windows=2, length=24)
    made = make(family, bits=4.2, mixed=options)
    found = made.allocation["chosen"]["bits_per_weight"]
    assert made.bits_per_weight == pytest.approx(found)
    assert 3.5 < found <= 4.2
    by_hand = [layer["bits_per_weight"] for layer in made.layers]
    assert len(set(by_hand)) > 1
    assert bitfold.verify(made.out).tensors > 0


def test_the_choice_is_the_best_there_is(make: Any) -> None:
    made = make(bits=5.0)
    groups = made.allocation["groups"]
    assert len(groups) == 8
    # Weights of each group, and bits of each candidate: 16, or b + (16 + b) / 32 with scales and zero-points.
    shapes = {"q": 64 * 64 + 2 * 32 * 64, "o": 64 * 64, "g": 2 * 96 * 64, "d": 64 * 96}
    sizes = [shapes[group["name"].split(": ")[1][0]] for group in groups]
    cost = {"16": 16.0} | {f"{b}g32": b + (16 + b) / 32 for b in (8, 4, 2)}

    def taken(names: tuple[str, ...]) -> float:
        return sum(cost[n] * size for n, size in zip(names, sizes, strict=True)) / sum(sizes)

    def kl(names: tuple[str, ...]) -> float:
        return sum(group["kl"][name] for group, name in zip(groups, names, strict=True))

    least = min(kl(names) for names in product(cost, repeat=8) if taken(names) <= 5.0)
    chosen = tuple(group["chosen"] for group in groups)
    assert kl(chosen) == pytest.approx(least, rel=1e-7)
    assert made.allocation["chosen"]["kl"] == pytest.approx(least, rel=1e-7)
    assert made.allocation["chosen"]["bits_per_weight"] == pytest.approx(taken(chosen))


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("scheme", ["w4a16g32", "w8a8"])
@pytest.mark.parametrize("method", ["rtn", "auto"])
def test_size(make: Any, family: str, scheme: str, method: str) -> None:
    """Of all files, embeddings included; and no more is left than a step of one layer would take."""
    asked = {"scheme": scheme, "method": method}
    whole = make(family, mixed=None, bits=8.6, **asked).size_bytes
    made = make(family, fit=whole - 20_000, overwrite=True, **asked)
    assert made.size_bytes <= whole - 20_000
    assert made.size_bytes > whole - 20_000 - 16_000
    assert made.size_bytes == sum(file.stat().st_size for file in made.out.iterdir())


def test_layers_that_engines_fuse_share(make: Any) -> None:
    schemes = {layer["name"]: layer["scheme"] for layer in make(bits=4.5).layers}
    for block in ("model.layers.0", "model.layers.1"):
        assert len({schemes.get(f"{block}.self_attn.{n}_proj") for n in "qkv"}) == 1
        assert len({schemes.get(f"{block}.mlp.{n}_proj") for n in ("gate", "up")}) == 1
    apart = bitfold.Mixed(bits=(8, 4, 2), windows=2, length=24, fuse=False)
    assert len(make(bits=4.5, mixed=apart, overwrite=True).allocation["groups"]) == 14


def test_per_kind(make: Any) -> None:
    kinds = bitfold.Mixed(bits=(8, 4, 2), windows=2, length=24, per="kind")
    made = make(bits=4.5, mixed=kinds)
    assert [group["name"] for group in made.allocation["groups"]] == [
        *("q_proj, k_proj, v_proj", "o_proj", "gate_proj, up_proj", "down_proj")
    ]
    by_kind: dict[str, set[str]] = {}
    for layer in made.layers:
        by_kind.setdefault(layer["name"].rpartition(".")[2], set()).add(layer["scheme"])
    assert all(len(schemes) == 1 for schemes in by_kind.values())


def test_group_sizes(make: Any) -> None:
    sizes = bitfold.Mixed(bits=(4, 3), group_sizes=(32, 16, 7), windows=2, length=24)
    made = make(bits=4.4, mixed=sizes)
    assert set(made.allocation["groups"][0]["kl"]) == {"4g32", "4g16", "3g32", "3g16"}
    assert made.bits_per_weight <= 4.4


def test_the_choice_is_rules_of_the_recipe(make: Any) -> None:
    """Whoever is given the artifact's recipe gets the same weights."""
    made = make(bits=4.5)
    stored = yaml.safe_load((made.out / "recipe.yaml").read_text())
    assert stored["layers"]
    again = make(out="again", scheme=None, mixed=None, recipe=made.out / "recipe.yaml")
    assert weights(again.out) == weights(made.out)


def test_rules_and_ignored_layers_stay(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "scheme: w4a16g32\nlayers: [{match: '*.down_proj', scheme: w8a16g32}]\nignore: ['*.o_proj']\n"
    )
    made = make(bits=4.5, recipe=file)
    schemes = {layer["name"]: layer["scheme"] for layer in made.layers}
    names = [layer for group in made.allocation["groups"] for layer in group["layers"]]
    assert len(names) == 10
    assert not any("down_proj" in name or "o_proj" in name for name in names)
    assert schemes["model.layers.0.mlp.down_proj"] == "w8a16g32"
    assert "model.layers.1.self_attn.o_proj" not in schemes
    # Down's 8.75 bits are part of the mean.
    assert made.allocation["chosen"]["bits_per_weight"] <= 4.5


@pytest.mark.parametrize("method", ["awq", "gptq", "rotation", "gptq+distil"])
def test_with_methods(make: Any, method: str) -> None:
    made = make(method=method, bits=4.5, samples=2, sequence_length=24)
    assert len({layer["scheme"] for layer in made.layers}) > 1
    bitfold.verify(made.out)


def test_activations_follow_the_scheme(make: Any) -> None:
    made = make(scheme="w4a8kv8g32", bits=4.5)
    for layer in made.layers:
        assert layer["scheme"].split("a", 1)[1].startswith("8kv8")
    bitfold.verify(made.out)


# --- the curve ---


def test_the_curve_falls(make: Any) -> None:
    curve = make(bits=4.5).allocation["pareto"]
    assert len(curve) > 4
    assert curve[0]["layers"] == {"2g32": 14}
    assert curve[-1]["kl"] == 0
    for key, sign in (("bits_per_weight", 1), ("weight_bytes", 1), ("kl", -1)):
        values = [sign * point[key] for point in curve]
        assert values == sorted(values)


# --- again, and after a kill ---


def seen(reports: list[str]) -> Any:
    return lambda done, total, what: reports.append(what)


def test_the_same_again_is_finished(make: Any) -> None:
    first = make(bits=4.5)
    before = files(first.out)
    reports: list[str] = []
    second = make(bits=4.5, progress=seen(reports))
    assert second.finished_before
    assert reports == []
    assert files(first.out) == before
    with pytest.raises(bitfold.BitfoldError, match="--overwrite"):
        make(bits=4.4)


@pytest.mark.parametrize("killed_at", ["sensitivity of block 2 of 2", "block 2 of 2"])
def test_goes_on_after_a_kill(make: Any, tmp_path: Path, killed_at: str) -> None:
    whole = make(bits=4.5, out="whole")

    def kill(done: float, total: int, what: str) -> None:
        if what == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(bits=4.5, progress=kill)
    kept = tmp_path / ".out.sensitivity.json"
    assert kept.is_file()
    reports: list[str] = []
    made = make(bits=4.5, progress=seen(reports))
    assert "sensitivity of block 1 of 2" not in reports
    assert ("sensitivity of block 2 of 2" in reports) == killed_at.startswith("sens")
    assert files(made.out) == files(whole.out)
    assert not kept.exists()


def test_damaged_or_foreign_sensitivities_are_measured_again(make: Any, tmp_path: Path) -> None:
    whole = make(bits=4.5, out="whole")
    for content in ("{", "[]", json.dumps({"key": "another", "measured": {"x": {}}})):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / ".out.sensitivity.json").write_text(content)
        assert files(make(bits=4.5).out) == files(whole.out)


def test_dry_run_writes_nothing(make: Any, tmp_path: Path) -> None:
    said = make(bits=4.5, dry_run=True)
    assert isinstance(said, Estimate)
    assert list(tmp_path.iterdir()) == []
    assert said.size_bytes == pytest.approx(make(bits=4.5).size_bytes, rel=0.05)


# --- latency ---


def table(tmp_path: Path, without: tuple[int, int] | None = None) -> Path:
    """Seconds that grow with bits; 2 bits as slow as 8."""
    shapes = [(64, 64), (32, 64), (96, 64), (64, 96)]
    entries = [
        {"shape": shape, "bits": bits, "group_size": None if bits == 16 else 32}
        | {"seconds": shape[0] * shape[1] * {16: 16, 8: 8, 4: 5, 2: 8}[bits] * 1e-9}
        for shape in shapes
        for bits in (16, 8, 4, 2)
        if shape != without
    ]
    file = tmp_path / "table.json"
    file.write_text(json.dumps(entries))
    return file


def test_latency(make: Any, tmp_path: Path) -> None:
    options = bitfold.Mixed(bits=(16, 8, 4, 2), windows=2, length=24, table=table(tmp_path))
    made = make(latency=4e-4, mixed=options)
    point = made.allocation["chosen"]
    assert point["seconds"] <= 4e-4
    assert "2g32" not in point["layers"]  # slower than 4, and worse
    both = make(latency=4e-4, bits=5.0, mixed=options, overwrite=True).allocation["chosen"]
    assert both["seconds"] <= 4e-4
    assert both["bits_per_weight"] <= 5.0


# --- what cannot be ---


def test_impossible_budgets(make: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the smallest possible is 2\.5625; give a larger"):
        make(bits=2.5)
    with pytest.raises(RecipeError, match=r"fit into 0\.050 MB: the smallest possible is 0\.0"):
        make(fit="50kB")
    options = bitfold.Mixed(windows=2, length=24, bits=(8, 4), table=table(tmp_path))
    with pytest.raises(RecipeError, match="table of latencies: the smallest possible is"):
        make(latency=1e-9, mixed=options)


def test_the_smallest_possible_is_possible(make: Any) -> None:
    with pytest.raises(RecipeError) as refusal:
        make(fit="50kB")
    least = float(str(refusal.value).partition("possible is ")[2].split(" MB")[0])
    assert make(fit=f"{least + 0.001:.3f}MB").size_bytes <= (least + 0.001) * 1e6


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fits as it is": ({"fit": "1GB"}, "within the budget as it is"),
    "no budget": ({}, "within a budget: give --bits, --fit or --latency"),
    "no bits to find": ({"bits": 4, "scheme": "w16a8"}, "leaves the weights alone"),
    "another grid": ({"bits": 4, "scheme": "wnf4a16g32"}, "integer grids"),
    "all ignored": ({"bits": 4, "ignore": ["*.mlp.*", "*.self_attn.*"]}, "quantizes nothing"),
    "latency alone": ({"latency": 1.0}, "go together"),
    "no such size": ({"fit": "big"}, "cannot be read"),
    "no group divides": (
        {"bits": 4, "mixed": bitfold.Mixed(bits=(4,), group_sizes=(7,))},
        "No candidate's group size divides the 64 inputs of model.layers.0: q_proj, k_proj, v_proj",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(make: Any, case: str, tmp_path: Path) -> None:
    options, sentence = REFUSED[case]
    with pytest.raises(RecipeError) as refusal:
        make(**options)
    assert sentence in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_table_that_lacks_a_shape(make: Any, tmp_path: Path) -> None:
    lacking = table(tmp_path, without=(64, 96))
    options = bitfold.Mixed(windows=2, length=24, table=lacking)
    with pytest.raises(RecipeError, match=r"add entries for weights of \[64, 96\]"):
        make(latency=1.0, mixed=options)
    with pytest.raises(DataError, match="cannot be read"):
        make(latency=1.0, mixed=bitfold.Mixed(table=tmp_path / "none"))


# --- sensitivities alone ---


def test_sensitivity(checkpoint: Zoo, text: Path, make: Any) -> None:
    model = checkpoint("llama", torch.bfloat16)
    found = bitfold.sensitivity(model, scheme=SCHEME, mixed=FEW, calibration=text)
    assert found.ranked_by == "4g32"
    ranks = [group["kl"]["4g32"] for group in found.groups]
    assert ranks == sorted(ranks, reverse=True)
    made = make(bits=4.5)
    assert {g["name"]: g["kl"] for g in made.allocation["groups"]} == {
        g["name"]: g["kl"] for g in found.groups
    }
    json.dumps(found.to_json())
    with pytest.raises(RecipeError, match="A finished Recipe goes without"):
        bitfold.sensitivity(model, recipe=Recipe.make("rtn"), scheme=SCHEME)
