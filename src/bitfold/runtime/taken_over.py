"""Artifacts in the compressed-tensors format whose keys and values bitfold's attention quantizes, in place of that
library's: the same numbers, but with a cache that stores codes they need not be made twice."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitfold.numerics import TensorScheme
from bitfold.runtime.attention import (
    ATTENTION,
    HeadQuantizers,
    follow_cache,
    set_head_quantizers,
)

__all__ = ["take_over"]


def take_over(model: PreTrainedModel) -> None:
    """Have bitfold's attention quantize queries, keys and values where compressed-tensors does; a model without any, or
    where some are in a way that bitfold does not write, stays as it is."""
    found = {
        module: arguments
        for module in model.modules()
        if (arguments := _arguments(module)) is not None
    }
    schemes = {module: _scheme(arguments) for module, arguments in found.items()}
    if not schemes or any(scheme is None for scheme in schemes.values()):
        return
    # Only where compressed-tensors quantizes queries has it an attention function of its own.
    queries = model.config._attn_implementation not in ("sdpa", ATTENTION)
    for module, scheme in schemes.items():
        set_head_quantizers(module, HeadQuantizers(scheme if queries else None, scheme, scheme))
        follow_cache(module)
        module.quantization_enabled = False  # its own switch
    model.set_attn_implementation(ATTENTION)


def _arguments(attention: nn.Module) -> Any:
    """How compressed-tensors quantizes keys and values of an attention; None where it does not, or not any more."""
    if not hasattr(attention, "kv_cache") or not getattr(attention, "quantization_enabled", True):
        return None
    return getattr(getattr(attention, "quantization_scheme", None), "input_activations", None)


def _scheme(arguments: Any) -> TensorScheme | None:
    """The scheme behind arguments of compressed-tensors; None for what bitfold does not write for keys and values."""
    granularity = str(getattr(arguments.strategy, "value", arguments.strategy))
    if arguments.dynamic is not True or granularity not in ("token", "group"):
        return None
    kind = str(getattr(arguments.type, "value", arguments.type))
    if kind != "int" and arguments.num_bits != 8:
        return None
    return TensorScheme(
        grid="int" if kind == "int" else "fp8_e4m3",
        bits=arguments.num_bits,
        symmetric=arguments.symmetric,
        granularity="token" if granularity == "token" else "group",
        group_size=arguments.group_size if granularity == "group" else None,
    )
