"""The plan: everything that can be decided before the first calibration step, and the checks that go with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from bitfold.errors import RecipeError, did_you_mean
from bitfold.export import Choice, Format, Layout, choose_format
from bitfold.export.layout import AttentionEntry, LayerEntry
from bitfold.models.family import Site, head_counts
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import CodebookShape, MapShape, Scheme, TensorScheme
from bitfold.pipeline.online import OnlineCost, online_cost, online_maps
from bitfold.recipe import Recipe
from bitfold.transforms import Heads

__all__ = ["HEAD", "Plan", "make_plan"]

HEAD = "lm_head"


@dataclass(frozen=True)
class Plan:
    """What will be done to each layer, and how it will be said on disk.

    schemes: full name of every linear layer of the blocks, and of lm_head where a rule names it → its scheme, as it was
    asked for; an ignored one has a scheme of Nones. What the rounding makes of it stands in the layout.
    attention: full name of every attention module → its scheme.
    storage: dtype of the checkpoint's floating tensors, in which scales and rewritten norms are stored.
    online: what the matrices cost that the recipe leaves to run; None where everything is folded.
    """

    recipe: Recipe
    schemes: Mapping[str, Scheme]
    attention: Mapping[str, Scheme]
    sites: tuple[Site, ...]
    heads: Heads
    storage: torch.dtype
    layout: Layout
    format: Format
    choice: Choice
    online: OnlineCost | None
    notes: tuple[str, ...] = field(default=())

    def stored_weight(self, name: str) -> TensorScheme | None:
        """How the weight of a linear layer is stored; None where it is left alone."""
        entry = self.layout.linears.get(name)
        return None if entry is None else entry.scheme.weight

    @property
    def unpacked_in(self) -> torch.dtype | None:
        """Where the format has loaders unpack weights at once, they do it in the dtype of the scales."""
        return self.storage if self.choice.dequantize else None

    def block_schemes(self, prefix: str) -> dict[str, Scheme]:
        """The schemes of one block's linear layers, by name relative to the block."""
        start = prefix + "."
        return {n.removeprefix(start): s for n, s in self.schemes.items() if n.startswith(start)}

    def block_maps(self, prefix: str) -> dict[str, MapShape]:
        """The maps that run in one block, by the name of the module at which they do, relative to the block."""
        start = prefix + "."
        maps = self.layout.online.items()
        return {name.removeprefix(start): shape for name, shape in maps if name.startswith(start)}


def make_plan(skeleton: Skeleton, recipe: Recipe) -> Plan:
    """Hold a recipe against a network.

    Raises RecipeError, naming layer, shape and option, for a group size that does not divide, a pattern that matches
    nothing, rules that contradict each other, or a recipe that quantizes nothing or has a part that does nothing.
    """
    if recipe.idle:
        raise RecipeError(recipe.idle)
    names = _linear_names(skeleton)
    _check_patterns(recipe, list(names))
    schemes = {name: recipe.scheme_for(name) or Scheme() for name in names}
    head = _head_scheme(skeleton, recipe)
    if head is not None:
        schemes[HEAD], names[HEAD] = head, _in_features(skeleton.model, HEAD)
    for name, scheme in schemes.items():
        _check_layer(name, names[name], scheme, recipe)
    attention = _attention_schemes(skeleton, schemes)
    if all(scheme == Scheme() for scheme in [*schemes.values(), *attention.values()]):
        raise RecipeError(
            f"The recipe quantizes nothing (scheme {recipe.scheme.notation}, ignore {list(recipe.ignore)}): "
            "choose fewer bits, or ignore less."
        )
    online = online_maps(skeleton, recipe, attention)
    storage = _storage_dtype(skeleton)
    stored = {
        name: _as_stored(skeleton, name, scheme, recipe, storage)
        for name, scheme in schemes.items()
    }
    layout = _layout(skeleton, stored, attention, names, online, storage)
    format, choice, notes = choose_format(layout)
    heads = Heads(*head_counts(skeleton.config))
    return Plan(
        recipe=recipe,
        schemes=schemes,
        attention=attention,
        sites=skeleton.family.sites(skeleton.config),
        heads=heads,
        storage=storage,
        layout=layout,
        format=format,
        choice=choice,
        online=online_cost(skeleton, online, storage),
        notes=notes + _notes_on_values(attention, storage),
    )


