"""The published methods, recipe files in `recipes/`, composed with `+`; `auto` chooses by scheme and effort."""

import re
from pathlib import Path
from typing import Any

import yaml

from bitfold.errors import RecipeError, did_you_mean
from bitfold.numerics import Scheme

__all__ = [
    "AUTO",
    "DEFAULT_EFFORT",
    "LISTS",
    "compose",
    "method_names",
    "method_text",
    "methods_with_efforts",
    "read_file",
    "read_yaml",
]

AUTO = "auto"
DEFAULT_EFFORT = "medium"
LISTS = ("transforms", "corrections")
"""The parts of a recipe of which there may be several."""

_METHODS = Path(__file__).parent / "recipes"
_ABOUT = ("summary", "paper")
FEW_BITS = 4


def method_names() -> list[str]:
    """The methods there are."""
    return sorted(file.stem for file in _METHODS.glob("*.yaml"))


def method_text(name: str) -> str:
    """A method's recipe file, in full.

    Raises RecipeError for an unknown name.
    """
    if name not in method_names():
        raise RecipeError(f"Unknown method '{name}': {did_you_mean(name, method_names())}.")
    return (_METHODS / f"{name}.yaml").read_text(encoding="utf-8")


def methods_with_efforts() -> list[str]:
    """Those that `--effort` speaks to."""
    return [n for n in method_names() if {"efforts", "choices"} & read_yaml(method_text(n)).keys()]


def compose(names: object, scheme: Scheme, effort: str | None) -> dict[str, Any]:
    """The fields of methods joined by `+`: transforms, and corrections, follow one another; a later range or rounding
    replaces, with the corrections that a method of transforms put before its own: `affine+gptaq` is affine's transforms
    and gptaq. `activation` is what a method says of how inputs are quantized. Some methods have `efforts`, of which one
    is taken (`medium` if None); `auto` has them for every kind of scheme.

    Raises RecipeError for an unknown name, and for an effort that nothing asks for.
    """
    parts = names.split("+") if isinstance(names, str) else []
    if not all(part.strip() for part in parts) or not parts:
        raise RecipeError(
            f"The method {names!r} is neither a name nor several joined by +, as in smoothquant+awq: "
            f"{did_you_mean(str(names), method_names())}."
        )
    parts = [part.strip() for part in parts]
    if AUTO in parts and len(parts) > 1:
        raise RecipeError(
            "auto chooses all parts itself: leave + out, or name the methods (`bitfold recipes`)."
        )
    contents = [_with_effort(read_yaml(method_text(name)), scheme, effort) for name in parts]
    if effort is not None and not any(heard for _, heard in contents):
        raise RecipeError(
            f"--effort says how hard {' or '.join(methods_with_efforts())} try: leave it out with {names}."
        )
    fields: dict[str, Any] = {slot: [] for slot in LISTS}
    # Corrections of methods that are nothing else, and those that a method of transforms puts before its rounding.
    asked: list[Any] = []
    before_rounding: list[Any] = []
    for content, _ in contents:
        fields["transforms"] += content.get("transforms", [])
        if "rounding" in content:
            before_rounding = []
        found = before_rounding if content.get("transforms") else asked
        found += content.get("corrections", [])
        fields |= {key: value for key, value in content.items() if key not in (*LISTS, *_ABOUT)}
    # A correction that two methods have is made once.
    every = [*asked, *before_rounding]
    fields["corrections"] = [c for place, c in enumerate(every) if c not in every[:place]]
    return fields


def _with_effort(
    content: dict[str, Any], scheme: Scheme, effort: str | None
) -> tuple[dict[str, Any], bool]:
    """A method's content with what the effort asks for, and whether there are efforts to choose from."""
    efforts = content["choices"][_kind(scheme)] if "choices" in content else content.get("efforts")
    if efforts is None:
        return content, False
    wanted = effort or DEFAULT_EFFORT
    if wanted not in efforts:
        raise RecipeError(f"Unknown effort '{wanted}': {did_you_mean(wanted, efforts)}.")
    rest = {key: value for key, value in content.items() if key not in ("choices", "efforts")}
    return rest | efforts[wanted], True


def _kind(scheme: Scheme) -> str:
    weight, activation = scheme.weight, scheme.activation
    others = [s for s in (activation, scheme.query, scheme.key, scheme.value) if s is not None]
    if weight is not None and weight.grid != "int":
        return "other_grids"
    if any(other.bits <= FEW_BITS for other in others):
        return "few_bit_activations"
    if weight is not None and weight.bits <= FEW_BITS:
        return "few_bit_weights"
    return "many_bits" if others else "many_bit_weights"


def read_file(file: Path) -> dict[str, Any]:
    """A recipe file's fields, without what is only said about it; of a method's text that has efforts, the medium one.

    Raises RecipeError where it is missing or no YAML mapping.
    """
    if not file.is_file():
        raise RecipeError(f"There is no recipe file {file}: check the path, or give a --method.")
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{file} is not valid YAML ({reason}): correct it.") from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"{file} holds no recipe: write `key: value` lines, as `bitfold recipes awq` shows."
        )
    if "efforts" in content:
        efforts = content.pop("efforts")
        if not isinstance(efforts, dict) or not isinstance(efforts.get(DEFAULT_EFFORT), dict):
            raise RecipeError(
                f"{file} has efforts, but no {DEFAULT_EFFORT} one, which a file's is: write its parts without efforts."
            )
        content |= efforts[DEFAULT_EFFORT]
    return {key: value for key, value in content.items() if key not in _ABOUT}


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's booleans: `off` is a word (dominance: off), only true and false are not."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(text: str) -> Any:
    """The value that YAML 1.2 text stands for."""
    return yaml.load(text, Loader=_Yaml)
