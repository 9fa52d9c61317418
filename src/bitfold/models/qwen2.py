"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v (and none on o, so no shift at v → o)."""

from dataclasses import replace

from bitfold.models.llama import LLAMA

__all__ = ["QWEN2"]

QWEN2 = replace(LLAMA, name="qwen2")
