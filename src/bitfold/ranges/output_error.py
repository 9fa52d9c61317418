"""Output error: the range of least error on the layer's own output (AWQ's clip search, arXiv 2306.00978)."""

import torch
from pydantic import Field
from torch import Tensor

from bitfold.numerics import TensorScheme
from bitfold.part import Need
from bitfold.ranges.range import Range
from bitfold.ranges.search import search_shrinkage

__all__ = ["OutputError"]


class OutputError(Range):
    """Shrinks min-max to the step of least ‖ΔW_g X_gᵀ‖² per row and group g.

    With the inputs' second moment G = E[xxᵀ] the error of a group is δ G_gg δᵀ, where G_gg is the group's diagonal
    block: no pass over the inputs is needed.
    """

    needs = frozenset[Need]({"gram"})

    smallest: float = Field(default=0.5, gt=0, lt=1)
    steps: int = Field(default=21, ge=2)

    def limits(
        self, groups: Tensor, scheme: TensorScheme, gram: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper limit [out, groups, 1] of a weight [out, groups, g], given gram [in, in]."""
        assert gram is not None
        assert groups.ndim == 3, "a range by output error is for weights with a scale per row"
        _, count, size = groups.shape
        blocks = torch.stack(
            [gram[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)]
        ).to(groups.dtype)

        def error(difference_ogi: Tensor) -> Tensor:
            by_group = difference_ogi.transpose(0, 1)  # [groups, out, g]
            errors = ((by_group @ blocks) * by_group).sum(dim=-1)
            return errors.T.unsqueeze(-1)

        return search_shrinkage(groups, scheme, error, smallest=self.smallest, steps=self.steps)
