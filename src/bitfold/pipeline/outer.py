"""What stands outside the blocks: embeddings, final norm, and lm_head, which is quantized when a rule names it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bitfold.models.skeleton import Skeleton
from bitfold.numerics import QuantizedTensor, to_groups
from bitfold.pipeline.plan import HEAD, Plan
from bitfold.ranges import MinMax

__all__ = ["outer_tensors", "outer_weights"]


def _quantized_head(skeleton: Skeleton, plan: Plan) -> QuantizedTensor | None:
    """lm_head [vocabulary, hidden] rounded to nearest, or None where it is left alone."""
    scheme = plan.schemes[HEAD].weight if HEAD in plan.schemes else None
    if scheme is None:
        return None
    name = f"{HEAD}.weight"
    weight = skeleton.load_outer(torch.float32, [name])[name]
    # Its input is not among the statistics: a range that needs them falls back to min-max.
    chosen = plan.recipe.weight_range
    limits = (MinMax() if chosen.needs else chosen).limits(to_groups(weight, scheme), scheme)
    return QuantizedTensor.from_limits(weight, *limits, scheme, plan.storage)


def outer_tensors(
    skeleton: Skeleton, plan: Plan, learned: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What is stored of it, by full name; `learned` may hold tensors that take the place of some, and others."""
    tensors = skeleton.load_outer()
    head = _quantized_head(skeleton, plan)
    if head is not None:
        del tensors[f"{HEAD}.weight"]
        tensors |= plan.format.to_tensors(HEAD, head, plan.choice.formats[HEAD])
    new = {} if learned is None else learned
    return tensors | {name: new[name].to(tensors[name].device) for name in tensors if name in new}


def outer_weights(
    plan: Plan, stored: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the stored tensors are once loaded: the simulation, by full name."""
    if HEAD not in plan.schemes:
        return {name: value.to(dtype) for name, value in stored.items()}
    scheme = plan.schemes[HEAD].weight
    assert scheme is not None
    head = plan.format.from_tensors(HEAD, stored, scheme, plan.choice.formats[HEAD])
    weights = {n: value.to(dtype) for n, value in stored.items() if not n.startswith(f"{HEAD}.")}
    weights[f"{HEAD}.weight"] = head.dequantize(plan.unpacked_in or dtype).to(dtype)
    return weights
