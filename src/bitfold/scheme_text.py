"""Schemes as users write them: in notation or in full, in rules for some layers, and changed by `--set`."""

from collections.abc import Mapping
from typing import Any

from bitfold.checked import make
from bitfold.errors import RecipeError
from bitfold.numerics import Scheme

__all__ = ["TENSORS", "Overrides", "layer_rule", "of_activations", "scheme_of"]

TENSORS = ("weight", "activation", "query", "key", "value")
Overrides = Mapping[tuple[str, ...], Any]
"""By key, as in `--set`: `("weight", "symmetric")` → False."""


def scheme_of(text: object, overrides: Overrides, of_method: Overrides | None = None) -> Scheme:
    """A scheme from its notation (or its full form in a file), with `weight.symmetric`-like overrides.

    of_method: what the method says of activations; the notation leaves it open where it has any but fp4.
    """
    if isinstance(text, Mapping):
        base: Scheme = make(Scheme, "The scheme", text)
    else:
        base = Scheme.parse(str(text))
        if base.activation is not None and not base.activation.fp4:
            # A user's come last, since the later of two that contradict each other is the one that is refused.
            first = {key: value for key, value in (of_method or {}).items() if key not in overrides}
            overrides = {**first, **overrides}
    fields = base.model_dump()
    for (tensor, *path), value in overrides.items():
        if len(path) != 1:
            raise RecipeError(f"'{'.'.join([tensor, *path])}' is no key: write {tensor}.<option>.")
        if fields[tensor] is None:
            raise RecipeError(
                f"'{tensor}.{path[0]}' has nothing to set, because the scheme leaves the {tensor} alone: "
                "choose a scheme that quantizes it."
            )
        fields[tensor][path[0]] = value
        in_clusters = fields[tensor]["clusters"] is not None
        if path[0] == "clusters" and in_clusters:
            fields[tensor]["granularity"] = "cluster"
        if tensor != "weight" and path[0] == "static" and value is True and not in_clusters:
            fields[tensor]["granularity"] = overrides.get((tensor, "granularity"), "tensor")
        if path[0] == "grid" and value != "int":
            fields[tensor]["symmetric"] = True
        if path[0] == "group_size" and (tensor, "granularity") not in overrides:
            fields[tensor]["granularity"] = "channel" if value is None else "group"
    for tensor, _ in overrides:
        make(type(getattr(base, tensor)), f"The scheme of the {tensor}", fields[tensor])
    scheme: Scheme = make(Scheme, "The scheme", fields)
    return scheme


def of_activations(options: object) -> Overrides:
    """What a method or a file says of the activations of schemes in notation, as overrides."""
    if not isinstance(options, Mapping):
        raise RecipeError(
            f"The recipe's `activation` is `key: value` pairs such as clusters: 32, not {options!r}."
        )
    return {("activation", str(key)): value for key, value in options.items()}


def layer_rule(rule: object, overrides: Overrides, of_method: Overrides) -> dict[str, Any]:
    """A rule of `layers` with its scheme made, changed as the recipe's is.

    Raises RecipeError where it is no rule.
    """
    if not isinstance(rule, Mapping) or not rule.keys() >= {"match", "scheme"}:
        raise RecipeError(
            f"A rule in `layers` is {{match: PATTERN, scheme: SCHEME}}, not {rule!r}."
        )
    base = scheme_of(rule["scheme"], {})
    apply = {key: value for key, value in overrides.items() if getattr(base, key[0]) is not None}
    return dict(rule) | {"scheme": scheme_of(rule["scheme"], apply, of_method)}
