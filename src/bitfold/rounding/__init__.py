"""Ways of rounding, one file each. A new one is a new file and a line here.

Each is a `Rounding`: `solve(layers, scale_dtype, statistics) → Rounded`, for the layers that are given the same input.
"""

from bitfold.rounding.gptq import Gptq
from bitfold.rounding.nearest import Nearest
from bitfold.rounding.qep import Qep
from bitfold.rounding.rounding import Layer, Rounded, Rounding

__all__ = ["ROUNDINGS", "Gptq", "Layer", "Nearest", "Qep", "Rounded", "Rounding"]

ROUNDINGS: dict[str, type[Rounding]] = {
    "nearest": Nearest,
    "gptq": Gptq,
    "qep": Qep,
}
