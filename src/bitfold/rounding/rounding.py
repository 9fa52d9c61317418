"""What a way of rounding is."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.part import Part
from bitfold.statistics import InputStatistics

__all__ = ["Layer", "Rounded", "Rounding", "Stores"]


@dataclass(frozen=True)
class Layer:
    """A weight [out, in] to be rounded, and the limits [..., 1] of its groups, one after the other."""

    weight: Tensor
    limits: tuple[Tensor, Tensor]
    scheme: TensorScheme


@dataclass(frozen=True)
class Rounded:
    """What became of layers, by name; sentences that the user should read."""

    tensors: dict[str, QuantizedTensor]
    notes: list[str] = field(default_factory=list)


class Stores(Part):
    """What every rounding says before the first block. reads_limits: whether codes depend on the range."""

    reads_limits: ClassVar[bool] = True

    def stored_as(
        self, name: str, scheme: TensorScheme, shape: tuple[int, int], scale_dtype: torch.dtype
    ) -> TensorScheme:
        """What the weight [out, in] of layer `name` will be stored as, for which a recipe asks for `scheme`.

        Raises RecipeError where this rounding cannot make it.
        """
        if scheme.grid == "codebook":
            raise RecipeError(
                f"The codebook of {name} has to be learned: choose --method vq with a scheme such as w{scheme.bits}a16."
            )
        if scheme.grid == "shifted":
            raise RecipeError(
                f"The grid shifted of {name} is only read from others' files: quantize to int, which has zero-points "
                "that are integers, or to nf4."
            )
        if scheme.kept:
            raise RecipeError(
                f"The columns of {name} that are kept have to be chosen: use --method salient, and salient.share."
            )
        return scheme


class Rounding(Stores):
    """Makes the codes of weights once their limits are known."""

    @abstractmethod
    def solve(
        self,
        layers: Mapping[str, Layer],
        scale_dtype: torch.dtype,
        statistics: InputStatistics | None = None,
    ) -> Rounded:
        """Round layers that are given the same input.

        scale_dtype: in which the scales will be stored. statistics: what `needs` asks for, of that input as the
        quantized model sees it; None where it asks for nothing.
        """
