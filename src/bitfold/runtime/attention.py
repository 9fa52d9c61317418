"""Attention whose queries, keys and values are quantized, through transformers' own attention interface.

The function sees queries and keys after the rotary embedding and the per-head norms, which is where the papers'
q/k/v quantization acts. A module without quantizers attends as `sdpa` does, to the bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitfold.numerics import Scheme, TensorScheme, fake_quantize_dynamic, quantize_values
from bitfold.runtime.short_attention import LONGEST, short_attention

__all__ = ["ATTENTION", "VALUE_CODEBOOK", "HeadQuantizers", "set_head_map", "set_head_quantizers"]

ATTENTION = "bitfold"
VALUE_CODEBOOK = "value_codebook"
"""Name of the codebook of an attention's values, among its tensors."""
_ATTRIBUTE = "bitfold_head_quantizers"
_MAP = "bitfold_head_map"


@dataclass(frozen=True)
class HeadQuantizers:
    """Schemes of queries, keys and values, each [batch, heads, tokens, head_dim]; None leaves them alone.

    codebook: of the values, as of `quantize_values`; None: the attention module has it, where the scheme wants one.
    """

    query: TensorScheme | None
    key: TensorScheme | None
    value: TensorScheme | None
    quantize: Callable[[Tensor, TensorScheme], Tensor] = fake_quantize_dynamic
    codebook: Tensor | None = None

    @classmethod
    def of(
        cls,
        scheme: Scheme,
        quantize: Callable[[Tensor, TensorScheme], Tensor] = fake_quantize_dynamic,
        codebook: Tensor | None = None,
    ) -> "HeadQuantizers | None":
        """The q/k/v part of a layer's scheme, or None where it has none.

        quantize: fake quantization by a scheme; another than the usual one where gradients must pass.
        """
        if not scheme.quantizes_attention:
            return None
        return cls(scheme.query, scheme.key, scheme.value, quantize, codebook)

    def on(self, x: Tensor, scheme: TensorScheme | None) -> Tensor:
        """x quantized, or as it is without a scheme."""
        return x if scheme is None else self.quantize(x, scheme)

    def on_value(self, x: Tensor, module: torch.nn.Module) -> Tensor:
        """The same of values, in the attention of this module."""
        if self.value is None or self.value.grid != "codebook":
            return self.on(x, self.value)
        codebook = self.codebook
        if codebook is None:
            codebook = module.get_buffer(VALUE_CODEBOOK)
        return quantize_values(x, codebook)


def set_head_quantizers(attention: torch.nn.Module, quantizers: HeadQuantizers | None) -> None:
    """Make an attention module of a model loaded with `attn_implementation=ATTENTION` quantize q, k, v."""
    setattr(attention, _ATTRIBUTE, quantizers)


def set_head_map(
    attention: torch.nn.Module,
    found: Callable[[torch.nn.Module], Callable[[Tensor], Tensor]] | None,
) -> None:
    """Make such a module turn queries and keys [batch, heads, tokens, head_dim], before they are quantized, by the
    orthogonal map that `found` gives for it."""
    setattr(attention, _MAP, found)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    head_map = getattr(module, _MAP, None)
    if head_map is not None:
        turned = head_map(module)
        query, key = turned(query), turned(key)
    quantizers: HeadQuantizers | None = getattr(module, _ATTRIBUTE, None)
    if quantizers is not None:
        query = quantizers.on(query, quantizers.query)
        key = quantizers.on(key, quantizers.key)
        value = quantizers.on_value(value, module)
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
