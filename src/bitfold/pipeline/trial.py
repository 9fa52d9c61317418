"""Layers rounded by themselves, as sensitivities want them: the rest of the model is the original."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from bitfold.allocation import RoundedLayers, Rounder
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import TensorScheme
from bitfold.pipeline.hooks import run_for_inputs
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.round import limits_of
from bitfold.pipeline.streams import batches
from bitfold.recipe import Recipe
from bitfold.rounding import Gptq, Layer, Nearest, Rounded, Rounding
from bitfold.rounding.gptq import MomentRoot
from bitfold.statistics import InputStatistics

__all__ = ["trial_rounder", "trial_rounding"]


def trial_rounding(recipe: Recipe) -> Rounding:
    """What stands for the recipe's rounding: to nearest where it is that, else GPTQ, which takes less time than the
    others and knows, as they do, which errors the inputs forgive."""
    return Nearest() if isinstance(recipe.rounding, Nearest) else Gptq()


def trial_rounder(skeleton: Skeleton, plan: Plan) -> Rounder:
    """Rounds layers of a block by `trial_rounding` between limits of the recipe's range."""
    recipe, rounding = plan.recipe, trial_rounding(plan.recipe)
    needs = recipe.weight_range.needs | rounding.needs

    def statistics_of(
        index: int, weights: Mapping[str, Tensor], given: Tensor
    ) -> dict[str, InputStatistics]:
        inputs = [shared[0] for shared in skeleton.family.inputs] if needs else []
        found = {name: InputStatistics(needs, given.shape[0] * given.shape[1]) for name in inputs}
        receivers = {name: one.update for name, one in found.items()}
        for part in batches(given) if needs else ():
            run = partial(skeleton.run, index, weights, part.to(skeleton.device))
            run_for_inputs(skeleton.blocks[index], receivers, run)
        return found

    def of_block(index: int, weights: Mapping[str, Tensor], given: Tensor) -> RoundedLayers:
        statistics = statistics_of(index, weights, given)
        factors: dict[str, MomentRoot] = {}

        def solved(layers: Mapping[str, Layer], given_to: str) -> Rounded:
            if not isinstance(rounding, Gptq):
                return rounding.solve(layers, plan.storage, statistics.get(given_to))
            gram = statistics[given_to].gram
            if given_to not in factors:  # all candidates have the same
                factors[given_to] = rounding.root_of(gram)
            return rounding.solve_with(layers, plan.storage, gram, factor=factors[given_to])

        def rounded(names: Sequence[str], scheme: TensorScheme) -> dict[str, Tensor]:
            values: dict[str, Tensor] = {}
            for shared in skeleton.family.inputs:
                seen = statistics.get(shared[0])
                layers = {}
                for name in shared:
                    if name in names:
                        weight = weights[f"{name}.weight"].float()
                        limits = limits_of(weight, scheme, recipe, seen, None)
                        layers[name] = Layer(weight, limits, scheme)
                if layers:
                    tensors = solved(layers, shared[0]).tensors
                    dtype = weights[f"{shared[0]}.weight"].dtype
                    values |= {name: t.dequantize(dtype) for name, t in tensors.items()}
            return values

        return rounded

    return of_block
