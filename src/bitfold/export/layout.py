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
    "input_buffers",
    "input_scale_name",
    "input_tensors",
]


@dataclass(frozen=True)
class LayerEntry:
    """One linear layer; q, k and v in its scheme are ignored (see `AttentionEntry`).

    input_scale: [1], the scale of a static activation (of each cluster, where it has clusters), or the global scale of
                 an nvfp4 one, float32, or the share of a clipped one; None for others, or if not calibrated yet.
    input_zero:  int8, its zero-points in the same shape; None for symmetric grids.
    input_clusters: [in] uint8, the cluster of each channel; None where there are none.
    """

    scheme: Scheme
    in_features: int
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    input_clusters: Tensor | None = None


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


def input_buffers(
    activation: TensorScheme | None,
    in_features: int,
    storage: torch.dtype,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Zeros in the place of what is stored of a calibrated activation, by its name behind the layer's.

    input_scale: [1], or [clusters], of a static one, in the dtype of storage, and input_zero_point, int8, if it is
        asymmetric.
    input_global_scale: [1] float32, of nvfp4.
    input_share: [1], of its range that a clipped one has, in the dtype of storage.
    input_clusters: [in_features] uint8, the cluster of each channel.
    """
    if activation is None:
        return {}
    ranges = activation.clusters or 1
    shapes: dict[str, tuple[int, torch.dtype]] = {}
    if activation.static:
        shapes["input_scale"] = (ranges, storage)
    if activation.static and not activation.symmetric:
        shapes["input_zero_point"] = (ranges, torch.int8)
    if activation.grid == "nvfp4":
        shapes["input_global_scale"] = (1, torch.float32)
    if activation.clipped:
        shapes["input_share"] = (1, storage)
    if activation.clusters is not None:
        shapes["input_clusters"] = (in_features, torch.uint8)
    return {
        name: torch.zeros(size, dtype=dtype, device=device)
        for name, (size, dtype) in shapes.items()
    }


def input_tensors(name: str, entry: LayerEntry) -> dict[str, Tensor]:
    """The tensors of `input_buffers`, by full name.

    Raises RecipeError when its range, or its clusters, were not calibrated.
    """
    activation = entry.scheme.activation
    if activation is None:
        return {}
    found = {
        input_scale_name(activation): entry.input_scale,
        "input_zero_point": entry.input_zero,
        "input_clusters": entry.input_clusters,
    }
    tensors: dict[str, Tensor] = {}
    for key, empty in input_buffers(activation, entry.in_features, torch.float32, "meta").items():
        value = found[key]
        if value is None:
            raise RecipeError(
                f"{name} has activations that take a range from calibration text, and it is not there: calibrate them, "
                "or choose a dynamic scheme."
            )
        # A copy, since layers that read the same input have the same, and safetensors stores no tensor twice.
        tensors[f"{name}.{key}"] = value.reshape(empty.shape).clone()
    return tensors


def input_scale_name(activation: TensorScheme) -> str:
    """What the scale of `input_tensors` is called behind the layer's name."""
    if activation.clipped:
        return "input_share"
    return "input_global_scale" if activation.grid == "nvfp4" else "input_scale"
