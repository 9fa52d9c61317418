"""What a user asks of training: the schemes, and which estimator stands in for rounding."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from bitfold.checked import make
from bitfold.errors import RecipeError, did_you_mean
from bitfold.numerics import Scheme, TensorScheme
from bitfold.scheme_text import scheme_of
from bitfold.training.estimators import (
    BinaryConnectWeight,
    DorefaWeight,
    DynamicInput,
    InputEstimator,
    LearnedTernaryWeight,
    LsqInput,
    LsqWeight,
    MinMaxWeight,
    MovingAverageInput,
    ObservedInput,
    PactInput,
    SignInput,
    TwnWeight,
    WeightEstimator,
    XnorWeight,
    binary_scheme,
    dorefa_scheme,
    ternary_scheme,
)

__all__ = ["METHODS", "Preparation", "input_estimator", "preparation_of", "weight_estimator"]

Weights = Literal[
    "minmax", "lsq", "dorefa", "binaryconnect", "bnn", "xnor", "twn", "learned_ternary", "none"
]
Inputs = Literal["dynamic", "moving_average", "observed", "lsq", "pact", "sign", "none"]
_BINARY = ("binaryconnect", "bnn", "xnor")
_TERNARY = ("twn", "learned_ternary")

METHODS: dict[str, dict[str, Any]] = {
    "static": {"weights": "minmax", "inputs": "observed"},
    "dynamic": {"weights": "minmax", "inputs": "dynamic"},
    "qat": {"weights": "minmax", "inputs": "moving_average"},
    "lsq": {"weights": "lsq", "inputs": "lsq"},
    "pact": {"weights": "lsq", "inputs": "pact"},
    "dorefa": {"weights": "dorefa", "inputs": "pact"},
    "binaryconnect": {"weights": "binaryconnect", "inputs": "none"},
    "bnn": {"weights": "bnn", "inputs": "sign"},
    "xnor": {"weights": "xnor", "inputs": "sign"},
    "binary": {"weights": "xnor", "inputs": "none"},
    "twn": {"weights": "twn", "inputs": "none"},
    "ternary": {"weights": "learned_ternary", "inputs": "none"},
}
"""What a name stands for; a new one is a line here."""


class Preparation(BaseModel):
    """weights, inputs: estimators, by name. scheme: of weights and inputs; binary and ternary weights bring their own.
    ignore: patterns of module names that are left alone. bits: of the weights of layers, by name, in mixed precision.
    ends: what the first and the last layer get, which the papers of few bits leave alone or give 8. embeddings: bits
    of embeddings, a scale for each row. range: of observed inputs and of min-max weights. stochastic: BinaryConnect's
    weights are drawn in training. input_scaling: XNOR-Net's K. decay: λ of PACT. momentum: of a moving average.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Weights = "lsq"
    inputs: Inputs = "lsq"
    scheme: Scheme = Field(default_factory=Scheme)
    ignore: tuple[str, ...] = ()
    ends: Literal["same", "8 bits", "full"] = "same"
    embeddings: int | None = Field(default=None, ge=2, le=8)
    bits: dict[str, int] = Field(default_factory=dict)
    range: Literal["minmax", "percentile", "mse", "kl", "moving_average"] = "minmax"
    stochastic: bool = False
    input_scaling: bool = True
    decay: float = Field(default=1e-4, ge=0)
    momentum: float = Field(default=0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        weight, activation = self.scheme.weight, self.scheme.activation
        if self.scheme.quantizes_attention:
            raise ValueError("queries, keys and values are not trained: choose a scheme w…a…")
        if weight is not None and (weight.grid not in ("int", "shifted") or weight.kept):
            raise ValueError(f"weights are trained on integer grids, not on {weight.grid}")
        if activation is not None and (
            activation.grid != "int" or activation.clipped or activation.clusters
        ):
            raise ValueError(
                "inputs are trained on integer grids, one scale for all or one for each token"
            )
        if weight is None and activation is None and self.embeddings is None:
            raise ValueError("the scheme leaves everything alone: choose one such as w4a8")
        if self.weights in _TERNARY and weight is not None and weight != _ternary_like(weight):
            raise ValueError(f"{self.weights} has 2 bits, symmetric and narrow: leave out the bits")
        return self

    @property
    def rounds_layers(self) -> bool:
        """Whether layers, and not embeddings alone, are quantized."""
        has = self.scheme.weight is not None or self.scheme.activation is not None
        return has or self.inputs == "sign"

    def leaves_alone(self, name: str) -> bool:
        """Whether a module of this name stays as it is."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)


def preparation_of(
    recipe: str | Mapping[str, Any] | Preparation = "lsq",
    scheme: str | Scheme | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Preparation:
    """A preparation from a method's name (`METHODS`) and a scheme's notation such as w4a4 or w2a16g64.

    Weights are symmetric, with a scale for each channel or group, inputs static with one scale but where they are
    dynamic; `overrides` change that, as in {"weight.symmetric": False}, and any option, as in {"ends": "8 bits"}.
    Binary and ternary methods need no bits: w1a16, w2a16 and none are the same to them.

    Raises RecipeError for what cannot be.
    """
    if isinstance(recipe, Preparation):
        return recipe
    if isinstance(recipe, Mapping):
        fields = dict(recipe)
    elif recipe in METHODS:
        fields = dict(METHODS[recipe])
    else:
        raise RecipeError(
            f"There is no way of training '{recipe}': {did_you_mean(recipe, METHODS)}."
        )
    asked = dict(overrides or {})
    of_scheme = {tuple(k.split(".")): asked.pop(k) for k in list(asked) if "." in k}
    fields |= asked
    given = scheme if scheme is not None else fields.get("scheme")
    fields["scheme"] = _scheme(given, of_scheme, fields)
    found: Preparation = make(Preparation, "The preparation", fields)
    return found


def _scheme(
    given: object, overrides: Mapping[tuple[str, ...], Any], fields: Mapping[str, Any]
) -> Scheme:
    weights, inputs = fields.get("weights", "lsq"), fields.get("inputs", "lsq")
    if isinstance(given, Scheme) and not overrides:
        return given
    own = weights in _BINARY or weights in _TERNARY
    if given is None and not own:
        given = "w8a8"
    text = "w2a16" if given is None else str(given)
    if own and text.startswith("w1"):
        text = f"w2{text[2:]}"
    if text.endswith("a1"):
        text = f"{text[:-2]}a16"  # what signs are, the estimator of the inputs knows
    base: dict[tuple[str, ...], Any] = {}
    if not own and not text.startswith("w16"):
        base = {("weight", "symmetric"): True}
    scheme = scheme_of(text, {**base, **overrides})
    weight, activation = scheme.weight, scheme.activation
    if weight is not None and weights in _BINARY:
        weight = binary_scheme(weight.granularity, weight.group_size)
    if weight is not None and weights in _TERNARY:
        weight = ternary_scheme(weight.granularity, weight.group_size)
    if weight is not None and weights == "dorefa":
        weight = dorefa_scheme(weight.bits)
    if activation is not None and inputs not in ("dynamic", "none", "sign"):
        activation = TensorScheme(
            bits=activation.bits, symmetric=activation.symmetric, granularity="tensor", static=True
        )
    return Scheme(weight=weight, activation=None if inputs in ("none", "sign") else activation)


def _ternary_like(scheme: TensorScheme) -> TensorScheme:
    return ternary_scheme(scheme.granularity, scheme.group_size)


def weight_estimator(
    asked: Preparation, layer: nn.Module, scheme: TensorScheme, storage: torch.dtype | None = None
) -> WeightEstimator:
    """The estimator for the weight of a layer. storage: of its scales; None: the dtype of the weight."""
    weight: Tensor = layer.get_parameter("weight").detach().flatten(1)
    storage = storage or weight.dtype
    match asked.weights:
        case "lsq":
            return LsqWeight(weight, scheme, storage)
        case "dorefa":
            return DorefaWeight(weight, scheme, storage)
        case "binaryconnect":
            return BinaryConnectWeight(weight, scheme, storage, stochastic=asked.stochastic)
        case "bnn":
            return BinaryConnectWeight(weight, scheme, storage, masked=True)
        case "xnor":
            return XnorWeight(scheme, storage)
        case "twn":
            return TwnWeight(scheme, storage)
        case "learned_ternary":
            return LearnedTernaryWeight(weight, scheme, storage)
        case _:
            own = "minmax" if asked.range == "moving_average" else asked.range
            return MinMaxWeight(scheme, storage, range=own)


def input_estimator(asked: Preparation, scheme: TensorScheme | None) -> InputEstimator | None:
    """The estimator for the input of a layer, or None where it is left alone."""
    if asked.inputs == "sign":
        return SignInput(
            binary_scheme("tensor"), scaled=asked.weights == "xnor" and asked.input_scaling
        )
    if scheme is None:
        return None
    match asked.inputs:
        case "lsq":
            return LsqInput(scheme)
        case "pact":
            return PactInput(scheme, decay=asked.decay)
        case "moving_average":
            return MovingAverageInput(scheme, momentum=asked.momentum)
        case "observed":
            return ObservedInput(scheme, range=asked.range)
        case "dynamic":
            return DynamicInput(scheme)
        case _:
            return None
