"""Attention whose queries, keys and values are quantized, through transformers' own attention interface.

The function sees queries and keys after the rotary embedding and the per-head norms, which is where the papers'
q/k/v quantization acts. A module without quantizers attends as `sdpa` does, to the bit.

A cache of bitfold's (`runtime/kv_cache.py`) hands over keys and values that are quantized already: `follow_cache` has
the attention look for one, and leave them as they are. Scales of single tokens give the same numbers either way. Where
they are of groups of tokens, see `runtime/token_groups.py`.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitfold.numerics import (
    Scheme,
    TensorScheme,
    fake_quantize_dynamic,
    fake_quantize_static,
    quantize_values,
)
from bitfold.runtime.short_attention import LONGEST, short_attention
from bitfold.runtime.token_groups import KeysSeen, keys_seen, seen_over_time

__all__ = [
    "ATTENTION",
    "HEAD_TENSORS",
    "VALUE_CODEBOOK",
    "HeadMap",
    "HeadName",
    "HeadQuantizers",
    "follow_cache",
    "head_map",
    "head_quantizers",
    "head_tensors",
    "set_head_map",
    "set_head_quantizers",
]

ATTENTION = "bitfold"
VALUE_CODEBOOK = "value_codebook"
"""Name of the codebook of an attention's values, among its tensors."""
HeadName = Literal["query", "key", "value"]
HeadMap = Callable[[HeadName, Tensor], Tensor]
"""What turns queries and keys."""
HEAD_TENSORS: tuple[HeadName, ...] = ("query", "key", "value")
_ATTRIBUTE = "bitfold_head_quantizers"
_MAP = "bitfold_head_map"
_LAYER = "bitfold_cache_layer"


