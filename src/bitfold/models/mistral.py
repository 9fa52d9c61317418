"""Mistral: Llama's block (its sliding window changes the mask, not the sites)."""

from dataclasses import replace

from bitfold.models.llama import LLAMA

__all__ = ["MISTRAL"]

MISTRAL = replace(LLAMA, name="mistral")