def _linear_names(skeleton: Skeleton) -> dict[str, int]:
    """Full name → number of inputs of every linear layer of the blocks."""
    return {
        f"{skeleton.block_name(index)}.{name}": _in_features(block, name)
        for index, block in enumerate(skeleton.blocks)
        for name in skeleton.family.linears
    }


def _in_features(block: torch.nn.Module, name: str) -> int:
    linear = block.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear)
    return linear.in_features


def _check_patterns(recipe: Recipe, names: list[str]) -> None:
    patterns = [("ignore", pattern) for pattern in recipe.ignore]
    patterns += [("layers", rule.match) for rule in recipe.layers]
    for where, pattern in patterns:
        # A rule means lm_head only where it says so: `*` is every layer of the blocks.
        if pattern == HEAD or any(fnmatchcase(name, pattern) for name in names):
            continue
        leaves = [HEAD, *{f"*.{name.rpartition('.')[2]}" for name in names}]
        raise RecipeError(
            f"The pattern '{pattern}' in {where} matches no linear layer of the model: "
            f"{did_you_mean(pattern, leaves)}."
        )


def _check_layer(name: str, inputs: int, scheme: Scheme, recipe: Recipe) -> None:
    """Groups that do not divide the inputs, and a range that cannot be had of such a weight."""
    _check_group("Group size", scheme.weight, f"the {inputs} inputs of {name}", inputs)
    _check_group(
        "The activation's group size", scheme.activation, f"the {inputs} inputs of {name}", inputs
    )
    clusters = scheme.activation.clusters if scheme.activation else None
    if clusters and clusters > inputs:
        raise RecipeError(
            f"{clusters} clusters are more than the {inputs} inputs of {name} have channels: choose fewer "
            "(activation.clusters), or give that layer its own scheme."
        )
    weight = scheme.weight
    if weight is not None and weight.scales == "blocks" and inputs % 256:
        raise RecipeError(
            f"Scales in blocks are for 256 inputs, and {inputs} of {name} are no multiple: set weight.scales=half, or "
            "give that layer its own scheme."
        )
    if (
        weight is not None
        and weight.granularity == "tensor"
        and "gram" in recipe.weight_range.needs
    ):
        raise RecipeError(
            f"The weight range of {recipe.method} is chosen by the error on the outputs, row by row, and the weight of "
            f"{name} has one scale for all: choose another weight_range, such as mse, or weight.granularity=channel."
        )


def _check_group(what: str, part: TensorScheme | None, where: str, size: int) -> None:
    group = part.group_size if part else None
    if group and size % group:
        fitting = [g for g in (128, 64, 32, 16, 8, 4, 2) if size % g == 0]
        remedy = f"use a divisor such as g{fitting[0]}" if fitting else "leave the group out"
        if part is not None and part.fp4:
            remedy = f"{part.grid} has no other, so choose another grid"
        raise RecipeError(
            f"{what} {group} does not divide {where}: {remedy}, or give that layer its own scheme."
        )


def _head_scheme(skeleton: Skeleton, recipe: Recipe) -> Scheme | None:
    """The scheme of lm_head, None unless a rule in `layers` matches exactly `lm_head`.

    Raises RecipeError where it is tied to the embedding, or asked for more than weights.
    """
    rules = [rule.scheme for rule in recipe.layers if rule.match == HEAD]
    if not rules or rules[-1].weight is None:
        return None
    if skeleton.ties_head:
        raise RecipeError(
            "lm_head is tied to the embedding in this model, so that quantizing it would store it twice: "
            "remove the rule for lm_head."
        )
    if rules[-1] != Scheme(weight=rules[-1].weight):
        raise RecipeError(
            f"Only the weight of lm_head can be quantized: write a scheme such as w{rules[-1].weight.bits}a16."
        )
    return rules[-1]


