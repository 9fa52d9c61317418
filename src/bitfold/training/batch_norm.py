"""Batch norms folded into the layers before them: BN(W x + b) = (γ/σ) W x + (b − μ) γ/σ + β."""

import torch
from torch import nn

from bitfold.errors import FamilyError
from bitfold.training.graph import pairs
from bitfold.training.layers import Prepared

__all__ = ["fold_batch_norms"]


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> list[str]:
    """Fold every batch norm that directly follows a `nn.Conv2d` or `nn.Linear` into it, in place, by its running
    statistics; an `nn.Identity` stays in its place. Returns the names of the layers that took one.

    The model then computes what it did in `eval`. Fold before `prepare`: for PTQ, or to train without batch norms.

    Raises FamilyError for a model that cannot be traced, is prepared, or whose batch norms keep no statistics.
    """
    if any(isinstance(module, Prepared) for module in model.modules()):
        raise FamilyError("The model is prepared already: fold batch norms before.")
    found = pairs(model, (nn.Conv2d, nn.Linear), (nn.BatchNorm1d, nn.BatchNorm2d), direct=True)
    for pair in found:
        layer, norm = model.get_submodule(pair.first), model.get_submodule(pair.second)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        _fold(pair.second, layer, norm)
        model.set_submodule(pair.second, nn.Identity())
    return [pair.first for pair in found]


def _fold(name: str, layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise FamilyError(
            f"The batch norm {name} keeps no running statistics: it depends on its batch, and cannot be folded."
        )
    # In float64: what is folded should not round twice.
    factor = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    dtype = layer.weight.dtype
    if layer.bias is not None:
        shift = shift + layer.bias.double() * factor
    by_row = factor.view(-1, *[1] * (layer.weight.dim() - 1))
    layer.weight.copy_((layer.weight.double() * by_row).to(dtype))
    layer.bias = nn.Parameter(shift.to(dtype))
