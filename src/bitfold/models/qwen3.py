"""Qwen3: Llama's block with an RMSNorm per head on queries and keys before the rotary embedding."""

from dataclasses import replace

from transformers import PretrainedConfig

from bitfold.models.family import Site
from bitfold.models.llama import LLAMA, gated_sites

__all__ = ["QWEN3"]


def _sites(config: PretrainedConfig) -> tuple[Site, ...]:
    return gated_sites(head_norms=True)


QWEN3 = replace(LLAMA, name="qwen3", sites=_sites)
