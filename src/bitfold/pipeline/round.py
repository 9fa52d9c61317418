"""Rounding a block: ranges and codes of its weights, in the order in which the block uses them."""

from collections.abc import Mapping

from torch import Tensor

from bitfold.models.skeleton import Skeleton
from bitfold.numerics import QuantizedTensor, TensorScheme, to_groups
from bitfold.part import Need
from bitfold.pipeline.hooks import InputQuantizer
from bitfold.pipeline.measure import input_statistics
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.streams import Streams
from bitfold.recipe import Recipe
from bitfold.rounding import Layer
from bitfold.statistics import InputStatistics
from bitfold.transforms.block_transform import Clipping

__all__ = ["round_block"]


def round_block(
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    streams: Streams,
    folded: Mapping[str, Tensor],
    inputs: Mapping[str, InputQuantizer],
    clipping: Mapping[str, Clipping],
) -> tuple[dict[str, QuantizedTensor], list[str]]:
    """Codes of the block's weights by layer, and what the user should read.

    Layers with the same input are solved together, in the order of the family's `inputs`. Statistics are of what the
    layers multiply, inputs quantized; where a correction or the rounding asks for them, layers before are rounded too,
    at the price of a pass for every input.
    """
    recipe = plan.recipe
    schemes = plan.block_schemes(skeleton.block_name(index))
    late = (*recipe.corrections, recipe.rounding)
    sequential = frozenset[Need]().union(*(part.needs for part in late))
    needs = recipe.weight_range.needs | sequential
    weights = dict(folded)

    def measure(*names: str) -> dict[str, InputStatistics]:
        return input_statistics(
            skeleton, index, plan, weights, streams, needs,
            inputs=inputs, original=folded, names=names,
        )  # fmt: skip

    at_once = {} if sequential else measure(*(one[0] for one in skeleton.family.inputs))
    found: dict[str, QuantizedTensor] = {}
    notes: list[str] = []
    for shared in skeleton.family.inputs:
        rounded = {name: scheme for name in shared if (scheme := schemes[name].weight) is not None}
        if not rounded:
            continue
        statistics = at_once.get(shared[0]) or measure(shared[0]).get(shared[0])
        layers = {}
        for name, scheme in rounded.items():
            weight = folded[f"{name}.weight"].float()
            for correction in recipe.corrections:
                assert statistics is not None
                weight = correction.apply(weight, scheme, statistics)
            limits = _limits(weight, scheme, recipe, statistics, clipping.get(name))
            layers[name] = Layer(weight, limits, scheme)
        result = recipe.rounding.solve(layers, plan.storage, statistics)
        found |= result.tensors
        notes += result.notes
        for name, tensor in result.tensors.items():
            key, dtype = f"{name}.weight", folded[f"{name}.weight"].dtype
            weights[key] = tensor.dequantize(plan.unpacked_in or dtype).to(dtype)
    return {name: found[name] for name in schemes if name in found}, notes


def _limits(
    weight: Tensor,
    scheme: TensorScheme,
    recipe: Recipe,
    statistics: InputStatistics | None,
    clipping: Clipping | None,
) -> tuple[Tensor, Tensor]:
    """The limits of a weight's groups: learned with the transforms, or by the recipe's range."""
    groups = to_groups(weight, scheme)
    if clipping is None:
        chosen = recipe.weight_range
        gram = None if statistics is None or "gram" not in chosen.needs else statistics.gram
        return chosen.limits(groups, scheme, gram)
    minimum, maximum = groups.aminmax(dim=-1, keepdim=True)
    return minimum * clipping.lower.to(minimum), maximum * clipping.upper.to(maximum)
