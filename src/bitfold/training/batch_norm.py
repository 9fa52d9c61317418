"""Batch norms folded into the layers before them: BN(W x + b) = (γ/σ) W x + (b − μ) γ/σ + β; and estimated anew.

Before `prepare` they go into the weights; behind `convert` into scales and biases, and no code changes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bitfold.errors import DataError, FamilyError
from bitfold.runtime.quantized_conv2d import QuantizedConv2d
from bitfold.runtime.quantized_linear import QuantizedLinear
from bitfold.runtime.xnor_layers import XnorConv2d, XnorLinear
from bitfold.training.graph import pairs
from bitfold.training.layers import Prepared

__all__ = ["estimate_batch_norms", "fold_batch_norms"]

_PLAIN = (nn.Conv2d, nn.Linear)
_SIGNED = (XnorConv2d, XnorLinear)
_CODED = (QuantizedConv2d, QuantizedLinear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> list[str]:
    """Fold every batch norm that directly follows a convolution or a linear layer into it, in place, by its running
    statistics; an `nn.Identity` stays in its place. Returns the names of the layers that took one.

    The model then computes what it did in `eval`. Fold before `prepare`, for PTQ or to train without batch norms, or
    behind `convert`: then a batch norm stays where it would turn a sign (γ < 0) or where a layer has one scale for all
    channels; those of layers of signs always fold.

    Raises FamilyError for a model that cannot be traced, is prepared, or whose batch norms keep no statistics.
    """
    if any(isinstance(module, Prepared) for module in model.modules()):
        raise FamilyError("The model is prepared already: fold batch norms before, or convert it.")
    took = []
    for pair in pairs(model, (*_PLAIN, *_SIGNED, *_CODED), _NORMS, direct=True):
        layer, norm = model.get_submodule(pair.first), model.get_submodule(pair.second)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        factor, shift = _affine(pair.second, norm)
        if _fold(layer, factor, shift):
            model.set_submodule(pair.second, nn.Identity())
            took.append(pair.first)
    return took


@torch.no_grad()
def estimate_batch_norms(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Take the running statistics of all batch norms anew, over batches that the rest of the model sees as in `eval`.

    For weights that are another thing in use than in training: BinaryConnect's drawn ones (arXiv 1511.00363), for which
    the statistics of training do not hold. Behind it the model is in `eval`.

    Raises DataError without batches.
    """
    norms = [module for module in model.modules() if isinstance(module, _NORMS)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    count = 0
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for batch in batches:
            count += 1
            model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    if not count:
        raise DataError("There are no batches to take statistics of: give some.")
    return model


def _affine(name: str, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies by and adds, [channels] in float64: what is folded should not round twice."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise FamilyError(
            f"The batch norm {name} keeps no running statistics: it depends on its batch, and cannot be folded."
        )
    factor = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.double()


def _fold(layer: nn.Module, factor: Tensor, shift: Tensor) -> bool:
    """Whether the layer took it."""
    if isinstance(layer, _SIGNED):
        own = torch.ones_like(factor) if layer.scale is None else layer.scale.double()
        layer.scale = (own * factor).float()
        layer.bias = _shifted(layer.bias, factor, shift).float()
        return True
    if isinstance(layer, _CODED):
        weight = layer.scheme.weight
        if weight is None:
            layer.weight.copy_(_by_row(layer.weight, factor))
        elif (
            weight.grid not in ("int", "shifted")
            or len(layer.weight_scale) != len(factor)
            or bool((factor <= 0).any())
        ):
            return False
        else:
            layer.weight_scale.copy_(_by_row(layer.weight_scale, factor))
            if weight.grid == "shifted":
                shifts = layer.get_buffer("weight_shift")
                shifts.copy_(_by_row(shifts, factor))
        like = layer.weight if weight is None else layer.weight_scale
        layer.bias = nn.Parameter(
            _shifted(layer.bias, factor, shift).to(like.dtype), requires_grad=False
        )
        return True
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    layer.weight.copy_(_by_row(layer.weight, factor))
    layer.bias = nn.Parameter(_shifted(layer.bias, factor, shift).to(layer.weight.dtype))
    return True


def _by_row(values: Tensor, factor: Tensor) -> Tensor:
    return (values.double() * factor.view(-1, *[1] * (values.dim() - 1))).to(values.dtype)


def _shifted(bias: Tensor | None, factor: Tensor, shift: Tensor) -> Tensor:
    return shift if bias is None else shift + bias.double() * factor