@dataclass(frozen=True)
class HeadQuantizers:
    """Schemes of queries, keys and values, each [batch, heads, tokens, head_dim]; None leaves them alone.

    quantize: dynamic fake quantization by a scheme.
    tensors: what was calibrated, by the names of `head_tensors`; None: the attention module has them as buffers.
    """

    query: TensorScheme | None
    key: TensorScheme | None
    value: TensorScheme | None
    quantize: Callable[[Tensor, TensorScheme], Tensor] = fake_quantize_dynamic
    tensors: Mapping[str, Tensor] | None = None

    @classmethod
    def of(
        cls,
        scheme: Scheme,
        quantize: Callable[[Tensor, TensorScheme], Tensor] = fake_quantize_dynamic,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> "HeadQuantizers | None":
        """The q/k/v part of a layer's scheme, or None where it has none.

        quantize: fake quantization by a scheme; another than the usual one where gradients must pass.
        """
        if not scheme.quantizes_attention:
            return None
        return cls(scheme.query, scheme.key, scheme.value, quantize, tensors)

    @property
    def groups_keys(self) -> bool:
        """Whether keys have scales of groups of tokens."""
        return self.key is not None and self.key.groups_tokens

    def on(self, name: HeadName, x: Tensor, module: nn.Module) -> Tensor:
        """x quantized as queries, keys or values, or as it is without a scheme."""
        scheme: TensorScheme | None = getattr(self, name)
        if scheme is None:
            return x
        if scheme.grid == "codebook":
            return quantize_values(x, self._tensor(VALUE_CODEBOOK, module))
        if scheme.static:
            return fake_quantize_static(x, *self.static(name, module), scheme)
        return self.quantize(x, scheme)

    def static(self, name: HeadName, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Calibrated scale and zero-point, which broadcast over [batch, heads, tokens, head_dim]."""
        scheme: TensorScheme = getattr(self, name)
        zero = None if scheme.symmetric else self._tensor(f"{name}_zero_point", module)
        return self._tensor(f"{name}_scale", module), zero

    def _tensor(self, name: str, module: nn.Module) -> Tensor:
        return module.get_buffer(name) if self.tensors is None else self.tensors[name]


def set_head_quantizers(attention: nn.Module, quantizers: HeadQuantizers | None) -> None:
    """Make an attention module of a model loaded with `attn_implementation=ATTENTION` quantize q, k, v."""
    setattr(attention, _ATTRIBUTE, quantizers)


def set_head_map(attention: nn.Module, found: Callable[[nn.Module], HeadMap] | None) -> None:
    """Make such a module turn queries and keys [batch, heads, tokens, head_dim], before they are quantized, by the map
    that `found` gives for it; q · k has to be what it was."""
    setattr(attention, _MAP, found)


def head_map(attention: nn.Module) -> HeadMap | None:
    """What `set_head_map` has it turn queries and keys by."""
    found = getattr(attention, _MAP, None)
    return None if found is None else found(attention)


def head_quantizers(attention: nn.Module) -> HeadQuantizers | None:
    """What `set_head_quantizers` set."""
    return getattr(attention, _ATTRIBUTE, None)


def head_tensors(
    scheme: Scheme, heads: tuple[int, int, int], storage: torch.dtype
) -> dict[str, Tensor]:
    """Empty tensors, on the meta device, of what is calibrated of an attention's queries, keys and values.

    heads: (query heads, KV heads, head_dim). `NAME_scale`: [1, 1, 1] (tensor), [heads, 1, 1] (head) or
    [heads, 1, head_dim] (channel) in the dtype of storage; `NAME_zero_point`: the same shape, int8;
    `value_codebook`: [books, entries, dim].
    """
    queries, keys, size = heads
    found: dict[str, Tensor] = {}
    for name in HEAD_TENSORS:
        part: TensorScheme | None = getattr(scheme, name)
        if part is None:
            continue
        if part.codebook is not None:
            found[VALUE_CODEBOOK] = torch.empty(part.codebook.shape, dtype=storage, device="meta")
        if not part.static:
            continue
        count = queries if name == "query" else keys
        shapes = {"tensor": (1, 1, 1), "head": (count, 1, 1), "channel": (count, 1, size)}
        shape = shapes[part.granularity]
        found[f"{name}_scale"] = torch.empty(shape, dtype=storage, device="meta")
        if not part.symmetric:
            found[f"{name}_zero_point"] = torch.empty(shape, dtype=torch.int8, device="meta")
    return found


class _CacheLayer(Protocol):
    """A layer of bitfold's cache, as the attention sees it."""

    hands_over: bool

    def handed_over(self, key: Tensor) -> KeysSeen: ...


def follow_cache(attention: nn.Module) -> None:
    """Have an attention module take keys and values as they are from a cache that has quantized them.

    The attention function itself is never told of the cache; a hook on the module is.
    """

    def look(module: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        layers = getattr(arguments.get("past_key_values"), "layers", ())
        index: Any = module.layer_idx
        layer: Any = layers[index] if index < len(layers) else None
        found = None
        if hasattr(layer, "hands_over"):
            layer.hands_over = True
            found = weakref.ref(layer)  # a model must not keep the last cache it saw alive
        setattr(module, _LAYER, found)

    # First of all hooks: that of compressed-tensors puts something else in place of the cache.
    attention.register_forward_pre_hook(look, prepend=True, with_kwargs=True)


def _layer(module: nn.Module) -> _CacheLayer | None:
    reference: weakref.ref[Any] | None = getattr(module, _LAYER, None)
    return None if reference is None else reference()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    turned, quantizers, layer = head_map(module), head_quantizers(module), _layer(module)
    if turned is not None:
        # Keys of a cache that quantizes them were turned before.
        query = turned("query", query)
        key = turned("key", key) if layer is None else key
    if quantizers is not None:
        query = quantizers.on("query", query, module)
        if layer is None:
            value = quantizers.on("value", value, module)
        if not quantizers.groups_keys:
            key = quantizers.on("key", key, module) if layer is None else key
        else:
            assert quantizers.key is not None
            seen = (
                keys_seen(key, query.shape[-2], quantizers.key, quantizers.quantize, kwargs)
                if layer is None
                else layer.handed_over(key)
            )
            causal = getattr(module, "is_causal", True)
            key, value, attention_mask = seen_over_time(
                seen, value, attention_mask, query.shape[-2], causal=causal
            )
    if _learning_in_bfloat16(query) and query.shape[-2] <= LONGEST and not _special(kwargs):
        causal = attention_mask is None and getattr(module, "is_causal", True)
        scaling: Any = kwargs.get("scaling")
        with torch.autocast("cpu", enabled=False):
            found = short_attention(query, key, value, attention_mask, scaling, causal=causal)
        return found, None
    result: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, **kwargs
    )
    return result


def _learning_in_bfloat16(query: Tensor) -> bool:
    return query.is_cpu and query.dtype != torch.float64 and torch.is_autocast_enabled("cpu")


def _special(arguments: Mapping[str, object]) -> bool:
    """Whether the model asks for what only the library's own function knows of, or refuses."""
    return any(
        arguments.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux")
    )


# transformers' public way to add an attention function; the mask is sdpa's.
ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
