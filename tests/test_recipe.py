"""A recipe is checked whole, composed of parts, overridden where asked, and read back as it was written."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bitfold.corrections import CORRECTIONS
from bitfold.distillation import DISTILLATIONS
from bitfold.errors import RecipeError
from bitfold.methods import method_names, method_text
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import Scheme
from bitfold.pipeline.plan import make_plan
from bitfold.ranges import RANGES
from bitfold.recipe import Recipe
from bitfold.rounding import ROUNDINGS
from bitfold.transforms import TRANSFORMS
from models_zoo import Zoo


def names(recipe: Recipe) -> list[str]:
    known = TRANSFORMS | CORRECTIONS | RANGES | ROUNDINGS | DISTILLATIONS
    by_class = {part: name for name, part in known.items()}
    parts = (
        *recipe.transforms,
        *recipe.corrections,
        recipe.weight_range,
        recipe.activation_range,
        recipe.rounding,
    )
    last = () if recipe.distillation is None else (recipe.distillation,)
    return [by_class[type(part)] for part in (*parts, *last)]


# --- methods ---


@pytest.mark.parametrize("method", method_names())
def test_every_method_is_a_recipe_that_says_what_it_is(method: str) -> None:
    content = yaml.safe_load(method_text(method))
    assert content.keys() >= {"summary", "paper"}
    recipe = Recipe.make(method)
    assert recipe.method == method
    assert recipe.scheme == Scheme.parse("w4a16g128")


@pytest.mark.parametrize(
    ("method", "parts", "calibrates"),
    [
        ("rtn", ["minmax", "minmax", "nearest"], False),
        ("smoothquant", ["smoothquant", "minmax", "minmax", "nearest"], True),
        ("awq", ["awq", "output_error", "minmax", "nearest"], True),
        ("smoothquant+awq", ["smoothquant", "awq", "output_error", "minmax", "nearest"], True),
        ("awq + smoothquant", ["awq", "smoothquant", "output_error", "minmax", "nearest"], True),
        ("gptq", ["output_error", "minmax", "gptq"], True),
        ("qep", ["qep", "output_error", "minmax", "gptq"], True),
        ("magr+qep", ["magr", "qep", "output_error", "minmax", "gptq"], True),
        ("rotation", ["rotation", "output_error", "minmax", "gptq"], True),
        (
            "affine+gptaq",
            ["smoothquant", "wush", "affine", "output_error", "minmax", "gptaq"],
            True,
        ),
        (
            "affine+signround",
            ["smoothquant", "wush", "affine", "minmax", "minmax", "signround"],
            True,
        ),
        ("affine+rtn", ["smoothquant", "wush", "affine", "minmax", "minmax", "nearest"], True),
        (
            "affine+qep+vq",
            ["smoothquant", "wush", "affine", "qep", "minmax", "minmax", "vq"],
            True,
        ),
        ("awq+gptq", ["awq", "output_error", "minmax", "gptq"], True),
        ("rtn+distil", ["minmax", "minmax", "nearest", "distil"], True),
        ("distil+awq", ["awq", "output_error", "minmax", "nearest", "distil"], True),
        ("awq+rtn", ["awq", "output_error", "minmax", "nearest"], True),
    ],
)
def test_methods_are_made_of_parts(method: str, parts: list[str], calibrates: bool) -> None:
    recipe = Recipe.make(method)
    assert names(recipe) == parts
    assert recipe.calibrates == calibrates


def test_parts_have_names() -> None:
    assert Recipe.make("rtn").part_names == ["nearest"]
    assert Recipe.make("awq+gptq").part_names == ["awq", "output_error", "gptq"]
    assert Recipe.make("affine").part_names == ["smoothquant", "wush", "affine", "qep", "gptq"]
    assert Recipe.make("distil").part_names == ["nearest", "distil"]


def test_needs_are_those_of_the_parts() -> None:
    assert Recipe.make("rtn").needs == frozenset()
    assert Recipe.make("awq").needs == {"channels", "gram"}
    assert Recipe.make("rtn", set=["weight_range=output_error"]).needs == {"gram"}
    static = Recipe.make("rtn", "w8a8", set=["activation.static=true"])
    assert static.calibrates_activations
    assert static.needs == {"rows", "channels"}


# --- overrides ---


@pytest.mark.parametrize(
    ("item", "where", "value"),
    [
        ("awq.steps=40", "transforms.0.steps", 40),
        ("output_error.smallest=0.3", "weight_range.smallest", 0.3),
        ("weight.symmetric=true", "scheme.weight.symmetric", True),
        ("weight.group_size=64", "scheme.weight.group_size", 64),
        ("weight.group_size=null", "scheme.weight.granularity", "channel"),
        ("activation.static=true", "scheme.activation.granularity", "tensor"),
        ("activation.symmetric=true", "scheme.activation.symmetric", True),
        ("activation.clusters=8", "scheme.activation.granularity", "cluster"),
        ("key.bits=3", "scheme.key.bits", 3),
        ("weight_range=mse", "weight_range.power", 2.0),
        ("weight_range={mse: {power: 2.4}}", "weight_range.power", 2.4),
        ("stream=original", "stream", "original"),
        ("seed=7", "seed", 7),
        ("rounding=gptq", "rounding.order", "activation"),
    ],
)
def test_set(item: str, where: str, value: object) -> None:
    found: object = Recipe.make("awq", "w4a4kv4g128", set=[item])
    for step in where.split("."):
        found = found[int(step)] if step.isdigit() else getattr(found, step)
    assert found == value


def test_off_is_a_word_not_a_boolean(file: Path) -> None:
    recipe = Recipe.make("affine", set=["affine.dominance=off"])
    assert recipe.transforms[-1].dominance == "off"
    file.write_text("transforms:\n  - affine: {dominance: off, shifts: false}\n")
    read = Recipe.make(file=file).transforms[0]
    assert (read.dominance, read.shifts) == ("off", False)


def test_several_settings_and_the_last_word() -> None:
    settings = ["weight.bits=3", "seed=1", "weight.bits=5", "awq.steps=3", "awq.weight_aware=false"]
    recipe = Recipe.make("awq", set=settings, seed=9)
    assert recipe.scheme.weight.bits == 5
    assert recipe.transforms[0].model_dump() == {"steps": 3, "weight_aware": False}
    assert recipe.seed == 9  # the option of its own goes before --set


def test_ignore_and_layers() -> None:
    rules = "layers=[{match: '*.down_proj', scheme: w8a16}, {match: '*.0.*', scheme: w3a16}]"
    recipe = Recipe.make("rtn", "w4a16", set=[rules], ignore=["*.v_proj"])
    assert recipe.scheme_for("model.layers.1.mlp.up_proj") == Scheme.parse("w4a16")
    assert recipe.scheme_for("model.layers.1.mlp.down_proj") == Scheme.parse("w8a16")
    assert recipe.scheme_for("model.layers.0.mlp.down_proj") == Scheme.parse("w3a16")  # the last
    assert recipe.scheme_for("model.layers.0.self_attn.v_proj") is None


def test_settings_reach_the_schemes_of_rules() -> None:
    rules = "layers=[{match: '*.down_proj', scheme: w8a8}, {match: '*.v_proj', scheme: w16a16}]"
    recipe = Recipe.make("rtn", "w4a16", set=[rules, "weight.symmetric=true"])
    assert recipe.scheme_for("x.down_proj").weight.symmetric
    assert recipe.scheme_for("x.v_proj") == Scheme()


# --- files ---


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


RICH = {
    "rtn": ("w4a4q4kv4g32", []),
    "awq": ("w3a16g64", ["awq.steps=7", "weight.symmetric=true", "weight.narrow=true"]),
    "smoothquant": ("w8a8", ["activation.static=true", "activation_range={percentile: {p: 99}}"]),
    "smoothquant+awq": ("wnf4a16", ["layers=[{match: '*.o_proj', scheme: w8a8kv8}]", "seed=3"]),
    "rptq": ("w4a4g32", ["activation.clusters=9", "layers=[{match: '*.o_proj', scheme: w8a16}]"]),
    "omniquant": ("w4a4", ["ignore=['*.down_proj']", "stream=original"]),
}


@pytest.mark.parametrize("method", RICH)
def test_what_is_written_is_read_back(method: str, file: Path) -> None:
    """The recipe.yaml of an artifact makes the same recipe again."""
    recipe = Recipe.make(method, RICH[method][0], set=RICH[method][1])
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    again = Recipe.make(file=file)
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize("method", [name for name in method_names() if name != "auto"])
def test_a_methods_own_text_is_a_recipe_file(method: str, file: Path) -> None:
    file.write_text(method_text(method), encoding="utf-8")
    fields = {"method": method}
    found = Recipe.make(None, "w4a4", file=file).model_copy(update=fields)
    assert found == Recipe.make(method, "w4a4")


def test_a_file_of_efforts_needs_the_medium_one(file: Path) -> None:
    file.write_text("rounding: gptq\nefforts: {low: {transforms: [smoothquant]}}\n")
    with pytest.raises(RecipeError, match="has efforts, but no medium one"):
        Recipe.make(file=file)


def test_a_file_may_say_what_notation_leaves_open_of_activations(file: Path) -> None:
    rules = "layers: [{match: '*.v_proj', scheme: w8a8}, {match: '*.o_proj', scheme: w8a16}]"
    file.write_text(f"scheme: w4a4\nactivation: {{clusters: 8, static: true}}\n{rules}\n")
    recipe = Recipe.make(file=file)
    for scheme in (recipe.scheme, recipe.scheme_for("x.v_proj")):
        assert (scheme.activation.clusters, scheme.activation.static) == (8, True)
    assert recipe.scheme_for("x.o_proj").activation is None
    changed = Recipe.make(file=file, set=["activation.clusters=5"]).scheme.activation
    assert (changed.clusters, changed.static) == (5, True)
    with pytest.raises(RecipeError, match="the activation is impossible: clusters goes with"):
        Recipe.make(file=file, set=["activation.granularity=token"])
    file.write_text("activation: 8\n")
    with pytest.raises(RecipeError, match="`activation` is `key: value` pairs"):
        Recipe.make(file=file)


def test_a_file_with_either_overridden(file: Path) -> None:
    file.write_text("method: awq\nscheme: w3a16g64\nweight_range: mse\nseed: 5\n")
    assert names(Recipe.make(file=file)) == ["awq", "mse", "minmax", "nearest"]
    assert Recipe.make(file=file).scheme.notation == "w3a16g64"
    assert Recipe.make(None, "w2a16", file=file).scheme.notation == "w2a16"
    other = Recipe.make("rtn", file=file)
    assert names(other) == ["minmax", "minmax", "nearest"]  # nothing of awq under rtn's name
    assert (other.method, other.scheme.notation, other.seed) == ("rtn", "w3a16g64", 5)


def test_ignore_of_a_file_and_of_the_command_line_add_up(file: Path) -> None:
    file.write_text("ignore: ['*.v_proj']\n")
    assert Recipe.make(file=file, ignore=["*.k_proj"]).ignore == ("*.v_proj", "*.k_proj")


# --- what cannot be; the sentences themselves are in tests/e2e ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "akq"}, "did you mean 'awq'"),
        ({"method": "awq++rtn"}, r"joined by \+"),
        ({"set": ["awq.steps=40"]}, "awq, which the method auto does not have"),
        ({"method": "awq", "set": ["awq.step=40"]}, "did you mean 'steps'"),
        ({"method": "awq", "set": ["awq.steps=1"]}, "steps=1"),
        ({"method": "awq", "set": ["awq.steps=many"]}, "steps='many'"),
        ({"set": ["weight.simmetric=true"]}, "did you mean 'symmetric'"),
        ({"set": ["activation.bits=4"]}, "leaves the activation alone"),
        ({"set": ["weight.bits=9"]}, "bits=9"),
        ({"set": ["weight.static=true"]}, "static is for activations"),
        (
            {"scheme": "w4a4kv4", "set": ["key.granularity=channel"]},
            "key.group_size=32 for a scale",
        ),
        (
            {"scheme": "w4a4kv4", "set": ["value.granularity=channel"]},
            "value.static=true$|true\\.$",
        ),
        ({"scheme": "w4a4kv4", "set": ["key.granularity=head"]}, "set key.static=true"),
        ({"scheme": "w4a4kv4", "set": ["value.granularity=tensor"]}, "still to come"),
        ({"scheme": "w4a16", "set": ["weight.granularity=head"]}, "the weight has no heads"),
        ({"scheme": "w4a4", "set": ["activation.granularity=head"]}, "the activation has no heads"),
        (
            {"scheme": "w4a4kv4", "set": ["value.granularity=channel", "value.group_size=32"]},
            "only keys have scales for groups of tokens: set value.granularity=group",
        ),
        (
            {"scheme": "w4a4q4", "set": ["query.granularity=channel", "query.group_size=32"]},
            "only keys have scales for groups of tokens: set query.granularity=group",
        ),
        (
            {
                "scheme": "w4a4",
                "set": ["activation.granularity=channel", "activation.group_size=8"],
            },
            "no groups of tokens, only keys have",
        ),
        (
            {
                "scheme": "w4a4kv4",
                "set": ["key.static=true", "key.granularity=channel", "key.group_size=32"],
            },
            "leave out group_size",
        ),
        ({"scheme": "w4a4kv4", "set": ["key.granularity=group"]}, "needs a group_size"),
        ({"scheme": "w4a4kv4", "set": ["key.granularity=head", "key.group_size=8"]}, "goes with"),
        ({"set": ["activation_range=output_error"]}, "only weights have"),
        ({"set": ["weight_range=msee"]}, "did you mean 'mse'"),
        ({"set": ["weight_range={mse: {power: 0}}"]}, "power=0"),
        ({"set": ["weight_range={mse: {}, kl: {}}"]}, "one name"),
        ({"set": ["nothing"]}, "key=value"),
        ({"set": ["scale=3"]}, "Unknown key"),
        ({"set": ["ignore='*.v_proj'"]}, "is a list"),
        ({"set": ["layers=[{match: '*'}]"]}, "match: PATTERN"),
        ({"set": ["stream=both"]}, "stream='both'"),
        ({"scheme": "wmxfp4a16", "set": ["weight.symmetric=false"]}, "mxfp4 has no zero-point"),
        ({"scheme": "wnvfp4a16", "set": ["weight.group_size=32"]}, "one scale for every 16 inputs"),
        ({"scheme": "wmxfp4a16", "set": ["weight.granularity=channel"]}, "every 32 inputs"),
        ({"scheme": "w4amxfp4", "set": ["activation.static=true"]}, "leave out static"),
        ({"file": Path("nowhere.yaml")}, "no recipe file"),
    ],
)
def test_what_cannot_be(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.make(**arguments)


# --- held against a network, before anything is calibrated ---


@pytest.mark.parametrize(
    ("scheme", "settings", "message"),
    [
        ("w4a16g48", [], "48 does not divide the 64 inputs of .*q_proj: use .* g64"),
        ("w4a16g64", [], "64 does not divide the 96 inputs of .*down_proj: use .* g32"),
        ("w4a4kvmxfp4", [], "key's group size 32 does not .* of a head .*: mxfp4 has no other"),
        ("w8a8", ["activation.group_size=48"], "activation's group size 48 does not divide the 64"),
        ("w4a4kv4", ["value.group_size=12"], "value's group size 12 does not divide the 16"),
        ("w4a16", ["weight.granularity=tensor", "weight_range=output_error"], "has one scale"),
        ("w4a16", ["weight.granularity=token"], "a weight has no tokens"),
        ("w16a16", [], "quantizes nothing"),
        ("w4a16", ["ignore=['*_proj']"], "quantizes nothing"),
        ("w4a16", ["ignore=['*.gate']"], "did you mean '\\*.gate_proj'"),
        ("w4a16", ["layers=[{match: 'layers.*', scheme: w8a8}]"], "matches no linear layer"),
        (
            "w4a4kv4",
            ["layers=[{match: '*.k_proj', scheme: w4a4kv8}]"],
            "q, k and v projections of .* different",
        ),
    ],
)
def test_held_against_a_network(
    scheme: str, settings: list[str], message: str, checkpoint: Zoo
) -> None:
    skeleton = Skeleton(Checkpoint(checkpoint("llama", torch.float32)))
    with pytest.raises(RecipeError, match=message):
        make_plan(skeleton, Recipe.make("rtn", scheme, set=settings))


SOLVED = ("rotation", "smoothquant", "wush", "qep")


@pytest.mark.parametrize(
    ("scheme", "effort", "parts"),
    [
        ("w4a16g128", "low", [*SOLVED, "output_error", "quantease"]),
        ("w3a16", None, [*SOLVED, "output_error", "quantease", "distil"]),
        ("w2a16g64", "low", [*SOLVED, "output_error", "quantease"]),
        ("w2a8g64", "medium", [*SOLVED, "output_error", "quantease", "distil"]),
        ("w4a4q4kv4", "medium", ["rotation", "smoothquant", "wush", "affine", "qep", "gptq"]),
        ("w4a16kv4", "low", [*SOLVED, "output_error", "quantease"]),
        ("w8a16", "high", ["qep", "output_error", "quantease"]),
        ("w8a8", None, ["smoothquant", "qep", "output_error", "quantease"]),
        ("wnf4a16g64", None, [*SOLVED, "mse", "gptq"]),
        ("wmxfp4a16", "low", [*SOLVED, "mse", "gptq"]),
        ("wnvfp4anvfp4", "high", [*SOLVED, "mse", "gptq"]),
    ],
)
def test_auto_chooses_by_scheme_and_effort(
    scheme: str, effort: str | None, parts: list[str]
) -> None:
    recipe = Recipe.make(scheme=scheme, effort=effort)
    assert recipe.method == "auto"
    assert recipe.part_names == parts


def test_other_methods_have_efforts_too() -> None:
    low, medium, high = (
        Recipe.make("flat+gptaq", "w4a4", effort=effort) for effort in ("low", None, "high")
    )
    assert [type(part).__name__ for part in low.transforms] == ["SmoothQuant", "Kronecker", "Keys"]
    assert [recipe.transforms[-1].epochs for recipe in (medium, high)] == [5, 15]
    assert {type(recipe.rounding).__name__ for recipe in (low, medium, high)} == {"Gptaq"}
    assert Recipe.make("affine-plus", "w4a4", effort="low").distillation is None
    assert Recipe.make("affine-plus", "w4a4").distillation is not None


def test_more_effort_is_more_steps() -> None:
    medium, high = (Recipe.make("auto", "w2a16g64", effort=e) for e in ("medium", "high"))
    assert high.distillation.epochs > medium.distillation.epochs
    assert high.distillation.written > medium.distillation.written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "auto", "effort": "hihg"}, "did you mean 'high'"),
        ({"method": "awq", "effort": "high"}, "leave it out with awq"),
        ({"method": "auto+distil"}, "chooses all parts itself"),
        ({"method": "qep+gptaq"}, "qep and gptaq both make up"),
        ({"method": "qep+qronos"}, "qep and qronos both make up"),
        ({"method": "qep", "set": ["stream=original"]}, "sees? the original's"),
        ({"method": "magr+signround"}, "finds codes by the block's output"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.make(**arguments)
