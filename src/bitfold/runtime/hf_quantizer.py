"""Makes `from_pretrained` load artifacts in bitfold's own format, once this module is imported."""

from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitfold.errors import CheckpointError, RecipeError
from bitfold.export import native
from bitfold.models.family import head_counts
from bitfold.numerics import MapShape, Scheme
from bitfold.runtime.attention import (
    ATTENTION,
    HeadQuantizers,
    follow_cache,
    head_tensors,
    set_head_quantizers,
)
from bitfold.runtime.online import OnlineMap, attach, runs_on_heads
from bitfold.runtime.quantized_linear import QuantizedLinear

__all__ = ["BitfoldConfig", "BitfoldHfQuantizer"]


@register_quantization_config(native.NAME)
class BitfoldConfig(QuantizationConfigMixin):
    """The `quantization_config` that `bitfold.export.native.config` writes."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings | {"quant_method": native.NAME}
        self.quant_method = native.NAME

    def to_dict(self) -> dict[str, Any]:
        """As written in config.json."""
        return dict(self.settings)


@register_quantizer(native.NAME)
class BitfoldHfQuantizer(HfQuantizer):
    """Puts in `QuantizedLinear`s for linear layers, quantizers into attention modules, and maps that run."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Prepare the model, still on the meta device, for the artifact's tensors.

        Raises CheckpointError where config.json names what the model lacks, RecipeError where the
        attention that was asked for cannot quantize.
        """
        settings = self.quantization_config.to_dict()
        linears, attention = native.read_config(settings)
        for name, scheme in linears.items():
            model.set_submodule(name, _quantized(name, _module(model, name), scheme))
        maps = native.read_online(settings)
        if attention or any(runs_on_heads(_module(model, name)) for name in maps):
            _use_bitfold_attention(model)
        heads = head_counts(model.config.get_text_config())
        for name, scheme in attention.items():
            module = _module(model, name)
            set_head_quantizers(module, HeadQuantizers.of(scheme))
            follow_cache(module)
            for part, like in head_tensors(scheme, heads, model.dtype).items():
                module.register_buffer(part, torch.zeros_like(like, device=model.device))
        for name, shape in maps.items():
            module = _module(model, name)
            attach(module, _map_for(name, module, shape, model.dtype))

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, OnlineMap):
                module.align()
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the tensors as they were read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Weights stay packed: no gradient reaches them."""
        return False


def _module(model: PreTrainedModel, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(
            f"config.json says how {name} is rewritten, but the model has no such module: "
            "weights and config.json are of different models."
        ) from error


def _quantized(name: str, linear: nn.Module, scheme: Scheme) -> QuantizedLinear:
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(
            f"config.json says how the weight of {name} is quantized, but it is a "
            f"{type(linear).__name__}: weights and config.json are of different models."
        )
    return QuantizedLinear(
        linear.in_features,
        linear.out_features,
        scheme,
        bias=linear.bias is not None,
        dtype=linear.weight.dtype,
        device=linear.weight.device,
    )


def _map_for(name: str, module: nn.Module, shape: MapShape, dtype: torch.dtype) -> OnlineMap:
    """The map that will run at a module."""
    width = getattr(module, "in_features", None) or getattr(module, "head_dim", None)
    weight = getattr(module, "weight", None)
    if width is None and weight is not None:
        width = weight.numel()
    if width != shape.width:
        raise CheckpointError(
            f"config.json puts a map for {shape.width} features at {name}, but that is a {type(module).__name__} of "
            "another width: weights and config.json are of different models."
        )
    return OnlineMap(shape, dtype=dtype, device=_device(module))


def _device(module: nn.Module) -> torch.device:
    return next(chain(module.parameters(), module.buffers())).device


def _use_bitfold_attention(model: PreTrainedModel) -> None:
    asked = model.config._attn_implementation
    if asked not in ("sdpa", ATTENTION):
        raise RecipeError(
            f"attn_implementation={asked!r} cannot turn or quantize queries, keys and values, "
            "as this artifact asks: leave it out."
        )
    model.set_attn_implementation(ATTENTION)
