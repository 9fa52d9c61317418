"""What a user may ask for: a scheme, and the parts of a method (transforms, corrections, ranges, rounding and so on).

A recipe is checked whole before anything is read: unknown keys, options and methods are answered with the nearest
right one, combinations that make no sense with the reason.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from bitfold.checked import make
from bitfold.corrections import CORRECTIONS, Correction
from bitfold.distillation import DISTILLATIONS, Distillation
from bitfold.errors import RecipeError, did_you_mean
from bitfold.methods import AUTO, LISTS, compose, read_file, read_yaml
from bitfold.numerics import Scheme
from bitfold.part import Need, Part
from bitfold.ranges import RANGES, MinMax, Range
from bitfold.rounding import ROUNDINGS, BlockRounding, Nearest, Rounding
from bitfold.scheme_text import TENSORS, layer_rule, of_activations, scheme_of
from bitfold.transforms import TRANSFORMS, BlockTransform, SiteTransform, StreamTransform
from bitfold.transforms.reorder import Reorder
from bitfold.transforms.rotation import Rotation

__all__ = ["LayerRule", "Recipe"]

DEFAULT_SCHEME = "w4a16g128"
_SINGLE = ("weight_range", "activation_range", "rounding", "distillation")
_PARTS = (*LISTS, *_SINGLE, "stream", "activation")


def _part(kind: str, known: Mapping[str, type[Part]]) -> BeforeValidator:
    """Reads `name` or `{name: {option: value}}` as the part of that name."""

    def read(value: object) -> object:
        if isinstance(value, Part):
            return value
        name, options = (value, None) if isinstance(value, str) else _single_item(kind, value)
        if name not in known:
            raise RecipeError(f"Unknown {kind} '{name}': {did_you_mean(str(name), known)}.")
        return make(known[str(name)], f"The {kind} {name}", options or {})

    return BeforeValidator(read)


def _single_item(kind: str, value: object) -> tuple[object, Any]:
    if not isinstance(value, Mapping) or len(value) != 1:
        raise RecipeError(f"A {kind} is a name or one name with its options, not {value!r}.")
    return next(iter(value.items()))


def _named(known: Mapping[str, type[Part]]) -> PlainSerializer:
    names = {cls: name for name, cls in known.items()}
    return PlainSerializer(lambda part: {names[type(part)]: part.model_dump(mode="json")})


TransformPart = Annotated[
    SiteTransform | BlockTransform | StreamTransform,
    _part("transform", TRANSFORMS),
    _named(TRANSFORMS),
]
CorrectionPart = Annotated[Correction, _part("correction", CORRECTIONS), _named(CORRECTIONS)]
RangePart = Annotated[Range, _part("range", RANGES), _named(RANGES)]
RoundingPart = Annotated[Rounding | BlockRounding, _part("rounding", ROUNDINGS), _named(ROUNDINGS)]

DistillationPart = Annotated[
    Distillation, _part("distillation", DISTILLATIONS), _named(DISTILLATIONS)
]


class LayerRule(BaseModel):
    """Linear layers whose full name matches a pattern (`*.down_proj`) have a scheme of their own.

    lm_head is left alone unless a rule's pattern is exactly `lm_head`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: str
    scheme: Scheme


