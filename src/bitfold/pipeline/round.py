"""Rounding a block: ranges and codes of its weights, in the order in which the block uses them."""

from collections.abc import Callable, Mapping

from torch import Tensor

from bitfold.models.skeleton import Skeleton
from bitfold.numerics import QuantizedTensor, TensorScheme, sharing_global_scale, to_groups
from bitfold.part import Need
from bitfold.pipeline.hooks import InputQuantizer
from bitfold.pipeline.measure import input_statistics
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.problem import block_problem
from bitfold.pipeline.streams import Streams
from bitfold.recipe import Recipe
from bitfold.rounding import BlockLoss, BlockRounding, Layer, Nearest
from bitfold.statistics import InputStatistics
from bitfold.transforms.block_transform import Clipping

__all__ = ["limits_of", "round_block"]


def round_block(
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    streams: Streams,
    folded: Mapping[str, Tensor],
    inputs: Mapping[str, InputQuantizer],
    clipping: Mapping[str, Clipping],
    report: Callable[[int, int, str], None],
) -> tuple[dict[str, QuantizedTensor], list[str]]:
    """Codes of the block's weights by layer, and what the user should read.

    Layers with the same input are solved together, in the order of the family's `inputs`. Statistics are of what the
    layers multiply, inputs quantized; where a correction or the rounding asks for them, layers before are rounded too,
    at the price of a pass for every input. A rounding by the block's loss takes all layers at the end.
    """
    recipe, rounding = plan.recipe, plan.recipe.rounding
    schemes = plan.block_schemes(skeleton.block_name(index))
    late = (*recipe.corrections, rounding)
    sequential = frozenset[Need]().union(*(part.needs for part in late)) - {"loss"}
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
    waiting: dict[str, Layer] = {}
    for shared in skeleton.family.inputs:
        rounded = {name: scheme for name in shared if (scheme := schemes[name].weight) is not None}
        if not rounded:
            continue
        statistics = at_once.get(shared[0]) or measure(shared[0]).get(shared[0])
        layers = {
            name: _layer(folded[f"{name}.weight"], scheme, recipe, statistics, clipping.get(name))
            for name, scheme in rounded.items()
        }
        if isinstance(rounding, BlockRounding):
            waiting |= layers
            result = Nearest().solve(layers, plan.storage)
        else:
            result = rounding.solve(layers, plan.storage, statistics)
            notes += result.notes
        tensors = sharing_global_scale(result.tensors)
        found |= tensors
        for name, tensor in tensors.items():
            key, dtype = f"{name}.weight", folded[f"{name}.weight"].dtype
            weights[key] = tensor.dequantize(plan.unpacked_in or dtype).to(dtype)
    if isinstance(rounding, BlockRounding):
        loss = _block_loss(skeleton, index, plan, folded, inputs, streams, report)
        result = rounding.solve_block(waiting, plan.storage, loss)
        found, notes = result.tensors, result.notes
    return {name: found[name] for name in schemes if name in found}, notes


def _block_loss(
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    folded: Mapping[str, Tensor],
    inputs: Mapping[str, InputQuantizer],
    streams: Streams,
    report: Callable[[int, int, str], None],
) -> BlockLoss:
    """The error of the block's output to the original's, as a function of its rounded weights."""
    problem = block_problem(skeleton, index, plan, folded, streams, report, inputs)

    def loss(rounded: Mapping[str, Tensor], windows: Tensor, low: bool) -> Tensor:
        weights = dict(folded) | {f"{name}.weight": value for name, value in rounded.items()}
        return problem.loss(weights, windows, "original", low)

    return BlockLoss(loss, problem.windows, problem.seed, report, problem.low_is_quick)


def _layer(
    weight: Tensor,
    scheme: TensorScheme,
    recipe: Recipe,
    statistics: InputStatistics | None,
    clipping: Clipping | None,
) -> Layer:
    """A weight, corrected, and its limits."""
    weight = weight.float()
    for correction in recipe.corrections:
        assert statistics is not None
        weight = correction.apply(weight, scheme, statistics)
    return Layer(weight, limits_of(weight, scheme, recipe, statistics, clipping), scheme)


def limits_of(
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
