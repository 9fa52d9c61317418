"""Cross-layer equalization (Nagel et al. 2019, arXiv 1906.04721, section 4.1).

One more site of the algebra: a ReLU commutes with a positive diagonal, so between two layers

    W₁' = S⁻¹ W₁,  b₁' = S⁻¹ b₁,  W₂' = W₂ S,    s_i = √(r₁_i r₂_i) / r₂_i

leave what the network computes. r₁_i is the range max|w| of the first layer's row i, r₂_i of what the second reads of
channel i; both then are √(r₁_i r₂_i), which one scale for the whole layer suits best. Pairs are gone through until the
factors are 1.
"""

import torch
from torch import Tensor, nn

from bitfold.training.graph import Pair, pairs

__all__ = ["equalize"]

_PASSES = 20
_CLOSE = 1e-3
_LAYERS = (nn.Conv2d, nn.Linear)


@torch.no_grad()
def equalize(model: nn.Module) -> list[tuple[str, str]]:
    """Balance the ranges of every two `nn.Conv2d` or `nn.Linear` with nothing but ReLU, pooling, dropout or a
    flattening between them, in place; returns their names. Fold batch norms before. The model computes what it did.

    Raises FamilyError for a model that cannot be traced.
    """
    found = [pair for pair in pairs(model, _LAYERS, _LAYERS, direct=False) if _fits(model, pair)]
    for _ in range(_PASSES):
        farthest = [_balance(model, pair) for pair in found]
        if all(one < _CLOSE for one in farthest):
            break
    return [(pair.first, pair.second) for pair in found]


def _fits(model: nn.Module, pair: Pair) -> bool:
    """Whether every channel of the first is read by columns of its own: not by grouped convolutions."""
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    if isinstance(second, nn.Conv2d) and (second.groups != 1 or pair.flattened):
        return False
    behind = isinstance(second, nn.Linear) and isinstance(first, nn.Conv2d)
    if behind and not pair.flattened:
        return False
    weight = second.get_parameter("weight")
    return weight.shape[1] % first.get_parameter("weight").shape[0] == 0


def _balance(model: nn.Module, pair: Pair) -> float:
    """Balance one pair; returns how far the factors were from 1."""
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    weight, reader = first.get_parameter("weight"), second.get_parameter("weight")
    by_channel = _by_channel(reader, len(weight))
    own = weight.double().flatten(1).abs().amax(dim=1)
    read = by_channel.double().abs().amax(dim=(0, 2))
    used = (own > 0) & (read > 0)
    factor = torch.where(used, torch.sqrt(own * read) / read, torch.ones_like(own))
    weight.copy_(weight.double() / factor.view(-1, *[1] * (weight.dim() - 1)))
    if getattr(first, "bias", None) is not None:
        bias = first.get_parameter("bias")
        bias.copy_(bias.double() / factor)
    by_channel.copy_(by_channel.double() * factor[:, None])
    return float((factor - 1).abs().max())


def _by_channel(reader: Tensor, channels: int) -> Tensor:
    """A view [out, channels, what is read of each] of the weight that reads so many channels."""
    return reader.view(len(reader), channels, -1)