class Recipe(BaseModel):
    """Everything that determines an artifact, beside the checkpoint and the calibration text.

    method: its name, for people. scheme: of every linear layer; `layers`: rules for some, the last match wins;
    `ignore`: patterns of layers left alone. stream: which inputs the statistics are taken from, the original
    model's or those that the quantized blocks before give. distillation: what is done to the whole at the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "rtn"
    scheme: Scheme = Field(default_factory=lambda: Scheme.parse(DEFAULT_SCHEME))
    layers: tuple[LayerRule, ...] = ()
    ignore: tuple[str, ...] = ()
    transforms: tuple[TransformPart, ...] = ()
    corrections: tuple[CorrectionPart, ...] = ()
    weight_range: RangePart = MinMax()
    activation_range: RangePart = MinMax()
    rounding: RoundingPart = Nearest()
    distillation: DistillationPart | None = None
    stream: Literal["original", "quantized"] = "quantized"
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.activation_range.needs:
            raise ValueError(
                "the activation_range is chosen by what only weights have: choose minmax, percentile, mse or kl"
            )
        if any(isinstance(part, StreamTransform) for part in self.transforms[1:]):
            raise ValueError(
                "the stream is turned once, before everything else: put the rotation first, and only one"
            )
        if reason := self._senseless():
            raise ValueError(reason)
        return self

    def _senseless(self) -> str | None:
        """Why parts that are right each by itself make no sense together."""
        late = [*self.corrections, self.rounding]
        against = [_name(part) for part in late if "cross" in part.needs]
        if len(against) > 1:
            both = " and ".join(against)
            return f"{both} both make up for the errors of earlier layers, and would do so twice: choose one"
        if against and self.stream == "original":
            return (
                f"{against[0]} makes up for how the quantized model's inputs differ from the original's, and "
                "stream=original has it see the original's: leave one of the two out"
            )
        if not (self.rounding.reads_limits or isinstance(self.weight_range, MinMax)):
            return (
                f"{_name(self.rounding)} learns what values there are and reads no weight_range: "
                "leave it at minmax, or name the rounding last"
            )
        if isinstance(self.rounding, BlockRounding) and self.corrections:
            return (
                f"signround finds codes by the block's output, and {_name(self.corrections[0])} moves weights for "
                "codes found layer by layer: leave one of the two out"
            )
        return self._senseless_clusters()

    def _senseless_clusters(self) -> str | None:
        """Why clusters of channels, or their order, make no sense with the rest."""
        orders = [isinstance(part, Reorder) for part in self.transforms]
        if any(orders[:-1]):
            return (
                "reorder puts channels of a cluster together as the inputs are then, and "
                f"{_name(self.transforms[-1])} changes them afterwards: name rptq last"
            )
        trained = [part for part in (*self.transforms, self.rounding) if "loss" in part.needs]
        if trained and self.clusters_activations:
            return (
                f"{_name(trained[0])} trains with ranges that follow its own changes, and clusters of channels are "
                "found once nothing changes any more: leave one of the two out"
            )
        return None

    @property
    def stream_transform(self) -> StreamTransform | None:
        """What chooses the basis of the residual stream."""
        first = self.transforms[0] if self.transforms else None
        return first if isinstance(first, StreamTransform) else None

    @property
    def learned_rotation(self) -> Rotation | None:
        """The same where it is learned, before the first block."""
        first = self.stream_transform
        return first if isinstance(first, Rotation) and first.steps else None

    @classmethod
    def make(
        cls,
        method: str | None = None,
        scheme: str | None = None,
        *,
        file: Path | None = None,
        set: Sequence[str] = (),
        ignore: Sequence[str] = (),
        seed: int | None = None,
        effort: str | None = None,
    ) -> Self:
        """The recipe of a method and scheme, of a recipe file, or of a file with either overridden.

        set: `key=value` items; a key is a field of the recipe, `weight.symmetric` and the like for the scheme, or
        `<part>.<option>` for a part that the method has, for example `awq.steps=40`. effort: of `auto`, which is the
        method where neither method nor file is given: low, medium or high.

        Raises RecipeError with one sentence for anything that cannot be.
        """
        content: dict[str, Any] = {} if file is None else _of_file(file)
        overrides = dict(_override(item) for item in set)
        content |= {key[0]: value for key, value in overrides.items() if key in _FIELDS}
        if method and "method" in content:  # the file's parts are those of the file's method
            content = {key: value for key, value in content.items() if key not in _PARTS}
        names = method or content.get("method", AUTO if file is None else "rtn")
        in_schemes = {key: value for key, value in overrides.items() if key[0] in TENSORS}
        text = scheme or content.get("scheme", DEFAULT_SCHEME)
        fields = compose(names, scheme_of(text, {}), effort) | content
        of_method = of_activations(fields.pop("activation", {}))
        fields |= {"method": names, "scheme": scheme_of(text, in_schemes, of_method)}
        rules = _list(content, "layers")
        fields["layers"] = [layer_rule(rule, in_schemes, of_method) for rule in rules]
        fields["ignore"] = [*_list(content, "ignore"), *ignore]
        fields |= {slot: _list(fields, slot) for slot in LISTS}
        if seed is not None:
            fields["seed"] = seed
        for key, value in overrides.items():
            if key[0] not in TENSORS and key not in _FIELDS:
                _set_option(fields, key, value)
        recipe: Self = make(cls, "The recipe", fields)
        return recipe

    def scheme_for(self, layer: str) -> Scheme | None:
        """The scheme of a linear layer by its full name; None where it is ignored."""
        if any(fnmatchcase(layer, pattern) for pattern in self.ignore):
            return None
        matching = [rule.scheme for rule in self.layers if fnmatchcase(layer, rule.match)]
        return matching[-1] if matching else self.scheme

    def pins(self, layer: str) -> bool:
        """Whether a rule or `ignore` says what becomes of a linear layer, by its full name."""
        patterns = (*self.ignore, *(rule.match for rule in self.layers))
        return any(fnmatchcase(layer, pattern) for pattern in patterns)

    @property
    def part_names(self) -> list[str]:
        """Its parts in the order in which they act; a min-max range goes without saying."""
        every = (TRANSFORMS, CORRECTIONS, RANGES, ROUNDINGS, DISTILLATIONS)
        known: dict[type[Part], str] = {part: n for kind in every for n, part in kind.items()}
        parts: list[Part] = [*self.transforms, *self.corrections]
        if not isinstance(self.weight_range, MinMax):
            parts.append(self.weight_range)
        last = [] if self.distillation is None else [self.distillation]
        return [known[type(part)] for part in (*parts, self.rounding, *last)]

    @property
    def needs(self) -> frozenset[Need]:
        """What its parts ask of the block loop."""
        parts: list[Part] = [*self.transforms, *self.corrections, self.weight_range, self.rounding]
        parts += [] if self.distillation is None else [self.distillation]
        needs = frozenset[Need]().union(*(part.needs for part in parts))
        needs |= {"rows"} if self.calibrates_heads else set()
        return needs | ({"rows", "channels"} if self.calibrates_activations else set())

    @property
    def calibrates_activations(self) -> bool:
        """Whether an activation's range, or its global scale, has to be calibrated."""
        schemes = (self.scheme, *(rule.scheme for rule in self.layers))
        return any(s.activation is not None and s.activation.calibrated for s in schemes)

    @property
    def clusters_activations(self) -> bool:
        """Whether channels of some layer's input are in clusters."""
        schemes = (self.scheme, *(rule.scheme for rule in self.layers))
        return any(s.activation is not None and s.activation.clusters for s in schemes)

    @property
    def idle(self) -> str | None:
        """Why a part would do nothing, in a sentence."""
        if self.clusters_activations or not any(isinstance(t, Reorder) for t in self.transforms):
            return None
        return (
            f"The method {self.method} clusters the channels of inputs, and the scheme {self.scheme.notation} has none "
            "to cluster: quantize activations to integers, as in w4a4, or choose another method."
        )

    @property
    def calibrates_heads(self) -> bool:
        """Whether queries, keys or values need something of calibration text: a range, or codebooks."""
        schemes = (self.scheme, *(rule.scheme for rule in self.layers))
        parts = (part for s in schemes for part in (s.query, s.key, s.value) if part is not None)
        return any(part.static or part.grid == "codebook" for part in parts)

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is needed at all."""
        return bool(self.needs) or self.learned_rotation is not None

    def to_yaml(self) -> str:
        """The recipe in full, as it is stored in the artifact."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


