"""What was trained outside the pipeline, and takes the place of what the pipeline rounds."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitfold.errors import FamilyError
from bitfold.export.artifact import tensor_sums
from bitfold.numerics import QuantizedTensor
from bitfold.pipeline.job import Job

__all__ = ["Taught", "stored_tensors"]


@dataclass(frozen=True)
class Taught:
    """weights: of linear layers, by full name, in the schemes of the recipe. plain: other tensors that changed (norms,
    biases), by full name. entry: what the report says of it; `note` is a sentence, `trained` counts by kind."""

    weights: Mapping[str, QuantizedTensor]
    plain: Mapping[str, Tensor]
    entry: Mapping[str, Any]

    def request(self, before: str) -> str:
        """The hash of a request that all this belongs to."""
        tensors = {f"{name}.codes": one.codes for name, one in self.weights.items()}
        tensors |= {f"{name}.scale": one.scale for name, one in self.weights.items()}
        zeros = {f"{n}.zero": t.zero for n, t in self.weights.items() if t.zero is not None}
        sums = tensor_sums(tensors | zeros | dict(self.plain))
        return hashlib.sha256(repr((before, sorted(sums.items()))).encode()).hexdigest()


def stored_tensors(job: Job, taught: Taught) -> dict[str, Tensor]:
    """What is stored of it, by full name.

    Raises FamilyError where a layer that the recipe quantizes was not trained, or in another scheme.
    """
    plan, stored = job.plan, dict(taught.plain)
    for name in plan.schemes:
        wanted = plan.stored_weight(name)
        if wanted is None:
            continue
        tensor = taught.weights.get(name)
        if tensor is None or tensor.scheme != wanted:
            found = (
                "was not trained"
                if tensor is None
                else f"was trained as {tensor.scheme.describe()}"
            )
            raise FamilyError(
                f"{name} is to be {wanted.describe()}, and {found}: train it in the recipe's scheme."
            )
        if tensor.scale.dtype != plan.storage:
            raise FamilyError(
                f"{name} was trained with scales in {tensor.scale.dtype}, and the checkpoint stores {plan.storage}: "
                "train it in that."
            )
        stored |= plan.format.to_tensors(name, tensor, plan.choice.formats[name])
    return {name: value.cpu().contiguous() for name, value in stored.items()}
