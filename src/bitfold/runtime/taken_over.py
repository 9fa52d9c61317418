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

__all__ = ["compressed_heads", "take_over"]

# compressed-tensors' own, of a module whose quantization is to pass things on as they are.
_SWITCH = "quantization_enabled"


def compressed_heads(model: PreTrainedModel) -> dict[nn.Module, HeadQuantizers]:
    """How compressed-tensors quantizes queries, keys and values, by attention module; nothing where it does not, or
    anywhere in a way that bitfold does not write."""
    found = {
        module: arguments
        for module in model.modules()
        if (arguments := _arguments(module)) is not None
    }
    result: dict[nn.Module, HeadQuantizers] = {}
    for module, arguments in found.items():
        scheme = _scheme(arguments)
        if scheme is None:
            return {}
        # Only where it quantizes queries has the module an attention function of its own.
        query = scheme if hasattr(module, "impl") else None
        result[module] = HeadQuantizers(query, scheme, scheme)
    return result


def take_over(model: PreTrainedModel) -> None:
    """Have bitfold's attention quantize what `compressed_heads` finds, from now on; the same numbers."""
    found = compressed_heads(model)
    for module, quantizers in found.items():
        set_head_quantizers(module, quantizers)
        follow_cache(module)
        setattr(module, _SWITCH, False)
    if found:
        model.set_attn_implementation(ATTENTION)


def _arguments(attention: nn.Module) -> Any:
    """How compressed-tensors quantizes keys and values of an attention; None where it does not, or not any more."""
    if not hasattr(attention, "kv_cache") or not getattr(attention, _SWITCH, True):
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
