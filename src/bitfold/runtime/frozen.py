"""A base that stays packed while something beside its weights is trained: codes in memory, values as a layer runs.

QLoRA's frozen base (Dettmers et al. 2023, arXiv 2305.14314). `F.linear` on a dequantized weight would have autograd
keep that weight until the backward pass, all layers' at once; the product here keeps the layer, and unpacks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitfold.errors import CheckpointError, RecipeError
from bitfold.export import native
from bitfold.export.layout import WeightFormat, input_scale_name
from bitfold.export.model_directory import unpacks_in_scales
from bitfold.export.native import unpack_weight
from bitfold.export.reading import StoredModel, read_model
from bitfold.models.config import said_of
from bitfold.numerics import QuantizedTensor, Scheme, to_groups
from bitfold.numerics.activation import quantize_input
from bitfold.numerics.nested_scale import NestedScale, nested_nearest
from bitfold.runtime.loading import quiet
from bitfold.runtime.quantized_linear import QuantizedLinear
from bitfold.runtime.rest_loading import load_rest

__all__ = [
    "NF4",
    "FrozenLinear",
    "check_trainable",
    "linear_names",
    "load_frozen",
    "on_load",
    "rounded_weight",
]

NF4 = "wnf4a16g64"
"""QLoRA's scheme: nf4 in groups of 64, whose scales are quantized too."""
_FORMAT = WeightFormat(native.NAME, "")
_NESTED = ("codes", "levels", "outer", "mean")


