"""Ways of rounding, one file each. A new one is a new file and a line here.

Each is a `Rounding`: `solve(layers, scale_dtype, statistics) → Rounded`, for the layers that are given the same input.
"""

from bitfold.rounding.gptaq import Gptaq
from bitfold.rounding.gptq import Gptq
from bitfold.rounding.nearest import Nearest
from bitfold.rounding.rounding import Layer, Rounded, Rounding

__all__ = ["ROUNDINGS", "Gptaq", "Gptq", "Layer", "Nearest", "Rounded", "Rounding"]

ROUNDINGS: dict[str, type[Rounding]] = {
    "nearest": Nearest,
    "gptq": Gptq,
    "gptaq": Gptaq,
}
