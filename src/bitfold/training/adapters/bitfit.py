"""BitFit: biases alone are trained (Ben Zaken et al. 2021, arXiv 2106.10199)."""

from pathlib import Path
from typing import Any

from bitfold.training.adapters.adapter_options import AdapterOptions, AdapterResult
from bitfold.training.adapters.adapter_training import train_adapter

__all__ = ["train_bitfit"]


def train_bitfit(
    model: str | Path,
    text: str | Path,
    out: str | Path,
    *,
    options: AdapterOptions | None = None,
    **more: Any,
) -> AdapterResult:
    """Adapt a model to a text by its biases, those of norms too; linear layers without one get one of zeros.

    What is written is what each bias changed by, about a thousandth of the model's parameters, and which base it
    belongs to. Everything else is as in `train_qlora`; peft is not needed.

        bitfold.train_bitfit("llama-w4", "law.txt", "llama-law-biases")
    """
    return train_adapter(("bitfit",), model, text, out, options=options or AdapterOptions(), **more)
