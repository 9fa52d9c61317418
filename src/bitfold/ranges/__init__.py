"""Ways of choosing a range, one file each. A new one is a new file and a line here.

Each is a `Part` with `limits(groups, scheme, gram) → (minimum, maximum)`.
"""

from typing import Protocol

from torch import Tensor

from bitfold.numerics import TensorScheme
from bitfold.part import Part
from bitfold.ranges.kl import Kl
from bitfold.ranges.minmax import MinMax
from bitfold.ranges.mse import Mse
from bitfold.ranges.output_error import OutputError
from bitfold.ranges.percentile import Percentile

__all__ = ["RANGES", "Range"]


class Range(Protocol):
    """Chooses the limits [..., 1] of grouped values [..., g]."""

    def limits(
        self, groups: Tensor, scheme: TensorScheme, gram: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


RANGES: dict[str, type[Part]] = {
    "minmax": MinMax,
    "percentile": Percentile,
    "mse": Mse,
    "kl": Kl,
    "output_error": OutputError,
}