class FrozenLinear(QuantizedLinear):
    """A `QuantizedLinear` that a gradient passes to its input, and that may have its scales nested.

    What is kept for the backward pass is the layer itself. The rounding of its input, where the scheme has one, is
    passed straight through. A weight is unpacked in the dtype of x, or of autocast, or first in `unpacked_in`.
    """

    def __init__(
        self,
        tensor: QuantizedTensor,
        scheme: Scheme,
        bias: Tensor | None,
        *,
        nested: NestedScale | None = None,
        calibrated: Mapping[str, Tensor] | None = None,
        unpacked_in: torch.dtype | None = None,
    ) -> None:
        """calibrated: what the scheme's activation needs, by its name behind the layer's. unpacked_in: the dtype that
        the base's own loader computes the weight in."""
        rows, columns = tensor.shape
        super().__init__(columns, rows, scheme, bias=False, device="meta")
        stored = native.to_tensors("", tensor, _FORMAT)
        parts = {name.removeprefix("."): value for name, value in stored.items()}
        for name, value in {**parts, **(calibrated or {})}.items():
            self.register_buffer(name, value)
        self.block, self.unpacked_in = 0, unpacked_in
        if nested is not None:
            self.block = nested.block
            self.register_buffer("weight_scale", None)
            for name in _NESTED:
                self.register_buffer(f"nested_{name}", getattr(nested, name))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]"""
        if (activation := self.scheme.activation) is not None:
            scale = getattr(self, input_scale_name(activation))
            rounded = quantize_input(
                x.detach(), activation, scale, self.input_zero_point, self.input_clusters
            )
            x = x + (rounded - x.detach()) if x.requires_grad else rounded
        y: Tensor = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, [out, in]."""
        weight = self.scheme.weight
        assert weight is not None
        return self.quantized().dequantize(self.unpacked_in or dtype).to(dtype)

    def quantized(self) -> QuantizedTensor:
        """The weight as it was given, [out, in]; its scales in float32 where they are nested."""
        assert self.scheme.weight is not None
        return unpack_weight(self._stored, self.scheme.weight, self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes of what stays in memory."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _stored(self, name: str) -> Tensor:
        if name == "weight_scale" and self.block:
            codes, levels, outer, mean = (self.get_buffer(f"nested_{part}") for part in _NESTED)
            return NestedScale(codes, levels, outer, mean, self.block).values()
        return self.get_buffer(name)


class _Product(torch.autograd.Function):
    """x · Wᵀ for a frozen W: ∂/∂x = g · W, with W unpacked once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return F.linear(x.to(dtype), layer.dequantize(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return (gradient @ ctx.layer.dequantize(gradient.dtype)).to(ctx.dtype), None


def load_frozen(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | str,
    scheme: Scheme | None = None,
    double: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode whose quantized linear layers are `FrozenLinear`s, and which has no
    parameter that is trained yet.

    directory: an artifact, or a checkpoint that another tool quantized and bitfold reads; or an original, whose linear
    layers but the head are rounded to nearest by `scheme` as they are loaded, one at a time, with nested scales
    (`double`); left as they are where the scheme has no weight.

    Raises CheckpointError for what cannot be read, or not be trained on; RecipeError for a scheme that cannot be.
    """
    stored = read_model(directory)
    check_trainable(stored)
    if stored.schemes or stored.loose:
        if scheme is not None:
            raise RecipeError(
                f"{directory} is quantized already: leave out the scheme, which is for originals"
            )
        names = [*stored.schemes, *stored.loose]
    else:
        scheme = on_load(scheme)
        names = linear_names(directory, trust_remote_code) if scheme.weight is not None else []
    options = {"attn_implementation": "sdpa"} if "attn_implementation" in stored.config else {}
    model = load_rest(
        directory, names, dtype=dtype, trust_remote_code=trust_remote_code, **options
    ).to(device)
    for name in names:
        bias = model.get_submodule(name).bias
        if scheme is not None:
            weight = stored.read(f"{name}.weight")
            assert isinstance(weight, Tensor)
            tensor, nested = rounded_weight(weight, scheme, double)
            layer: nn.Module = FrozenLinear(tensor, scheme, bias, nested=nested)
        else:
            layer = _as_stored(stored, name, bias, model.dtype)
        model.set_submodule(name, layer.to(device))
    return model.requires_grad_(False).eval()


def check_trainable(stored: StoredModel) -> None:
    """Raises CheckpointError for an artifact that quantizes, or turns, more than linear layers: those roundings have no
    gradient."""
    if stored.quantizes_heads or stored.runs:
        what = "quantizes queries, keys or values"
        if stored.runs:
            what = f"has maps that run ({stored.runs[0]})"
        raise CheckpointError(
            f"{stored.checkpoint.path} {what}, and adapters are not trained through that: take an artifact that "
            "quantizes weights, or weights and inputs, and folds all else"
        )


def on_load(scheme: Scheme | None) -> Scheme:
    """The scheme in which an original is loaded, QLoRA's where none is asked for; RecipeError for one that needs more
    than rounding weights to nearest."""
    scheme = scheme or Scheme.parse(NF4)
    if scheme.activation is not None or scheme.quantizes_attention:
        raise RecipeError(
            f"An original is rounded by {scheme.notation} in its weights alone as it is loaded: choose w4a16g64, or "
            "make an artifact by `bitfold quantize` and train on that"
        )
    return scheme


def linear_names(directory: Path, trust_remote_code: bool = False) -> list[str]:
    """The names of a checkpoint's linear layers but the head; CheckpointError where its config is of no model."""
    try:
        with quiet(), init_empty_weights():
            config = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises a dozen classes here
        raise CheckpointError(
            f"{directory} is no causal language model that transformers can build ({said_of(error)})"
        ) from error
    head = model.get_output_embeddings()
    named = model.named_modules()
    return [name for name, one in named if isinstance(one, nn.Linear) and one is not head]


def rounded_weight(
    weight: Tensor, scheme: Scheme, double: bool
) -> tuple[QuantizedTensor, NestedScale | None]:
    """A weight [out, in] as `load_frozen` rounds an original's: to nearest, its scales in the weight's dtype, or
    nested."""
    few = scheme.weight
    assert few is not None
    if double:
        return nested_nearest(weight, few)
    groups = to_groups(weight.float(), few)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    return QuantizedTensor.from_limits(weight.float(), low, high, few, weight.dtype), None


def _as_stored(
    stored: StoredModel, name: str, bias: Tensor | None, dtype: torch.dtype
) -> nn.Module:
    weight = stored.read(f"{name}.weight")
    if isinstance(
        weight, Tensor
    ):  # whose levels are no grid of bitfold's, or that only its input is quantized of
        scheme = stored.schemes.get(name)
        if scheme is not None and scheme.activation is not None:
            raise CheckpointError(
                f"{stored.checkpoint.path} quantizes the input of {name} and not its weight: adapters are trained on "
                "weights in few bits"
            )
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
        return linear
    found = stored.read_nested(name)
    return FrozenLinear(
        weight,
        stored.schemes[name],
        bias,
        nested=found,
        calibrated=stored.calibrated(name),
        unpacked_in=weight.scale.dtype if unpacks_in_scales(stored) else None,
    )
