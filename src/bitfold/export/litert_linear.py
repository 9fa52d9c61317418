"""A linear layer in LiteRT: its integers and scales as they are, inputs rounded by XNNPACK."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfold.export.litert_graph import TfGraph
from bitfold.export.phone_rules import block_of, half_of
from bitfold.export.reading import StoredModel
from bitfold.export.stored_bytes import halves
from bitfold.numerics import QuantizedTensor

__all__ = ["TfLinears"]


class TfLinears:
    """Writes linear layers. Attributes: types (how many weights there are of each kind), integers (how many layers are
    in integers), scale_error (the largest change of a scale, relative to it)."""

    def __init__(self, graph: TfGraph, model: StoredModel) -> None:
        self._graph, self._model = graph, model
        self._tables: dict[str, tuple[int, int]] = {}
        self.types: Counter[str] = Counter()
        self.integers = 0
        self.scale_error = 0.0

    def __call__(self, layer: str, x: int, *, weight: str | None = None) -> int:
        """x [length, in] → [length, out]. weight: the parameter's name, if it is another layer's."""
        scheme = self._model.schemes.get(layer)
        name = weight or f"{layer}.weight"
        value = None
        if scheme is not None and scheme.weight is not None:
            value = self._model.read(name)
        if isinstance(value, QuantizedTensor):
            matrix, out = self._integers(name, value), value.shape[0]
        else:
            matrix = self.table(name)
            out = self._tables[name][1]
        bias = self._bias(f"{layer}.bias")
        # XNNPACK rounds with zero-points whatever is said here; LiteRT's own kernel does as it is told.
        return self._graph.op(
            "FULLY_CONNECTED",
            (-1, out),
            *(x, matrix, bias),
            asymmetricQuantizeInputs=isinstance(value, QuantizedTensor),
        )

    def table(self, name: str) -> int:
        """A matrix [out, in] that is not quantized, in float32; the same for all who ask for it."""
        if name not in self._tables:
            value = self._model.read(name)
            value = value.dequantize() if isinstance(value, QuantizedTensor) else value.float()
            stored = self._graph.weight(name, value.numpy(), "FLOAT32")
            self.types["float32"] += value.numel()
            self._tables[name] = (stored, value.shape[0])
        return self._tables[name][0]

    def _bias(self, name: str) -> int:
        """−1 where there is none."""
        if name not in self._model.checkpoint.tensors:
            return -1
        value = self._model.read(name)
        assert isinstance(value, Tensor)
        return self._graph.weight(name, value.float().numpy(), "FLOAT32")

    def _integers(self, name: str, value: QuantizedTensor) -> int:
        bits = 4 if value.scheme.bits <= 4 else 8
        rows = value.shape[0]
        scale = value.scale.float().expand(rows, -1)
        self.types[f"{bits} bits"] += value.shape.numel()
        self.integers += 1
        raw: Any = halves(value.codes, 0) if bits == 4 else value.codes.numpy()
        block = block_of(value)
        how: dict[str, Any] = {"scales": scale[:, 0].numpy()}
        if block is not None:
            half, change = half_of(scale, torch.float16)
            self.scale_error = max(self.scale_error, change)
            # XNNPACK has scales of groups in bfloat16, and makes them of these.
            self.scale_error = max(self.scale_error, half_of(half, torch.bfloat16)[1])
            stored = self._graph.weight(
                f"{name}.scales", half.numpy().astype(np.float16), "FLOAT16"
            )
            how = {"blocks": (stored, block)}
        return self._graph.weight(name, raw, f"INT{bits}", tuple(value.shape), **how)
