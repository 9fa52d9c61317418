"""The files of examples/ are what their comments say."""

from pathlib import Path

from bitfold import Recipe
from bitfold.evaluate.choices import read_questions

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_recipe_gives_layers_their_own_schemes() -> None:
    recipe = Recipe.make(file=EXAMPLES / "mixed-precision.yaml")
    bits = {
        layer: scheme and scheme.weight and scheme.weight.bits
        for layer in ("0.mlp.up_proj", "3.mlp.up_proj", "3.mlp.down_proj", "5.self_attn.o_proj")
        for scheme in [recipe.scheme_for(f"model.layers.{layer}")]
    }
    assert bits == {
        "0.mlp.up_proj": 8,
        "3.mlp.up_proj": 4,
        "3.mlp.down_proj": 8,
        "5.self_attn.o_proj": None,
    }
    assert recipe.weight_range.steps == 31


def test_the_script_compiles() -> None:
    file = EXAMPLES / "quantize_and_compare.py"
    compile(file.read_text(encoding="utf-8"), str(file), "exec")


def test_the_questions_can_be_asked() -> None:
    assert [question.answer for question in read_questions(EXAMPLES / "questions.jsonl")] == [
        0,
        1,
        2,
    ]
