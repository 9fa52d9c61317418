"""MSE: the range of least mean power of the rounding error."""

from pydantic import Field
from torch import Tensor

from bitfold.numerics import TensorScheme
from bitfold.ranges.range import Range
from bitfold.ranges.search import search_shrinkage

__all__ = ["Mse"]


class Mse(Range):
    """Shrinks min-max to the step of least Σ|x̂ − x|^power."""

    smallest: float = Field(default=0.4, gt=0, lt=1)
    steps: int = Field(default=31, ge=2)
    power: float = Field(default=2.0, gt=0)

    def limits(
        self, groups: Tensor, scheme: TensorScheme, gram: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper limit [..., 1] of grouped values [..., g]."""

        def error(difference: Tensor) -> Tensor:
            return difference.abs_().pow_(self.power).sum(dim=-1, keepdim=True)

        return search_shrinkage(groups, scheme, error, smallest=self.smallest, steps=self.steps)