def _as_stored(
    skeleton: Skeleton, name: str, scheme: Scheme, recipe: Recipe, storage: torch.dtype
) -> Scheme:
    """The scheme of a layer with what the rounding makes of its weight's; lm_head is rounded to nearest."""
    if scheme.weight is None or name == HEAD:
        return scheme
    linear = skeleton.model.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear)
    shape = (linear.out_features, linear.in_features)
    weight = recipe.rounding.stored_as(name, scheme.weight, shape, storage)
    return scheme.model_copy(update={"weight": weight})


def _attention_schemes(skeleton: Skeleton, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """q, k and v are quantized in the attention, so its projections must agree on them."""
    result: dict[str, Scheme] = {}
    family = skeleton.family
    head_dim = head_counts(skeleton.config)[2]
    for index in range(len(skeleton.blocks)):
        name = f"{skeleton.block_name(index)}.{family.attention}"
        parts = [
            Scheme(query=s.query, key=s.key, value=s.value)
            for s in (
                schemes[f"{skeleton.block_name(index)}.{linear}"] for linear in family.inputs[0]
            )
        ]
        wanted = [part for part in parts if part != Scheme()]
        if any(part != wanted[0] for part in wanted):
            raise RecipeError(
                f"The q, k and v projections of {name} ask for different query, key or value schemes: "
                "give them one."
            )
        result[name] = _with_codebook(wanted[0] if wanted else Scheme(), skeleton)
        for tensor in ("query", "key", "value"):
            _check_group(
                f"The {tensor}'s group size",
                getattr(result[name], tensor),
                f"the {head_dim} dimensions of a head of {name}",
                head_dim,
            )
    return result


def _with_codebook(scheme: Scheme, skeleton: Skeleton) -> Scheme:
    """The scheme of an attention with the size of its values' codebook, where it has one: as many dimensions share a
    code as 8 bits allow."""
    value = scheme.value
    if value is None or value.grid != "codebook":
        return scheme
    heads = Heads(*head_counts(skeleton.config))
    dim = next(d for d in range(8 // value.bits, 0, -1) if heads.size % d == 0)
    books = heads.keys * heads.size // dim
    shape = CodebookShape(dim=dim, entries=2 ** (value.bits * dim), books=books)
    return scheme.model_copy(update={"value": value.model_copy(update={"codebook": shape})})


def _notes_on_values(attention: Mapping[str, Scheme], storage: torch.dtype) -> tuple[str, ...]:
    """What values take that have codebooks."""
    shapes = {s.value.codebook for s in attention.values() if s.value and s.value.codebook}
    return tuple(
        f"values take {shape.code_bits / shape.dim:g} bits each, without scales: codes of {shape.code_bits} bits for "
        f"{shape.dim} dimensions of a head; their codebooks take {shape.numbers * storage.itemsize:,} bytes a layer"
        for shape in shapes
    )


def _layout(
    skeleton: Skeleton,
    schemes: Mapping[str, Scheme],
    attention: Mapping[str, Scheme],
    inputs: Mapping[str, int],
    online: Mapping[str, MapShape],
    storage: torch.dtype,
) -> Layout:
    head_dim = head_counts(skeleton.config)[2]
    quantized = {
        name: scheme
        for name, scheme in schemes.items()
        if scheme.weight is not None or scheme.activation is not None
    }
    others = {
        name
        for name, module in skeleton.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in quantized
    }
    return Layout(
        linears={name: LayerEntry(scheme, inputs[name]) for name, scheme in quantized.items()},
        attention={
            name: AttentionEntry(
                scheme, head_dim, type(skeleton.model.get_submodule(name)).__name__
            )
            for name, scheme in attention.items()
        },
        unquantized=sorted(others),
        flattened_inputs=skeleton.family.flattened_inputs,
        online=online,
        storage=storage,
    )


def _storage_dtype(skeleton: Skeleton) -> torch.dtype:
    """The dtype that most of the blocks' weights are stored in."""
    infos = skeleton.checkpoint.tensors
    name = skeleton.sources[f"{skeleton.block_name(0)}.{skeleton.family.linears[0]}.weight"]
    return infos[name].dtype
