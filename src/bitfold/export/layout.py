"""What a quantized model consists of, as plain data: what an export format is asked to say.

A format (`compressed_tensors`, `native`) answers `choose(layout)` with a `Choice`, or with a
`Refusal` and its reason. `config(layout, choice)` is then the `quantization_config` of config.json
and `extra_config(layout, settings)` what else it must say; `to_tensors(name, tensor, format)` are
the tensors of one weight, and `from_tensors(name, tensors, scheme, format)` is the way back.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics import MapShape, Scheme, TensorScheme

__all__ = [
    "AttentionEntry",
    "Choice",
    "LayerEntry",
    "Layout",
    "Refusal",
    "WeightFormat",
    "input_scale_name",
    "input_tensors",
]


@dataclass(frozen=True)
class LayerEntry:
    """One linear layer; q, k and v in its scheme are ignored (see `AttentionEntry`).

    input_scale: [1], the scale of a static activation, or the global scale of an nvfp4 one, float32; None for others,
                 or if not calibrated yet.
    input_zero:  [1] int8, its zero-point; None for symmetric grids.
    """

    scheme: Scheme
    in_features: int
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None


@dataclass(frozen=True)
class AttentionEntry:
    """One attention module, e.g. `LlamaAttention`; only q, k and v of its scheme are read."""

    scheme: Scheme
    head_dim: int
    class_name: str


@dataclass(frozen=True)
class Layout:
    """A whole model, by module name.

    linears:          the quantized linear layers.
    attention:        *every* attention module, quantized or not.
    unquantized:      every other `nn.Linear`, lm_head included.
    flattened_inputs: ends of the names of layers that are given [batch·tokens, features] instead of
                      [batch, tokens, features] (OPT: fc1, fc2).
    online:           modules at which a map runs that nothing absorbs: behind a norm, before a linear layer, or on an
                      attention's queries and keys.
    storage:          dtype of the checkpoint's floating tensors, in which loaders run the model if not told otherwise.
    """

    linears: Mapping[str, LayerEntry]
    attention: Mapping[str, AttentionEntry] = field(default_factory=dict)
    unquantized: Collection[str] = ()
    flattened_inputs: Collection[str] = ()
    online: Mapping[str, MapShape] = field(default_factory=dict)
    storage: torch.dtype = torch.float32


@dataclass(frozen=True)
class WeightFormat:
    """How one weight lies on disk: a format, and in its words which elements share a scale."""

    name: str
    strategy: str


@dataclass(frozen=True)
class Choice:
    """How a layout is said exactly: a format per linear layer.

    dequantize: loaders turn the weights back into floating point at once, in the dtype of the scales
                whatever dtype they are asked for; otherwise the scales are cast before.
    """

    formats: Mapping[str, WeightFormat]
    dequantize: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why a format cannot say a layout exactly: a clause that goes on after "because"."""

    reason: str


def input_tensors(name: str, entry: LayerEntry) -> dict[str, Tensor]:
    """Of a static activation `NAME.input_scale` and, asymmetric, `NAME.input_zero_point`, each [1]; of an nvfp4 one
    `NAME.input_global_scale`, [1].

    Raises RecipeError when its range was not calibrated.
    """
    activation = entry.scheme.activation
    if activation is None or not activation.calibrated:
        return {}
    if entry.input_scale is None or (entry.input_zero is None and not activation.symmetric):
        raise RecipeError(
            f"{name} has activations that take a range from calibration text, and it is not there: calibrate them, "
            "or choose a dynamic scheme."
        )
    tensors = {f"{name}.{input_scale_name(activation)}": entry.input_scale.reshape(1)}
    if entry.input_zero is not None and not activation.symmetric:
        tensors[f"{name}.input_zero_point"] = entry.input_zero.reshape(1)
    return tensors


def input_scale_name(activation: TensorScheme) -> str:
    """What the scale of `input_tensors` is called behind the layer's name."""
    return "input_global_scale" if activation.grid == "nvfp4" else "input_scale"
