"""Puts fake quantization in place: `bitfold.prepare`, and `bitfold.calibrate` for ranges that are observed."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.errors import DataError, RecipeError, did_you_mean
from bitfold.numerics import Scheme, TensorScheme
from bitfold.training.estimators import MinMaxWeight, ObservedInput
from bitfold.training.layers import Prepared, PreparedConv2d, PreparedEmbedding, PreparedLinear
from bitfold.training.preparation import (
    Preparation,
    input_estimator,
    preparation_of,
    weight_estimator,
)
from bitfold.training.unrolled_lstm import UnrolledLSTM

__all__ = ["calibrate", "penalty", "prepare", "prepared_layers"]

_EIGHT = {"bits": 8, "symmetric": True}


def prepare(
    model: nn.Module,
    recipe: str | Mapping[str, Any] | Preparation = "lsq",
    *,
    scheme: str | Scheme | None = None,
    options: Mapping[str, Any] | None = None,
    ignore: Iterable[str] = (),
    storage: torch.dtype | None = None,
) -> nn.Module:
    """Put fake quantization into every `nn.Linear` and `nn.Conv2d` of a model (embeddings, if asked), in place.

    An `nn.LSTM` becomes the linear layers it is made of (`UnrolledLSTM`), which are quantized like all others.
    Parameters stay the same objects, under the same names but for an LSTM's, so that optimizers, tied weights and
    checkpoints go on; what is learned beside them (steps, clips) are parameters NAME.weights.… and NAME.inputs.…. Train
    the model in any loop, then `convert` it. `penalty(model)` is what PACT wants added to the loss.

    recipe: a method by name (`bitfold.training.METHODS`: static, dynamic, qat, lsq, pact, dorefa, binaryconnect, bnn,
        xnor, binary, twn, ternary), its options, or a `Preparation`.
    scheme: notation such as w4a4 or w2a16g64. options: see `preparation_of`. ignore: patterns of module names that are
        left alone, such as "*.pooler.*". storage: the dtype in which scales will be stored, each weight's own if not
        given.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> bitfold.prepare(model, "lsq", scheme="w4a8")[0]
    PreparedLinear(
      (weights): LsqWeight(int4 symmetric, channel)
      (inputs): LsqInput(int8 symmetric, static tensor)
    )

    Raises RecipeError for a recipe that cannot be, a group size that does not divide, a model that is prepared already
    or has nothing to quantize.
    """
    asked = preparation_of(recipe, scheme, options)
    asked = asked.model_copy(update={"ignore": (*asked.ignore, *ignore)})
    if any(isinstance(module, Prepared) for module in model.modules()):
        raise RecipeError("The model is prepared already: convert it, or prepare the original.")
    for name, module in list(model.named_modules()):
        if type(module) is nn.LSTM and asked.rounds_layers and not asked.leaves_alone(name):
            _put(model, name, UnrolledLSTM(module, name))
    layers = {
        name: module for name, module in model.named_modules() if _takes_part(name, module, asked)
    }
    ends = [name for name, module in layers.items() if not isinstance(module, nn.Embedding)]
    if unknown := sorted(asked.bits.keys() - layers.keys()):
        raise RecipeError(f"bits names {unknown[0]}, and {did_you_mean(unknown[0], layers)}.")
    if not ends and not layers:
        raise RecipeError(
            "The model has no nn.Linear, nn.Conv2d or nn.Embedding that the recipe does not leave alone."
        )
    outermost = {ends[0], ends[-1]} if ends else set()
    for name, layer in layers.items():
        if name in outermost and asked.ends == "full":
            continue
        eight = name in outermost and asked.ends == "8 bits"
        place = layer.get_parameter("weight").device
        prepared = (
            _prepared(name, layer, _of_layer(asked, name), eight, storage)
            .to(place)
            .train(layer.training)
        )
        _put(model, name, prepared)
    return model


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    run: Callable[[nn.Module, Any], object] | None = None,
) -> nn.Module:
    """Observe the inputs of a model that was prepared for it (`static`), on batches, and fix their ranges.

    batches: tensors, or what `run(model, batch)` takes; mappings are given as keyword arguments.

    Raises DataError without batches, or where they are not finite; RecipeError for a model with nothing to observe.
    """
    observed = [module for module in model.modules() if isinstance(module, ObservedInput)]
    if not observed:
        raise RecipeError(
            "The model observes no inputs: prepare it with inputs=observed (`static`)."
        )
    training = model.training
    model.eval()
    for one in observed:
        one.observing = True
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                count += 1
                if run is not None:
                    run(model, batch)
                elif isinstance(batch, Mapping):
                    model(**batch)
                else:
                    model(batch)
    finally:
        for one in observed:
            one.finish()
        model.train(training)
    if not count:
        raise DataError("There are no batches to calibrate on: give some.")
    return model


def penalty(model: nn.Module) -> Tensor:
    """What the estimators want added to the loss (PACT: λ Σ α²), a scalar; 0 where they want nothing."""
    terms = [
        t
        for layer in prepared_layers(model).values()
        if layer.inputs
        for t in layer.inputs.penalty()
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def prepared_layers(model: nn.Module) -> dict[str, Prepared]:
    """The layers in training, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Prepared)}


