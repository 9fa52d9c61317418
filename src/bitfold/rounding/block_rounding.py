"""What a way of rounding a whole block is, by its loss."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.rounding.rounding import Layer, Rounded, Stores

__all__ = ["BlockLoss", "BlockRounding"]


@dataclass(frozen=True)
class BlockLoss:
    """How well a block does with rounded weights.

    loss(weights, windows, low): relative squared error of the block's output with these weights [out, in] by layer on
    the calibration windows of these indices; differentiable; `low` runs its matrix products in bfloat16. windows: how
    many there are. seed: of everything drawn. report(done, total, what): progress. low_is_quick: whether that takes
    less time where it runs; on a CPU without instructions for bfloat16 it takes a hundred times as long.
    """

    loss: Callable[[Mapping[str, Tensor], Tensor, bool], Tensor]
    windows: int
    seed: int
    report: Callable[[int, int, str], None]
    low_is_quick: bool = True


class BlockRounding(Stores):
    """Makes the codes of all weights of a block together, once their limits are known."""

    @abstractmethod
    def solve_block(
        self, layers: Mapping[str, Layer], scale_dtype: torch.dtype, block: BlockLoss
    ) -> Rounded:
        """Codes of the layers; never of a larger loss than nearest's on the windows that are checked.

        scale_dtype: in which the scales will be stored.
        """
