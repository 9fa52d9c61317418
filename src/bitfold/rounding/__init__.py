"""Ways of rounding, one file each. A new one is a new file and a line here.

Each is a `Rounding`: `solve(weight, limits, scheme, scale_dtype, gram) → QuantizedTensor`.
"""

from bitfold.rounding.nearest import Nearest
from bitfold.rounding.rounding import Rounding

__all__ = ["ROUNDINGS", "Nearest", "Rounding"]

ROUNDINGS: dict[str, type[Rounding]] = {
    "nearest": Nearest,
}
