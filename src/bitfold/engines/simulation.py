"""An artifact in PyTorch: what it says of tokens, with and without the quantization of its inputs."""

from pathlib import Path

import torch
from torch import Tensor

from bitfold.engines.compare import Answer
from bitfold.runtime.load import load

__all__ = ["Simulation"]


class Simulation:
    """An artifact in the compressed-tensors format, loaded in one dtype."""

    def __init__(self, out: Path, device: str | torch.device, dtype: str) -> None:
        self._model = load(out, device=device, dtype=dtype)
        # Of weights that were unpacked at loading, and of what is quantized as it runs.
        self._quantized = [m for m in self._model.modules() if hasattr(m, "quantization_scheme")]

    @property
    def quantizes_inputs(self) -> bool:
        """Whether inputs, queries, keys or values are quantized when it runs."""
        return any(m.quantization_scheme.input_activations is not None for m in self._quantized)

    def answer(self, windows: Tensor, ids: Tensor, *, quantize_inputs: bool = True) -> Answer:
        """What it says of token ids [windows, length − 1, most] behind the windows' tokens."""
        for module in self._quantized:
            module.quantization_enabled = quantize_inputs
        parts = []
        with torch.no_grad():
            for row, wanted in zip(windows, ids, strict=True):  # one at a time: logits take memory
                tokens = row[None].to(self._model.device)
                logits = self._model(input_ids=tokens, use_cache=False).logits
                parts.append(Answer.of(logits, wanted[None]).logprobs)
        return Answer(ids, torch.cat(parts))
