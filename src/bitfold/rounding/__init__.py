"""Ways of rounding, one file each. A new one is a new file and a line here.

Each is a `Rounding`: `solve(layers, scale_dtype, statistics) → Rounded`, for the layers that are given the same input;
or a `BlockRounding`: `solve_block(layers, scale_dtype, block) → Rounded`, for all layers of a block, by its loss.
"""

from bitfold.rounding.block_rounding import BlockLoss, BlockRounding
from bitfold.rounding.gptaq import Gptaq
from bitfold.rounding.gptq import Gptq
from bitfold.rounding.nearest import Nearest
from bitfold.rounding.qronos import Qronos
from bitfold.rounding.quantease import Quantease
from bitfold.rounding.rounding import Layer, Rounded, Rounding, Stores
from bitfold.rounding.salient import Salient
from bitfold.rounding.signround import Signround
from bitfold.rounding.vq import Vq

__all__ = [
    "ROUNDINGS",
    "BlockLoss",
    "BlockRounding",
    "Gptaq",
    "Gptq",
    "Layer",
    "Nearest",
    "Qronos",
    "Quantease",
    "Rounded",
    "Rounding",
    "Salient",
    "Signround",
    "Stores",
    "Vq",
]

ROUNDINGS: dict[str, type[Rounding | BlockRounding]] = {
    "nearest": Nearest,
    "gptq": Gptq,
    "gptaq": Gptaq,
    "qronos": Qronos,
    "quantease": Quantease,
    "salient": Salient,
    "signround": Signround,
    "vq": Vq,
}