def _takes_part(name: str, module: nn.Module, asked: Preparation) -> bool:
    if asked.leaves_alone(name):
        return False
    if isinstance(module, nn.Embedding):
        return asked.embeddings is not None
    return asked.rounds_layers and type(module) in (nn.Linear, nn.Conv2d)


def _of_layer(asked: Preparation, name: str) -> Preparation:
    """With the bits that mixed precision gives the weight of one layer."""
    bits, weight = asked.bits.get(name), asked.scheme.weight
    if bits is None or weight is None:
        return asked
    scheme = asked.scheme.model_copy(update={"weight": weight.model_copy(update={"bits": bits})})
    return asked.model_copy(update={"scheme": scheme})


def _prepared(
    name: str, layer: nn.Module, asked: Preparation, eight: bool, storage: torch.dtype | None
) -> Prepared:
    if isinstance(layer, nn.Embedding):
        assert asked.embeddings is not None
        rows = TensorScheme(bits=asked.embeddings)
        return PreparedEmbedding(layer, MinMaxWeight(rows, layer.weight.dtype))
    weight, activation = asked.scheme.weight, asked.scheme.activation
    if eight:
        weight = weight and TensorScheme(bits=8)
        activation = activation and activation.model_copy(update={"bits": 8})
        own = {"weights": "lsq" if asked.weights == "lsq" else "minmax"}
        own |= {"inputs": "none"} if asked.inputs == "sign" else {}
        asked = asked.model_copy(update=own)
    weights = None
    if weight is not None and asked.weights != "none":
        _check_groups(name, layer, weight)
        weights = weight_estimator(asked, layer, weight, storage)
    inputs = input_estimator(asked, activation)
    if isinstance(layer, nn.Linear):
        return PreparedLinear(layer, weights, inputs)
    assert isinstance(layer, nn.Conv2d)
    if activation is not None and activation.granularity == "token" and asked.inputs == "dynamic":
        raise RecipeError(
            f"{name} is a convolution, whose inputs have no tokens: choose static inputs, or leave it alone by "
            f"ignore=['{name}']."
        )
    return PreparedConv2d(layer, weights, inputs)


def _check_groups(name: str, layer: nn.Module, scheme: TensorScheme) -> None:
    columns = layer.get_parameter("weight").flatten(1).shape[1]
    if scheme.group_size is not None and columns % scheme.group_size:
        raise RecipeError(
            f"Group size {scheme.group_size} does not divide the {columns} inputs of {name}: choose a divisor, or "
            f"leave it alone by ignore=['{name}']."
        )


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    if not name:
        raise RecipeError("A bare layer cannot be prepared in place: wrap it in nn.Sequential.")
    model.set_submodule(name, module)