_FIELDS = {(name,) for name in Recipe.model_fields}


def _name(part: Any) -> str:
    return type(part).__name__.lower()


def _of_file(file: Path) -> dict[str, Any]:
    content, known = read_file(file), [*Recipe.model_fields, "activation"]
    for key in content:
        if key not in known:
            raise RecipeError(
                f"{file} has an unknown key '{key}': {did_you_mean(str(key), known)}."
            )
    return content


def _list(fields: Mapping[str, Any], key: str) -> list[Any]:
    """A field of a recipe that is a list, or was left out."""
    value = fields.get(key) or []
    if not isinstance(value, list | tuple):
        raise RecipeError(
            f"The recipe's `{key}` is a list, not {value!r}: write one item a line, `- …`."
        )
    return list(value)


def _override(item: str) -> tuple[tuple[str, ...], Any]:
    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set takes key=value, not '{item}': write for example weight.symmetric=true."
        )
    try:
        return tuple(key.strip().split(".")), read_yaml(value)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(
            f"--set {item} has a value that YAML cannot read: write a number, true, false or a word."
        ) from error


def _set_option(fields: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    """Put a value at an option of a part the method has."""
    parts = {name: slot for slot, name in _parts_of(fields)}
    if len(key) == 2 and key[0] in parts:
        slot = parts[key[0]]
        if slot in LISTS:
            fields[slot] = [_with_option(part, key, value) for part in fields[slot]]
        else:
            fields[slot] = _with_option(fields[slot], key, value)
        return
    if key[0] in (*TRANSFORMS, *CORRECTIONS, *RANGES, *ROUNDINGS, *DISTILLATIONS):
        raise RecipeError(
            f"'{'.'.join(key)}' is an option of {key[0]}, which the method {fields['method']} does not have: "
            "choose another --method, or leave it out."
        )
    known = [
        *Recipe.model_fields,
        *(f"{t}.symmetric" for t in TENSORS),
        *(f"{name}.…" for name in parts),
    ]
    raise RecipeError(f"Unknown key '{'.'.join(key)}': {did_you_mean('.'.join(key), known)}.")


def _parts_of(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    slots = [(slot, fields.get(slot)) for slot in _SINGLE]
    slots += [(slot, part) for slot in LISTS for part in fields[slot]]
    return [
        (slot, part if isinstance(part, str) else next(iter(part))) for slot, part in slots if part
    ]


def _with_option(part: Any, key: tuple[str, ...], value: Any) -> Any:
    name, options = (part, {}) if isinstance(part, str) else next(iter(part.items()))
    if name != key[0]:
        return part
    return {name: (options or {}) | {key[1]: value}}
