"""Turns a trained model into layers that hold codes: `bitfold.convert`."""

import torch
from torch import Tensor, nn

from bitfold.errors import RecipeError
from bitfold.numerics import QuantizedTensor, Scheme
from bitfold.runtime.quantized_conv2d import QuantizedConv2d
from bitfold.runtime.quantized_embedding import QuantizedEmbedding
from bitfold.runtime.quantized_linear import QuantizedLinear
from bitfold.runtime.xnor_layers import XnorConv2d, XnorLinear
from bitfold.training.estimators import BinaryConnectWeight, SignInput, XnorWeight
from bitfold.training.layers import Prepared, PreparedConv2d, PreparedEmbedding, PreparedLinear
from bitfold.training.prepare import prepared_layers

__all__ = ["convert", "quantized_weights"]


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """Put layers of codes in the place of the layers in training, in place; the model computes what it did in `eval`.

    Weights are `QuantizedTensor`s, the same as PTQ makes, packed in `QuantizedLinear`, `QuantizedConv2d` and
    `QuantizedEmbedding`; layers of signs become `XnorLinear` and `XnorConv2d`, whose product counts bits.

    Raises RecipeError for a model that is not prepared, or one whose inputs' ranges were never found.
    """
    layers = prepared_layers(model)
    if not layers:
        raise RecipeError("The model is not prepared: there is nothing to convert.")
    converted = {name: _converted(name, layer) for name, layer in layers.items()}
    for name, layer in converted.items():
        model.set_submodule(name, layer.train(False))
    return model


def quantized_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    """The weights [out, in] of a prepared model's layers as they would be stored, by the layers' names."""
    return {
        name: layer.weights.quantized(layer.matrix().detach())
        for name, layer in prepared_layers(model).items()
        if layer.weights is not None
    }


def _scheme_of(name: str, layer: Prepared) -> tuple[Scheme, dict[str, Tensor]]:
    """The scheme of a trained layer, and what is stored of its inputs."""
    weight = None if layer.weights is None else layer.weights.scheme
    if layer.inputs is None or isinstance(layer.inputs, SignInput):
        return Scheme(weight=weight), {}
    try:
        return Scheme(weight=weight, activation=layer.inputs.activation), layer.inputs.stored()
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error


def _converted(name: str, layer: Prepared) -> nn.Module:
    scheme, stored = _scheme_of(name, layer)
    if isinstance(layer.inputs, SignInput):
        return _of_signs(name, layer)
    weight = layer.weight if layer.weights is None else layer.weights.quantized(layer.matrix())
    if isinstance(layer, PreparedEmbedding):
        assert isinstance(weight, QuantizedTensor)
        return QuantizedEmbedding.of(weight, layer.padding_idx)
    if isinstance(layer, PreparedConv2d):
        return QuantizedConv2d.of(
            weight,
            scheme,
            layer.bias,
            stored,
            shape=layer.weight.shape,
            stride=layer.stride,
            dilation=layer.dilation,
            padding=layer.padding,
            padding_mode=layer.padding_mode,
            groups=layer.groups,
        )
    assert isinstance(layer, PreparedLinear)
    return QuantizedLinear.of(weight, scheme, layer.bias, stored)


def _of_signs(name: str, layer: Prepared) -> nn.Module:
    """The layer that counts bits. Its weight's scale is said by the estimator: α for each row, or 1."""
    assert isinstance(layer.inputs, SignInput)
    if not isinstance(layer.weights, XnorWeight | BinaryConnectWeight):
        raise RecipeError(
            f"{name} has signs for inputs and other weights: train it with weights=xnor or bnn, or inputs=none."
        )
    scheme = layer.weights.scheme
    if scheme.granularity == "group":
        raise RecipeError(
            f"{name} has a scale for each group of {scheme.group_size} weights, and counted bits have one for each "
            "row: leave out the group size."
        )
    matrix = layer.matrix()
    size = (layer.weights.quantized(matrix).scale.flatten() / 2).expand(len(matrix))
    scale = None if isinstance(layer.weights, BinaryConnectWeight) else size
    weight, scaled = layer.weight.detach(), layer.inputs.scaled
    if isinstance(layer, PreparedLinear):
        return XnorLinear(weight, layer.bias, scale=scale, scaled_input=scaled)
    assert isinstance(layer, PreparedConv2d)
    left, right, top, bottom = layer.padding
    if layer.groups != 1 or layer.padding_mode != "zeros" or (left, top) != (right, bottom):
        raise RecipeError(
            f"{name} has groups, or a padding that is not the same zeros on both sides, which counted bits do not: "
            f"leave it alone by ignore=['{name}']."
        )
    return XnorConv2d(
        weight,
        layer.bias,
        stride=layer.stride,
        padding=(top, left),
        dilation=layer.dilation,
        scale=scale,
        scaled_input=scaled,
    )
