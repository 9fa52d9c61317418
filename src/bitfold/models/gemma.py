"""Gemma: Llama's block with norms that store their gain minus one. Gemma 3 adds norms on q and k and after each half.

A norm after a half (post-norm) closes nothing inside the block, whose sites stand before it, but the stream's rotation.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from bitfold.models.family import Site
from bitfold.models.llama import LLAMA, gated_sites

__all__ = ["GEMMA", "GEMMA3"]


def _gemma(config: PretrainedConfig) -> tuple[Site, ...]:
    return gated_sites(norm_offset=1.0)


def _gemma3(config: PretrainedConfig) -> tuple[Site, ...]:
    return gated_sites(norm_offset=1.0, mlp_norm="pre_feedforward_layernorm", head_norms=True)


GEMMA = replace(LLAMA, name="gemma", sites=_gemma)
GEMMA3 = replace(LLAMA, name="gemma3_text", sites=_gemma3, stream=lambda config: None)
