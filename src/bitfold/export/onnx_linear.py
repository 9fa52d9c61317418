"""A linear layer in ONNX: its integers, scales and zero-points as they are, and its inputs quantized as in the simulation."""

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from bitfold.export.onnx_activations import (
    check_activation,
    dynamic_scale,
    fake_quantized,
    rounded,
)
from bitfold.export.onnx_graph import MICROSOFT, Graph
from bitfold.export.onnx_integers import Packed, block_size, pack_compact, pack_nibbles
from bitfold.export.reading import StoredModel
from bitfold.numerics import QuantizedTensor, TensorScheme

__all__ = ["PACKINGS", "Linears"]

PACKINGS: Mapping[str, Callable[[QuantizedTensor, int], tuple[Packed, ...]]] = {
    "fast": pack_nibbles,
    "compact": pack_compact,
}
# Of 8 by 8 bits: so many products fit in an int32 whatever they are.
_LONGEST_SUM = (1 << 31) // (128 * 255)
_PLAIN = (torch.bfloat16, torch.float16, torch.float32)


class Linears:
    """Writes linear layers of a model into a graph.

    Attributes: types (how many weights there are of each kind), unstored (layers whose integers have no place),
    rounds (whether inputs are quantized in the graph).
    """

    def __init__(self, graph: Graph, model: StoredModel, packing: str) -> None:
        self._graph, self._model = graph, model
        self._pack = PACKINGS[packing]
        self._quantized: dict[tuple[object, ...], str] = {}  # inputs that several layers share
        self.types: Counter[str] = Counter()
        self.unstored: list[str] = []
        self.rounds = False

    def __call__(self, layer: str, x: str, *, weight: str | None = None) -> str:
        """x [batch, length, in] → [batch, length, out], by a layer's full name.

        weight: the parameter's name, if it is another layer's (a head that is tied to the embedding).
        Raises ExportError for a scheme that has no nodes.
        """
        self._graph.scope = layer
        scheme = self._model.schemes.get(layer)
        activation = None if scheme is None else scheme.activation
        value = self._model.read(weight or f"{layer}.weight")
        calibrated: dict[str, Tensor] = {}
        if activation is not None:
            check_activation(layer, activation)
            calibrated = self._model.calibrated(layer)
            self.rounds = True
        if isinstance(value, QuantizedTensor) and _in_integers(value, activation):
            assert activation is not None
            result = self._integers(layer, x, value, activation, calibrated)
        else:
            if activation is not None:
                x = self._fake_quantized(x, activation, calibrated)
            if isinstance(value, Tensor):
                result = self._plain(x, weight or f"{layer}.weight", value)
            elif (block := block_size(value)) is not None:
                result = self._blocks(layer, x, value, block)
            else:
                result = self._values(layer, x, value)
        bias = f"{layer}.bias"
        if bias not in self._model.checkpoint.tensors:
            return result
        return self._graph.op("Add", result, self.vector(bias))

    def vector(self, name: str, *, offset: float = 0.0) -> str:
        """A vector in float32, with something added to it."""
        value = self._model.read(name)
        assert isinstance(value, Tensor)
        self.types["FLOAT"] += value.numel() * (name not in self._graph.stored)
        return self._graph.store(name, value.float() + offset)

    def matrix(self, name: str, value: Tensor) -> str:
        """A matrix [out, in] in the dtype it is stored in: it is cast after it is read."""
        value = value if value.dtype in _PLAIN else value.float()
        kind = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}.get(value.dtype, "FLOAT")
        self.types[kind] += value.numel() * (name not in self._graph.stored)
        return self._graph.store(name, value)

    def _plain(self, x: str, name: str, value: Tensor) -> str:
        stored = self.matrix(name, value)
        if value.dtype in (torch.bfloat16, torch.float16):
            stored = self._graph.cast(stored, torch.float32)
        return self._graph.op("MatMul", x, self._graph.op("Transpose", stored, perm=[1, 0]))

    def _values(self, layer: str, x: str, value: QuantizedTensor) -> str:
        """A weight that has no integers here, as the values it stands for: in 16 bits where they hold them."""
        exact = value.dequantize(torch.float32)
        half = exact.to(value.scale.dtype) if value.scale.dtype in _PLAIN else exact.bfloat16()
        self.unstored.append(f"{layer} ({value.scheme.describe()})")
        return self._plain(
            x, f"{layer}.weight", half if torch.equal(half.float(), exact) else exact
        )

    def _blocks(self, layer: str, x: str, value: QuantizedTensor, block: int) -> str:
        graph = self._graph
        out, width = value.shape
        parts = self._pack(value, block)
        results = []
        for place, part in enumerate(parts):
            name = f"{layer}.weight" + (".high" if len(parts) > 1 and place == 0 else "")
            inputs = [
                x,
                graph.store(name, part.integers),
                graph.store(f"{name}.scales", part.scales),
            ]
            if part.zeros is not None:
                inputs.append(graph.store(f"{name}.zero_points", part.zeros))
            # Level 0: inputs stay in float32. The others may be rounded to 8 bits.
            sizes = {"K": width, "N": out, "bits": part.bits, "block_size": part.block}
            results.append(
                graph.op("MatMulNBits", *inputs, domain=MICROSOFT, accuracy_level=0, **sizes)
            )
        self.types[f"{len(parts)} × INT4" if len(parts) > 1 else f"INT{parts[0].bits}"] += (
            out * width
        )
        if value.kept is not None and value.columns is not None:
            columns = graph.store(f"{layer}.weight.columns", value.columns)
            of_kept = graph.op("Gather", x, columns, axis=-1)
            kept = graph.store(f"{layer}.weight.kept", value.kept.float().T)
            results.append(graph.op("MatMul", of_kept, kept))
        return results[0] if len(results) == 1 else graph.op("Sum", *results)

    # -- eight bits by eight bits ------------------------------------------------------------------

    def _integers(
        self,
        layer: str,
        x: str,
        value: QuantizedTensor,
        activation: TensorScheme,
        calibrated: Mapping[str, Tensor],
    ) -> str:
        """A product of integers. The weight lies as [in, out], as the nodes want it."""
        graph, out = self._graph, value.shape[0]
        codes = graph.store(f"{layer}.weight", value.codes.T)
        scales = value.scale.float().expand(out, 1).flatten()
        zeros = torch.zeros(out, dtype=torch.int8) if value.zero is None else value.zero
        scale = graph.store(f"{layer}.weight.scales", scales)
        zero = graph.store(f"{layer}.weight.zero_points", zeros.expand(out, 1).flatten() if zeros.ndim > 1 else zeros)
        self.types["INT8"] += value.shape.numel()
        if activation.static:
            x = self._static(x, activation, calibrated)
            return graph.op("MatMul", x, graph.op("DequantizeLinear", codes, scale, zero, axis=1))
        units, of_token = self._per_token(x, activation, calibrated)
        # Unsigned inputs with zero at 128 are the same integers, and have a kernel that signed ones lack.
        middle = graph.constant(np.array(128, dtype=np.uint8))
        sums = graph.cast(graph.op("MatMulInteger", units, codes, middle, zero), torch.float32)
        return graph.op("Mul", graph.op("Mul", sums, of_token), scale)

    def _static(self, x: str, scheme: TensorScheme, calibrated: Mapping[str, Tensor]) -> str:
        graph = self._graph
        scale = graph.number(float(calibrated["input_scale"].float()))
        zero = 0 if scheme.symmetric else int(calibrated["input_zero_point"])
        point = graph.constant(np.array(zero, dtype=np.int8))

        def add() -> str:
            units = graph.op("QuantizeLinear", x, scale, point)
            return graph.op("DequantizeLinear", units, scale, point)

        return self._once(("static", x, scale, point), add)

    def _per_token(
        self, x: str, scheme: TensorScheme, calibrated: Mapping[str, Tensor]
    ) -> tuple[str, str]:
        graph = self._graph
        share = calibrated["input_share"].float().item() if scheme.clipped else None
        key = ("token", x, scheme, share)
        scale = self._once(
            (*key, "scale"), lambda: dynamic_scale(graph, x, scheme, calibrated)
        )

        def add() -> str:
            codes = rounded(graph, x, scheme, scale, None)
            return graph.cast(graph.op("Add", codes, graph.number(128)), torch.uint8)

        return self._once((*key, "units"), add), scale

    def _fake_quantized(
        self, x: str, scheme: TensorScheme, calibrated: Mapping[str, Tensor]
    ) -> str:
        of_text = tuple((name, tuple(t.flatten().tolist())) for name, t in calibrated.items())
        return self._once(
            ("fake", x, scheme, of_text),
            lambda: fake_quantized(self._graph, x, scheme, calibrated),
        )

    def _once(self, key: tuple[object, ...], add: Callable[[], str]) -> str:
        """What several layers do with the same input is done once."""
        if key not in self._quantized:
            self._quantized[key] = add()
        return self._quantized[key]


def _in_integers(value: QuantizedTensor, activation: TensorScheme | None) -> bool:
    """Whether a product of integers of 8 bits is what was simulated."""
    weight = value.scheme
    if activation is None or activation.grid != "int" or activation.bits != 8:
        return False
    if weight.grid != "int" or weight.bits <= 4 or value.kept is not None:
        return False  # four bits are smaller packed
    if weight.granularity not in ("channel", "tensor") or value.shape[1] >= _LONGEST_SUM:
        return False
    if activation.static:
        return activation.granularity == "tensor" and not activation.narrow
    return activation.granularity == "token" and activation.symmetric
