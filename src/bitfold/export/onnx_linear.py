"""A linear layer in ONNX: its integers, scales and zero-points as they are, its inputs rounded as in the simulation."""

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from bitfold.errors import ExportError
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
    input_bits (the fewest that inputs are rounded to in the graph), half_scales (whether scales are stored in half
    precision).
    """

    def __init__(self, graph: Graph, model: StoredModel, packing: str) -> None:
        self._graph, self._model = graph, model
        self._pack = PACKINGS[packing]
        self._quantized: dict[tuple[object, ...], str] = {}  # inputs that several layers share
        self.types: Counter[str] = Counter()
        self.unstored: list[str] = []
        self.input_bits: int | None = None
        self.half_scales = False

    def __call__(self, layer: str, x: str, *, weight: str | None = None) -> str:
        """x [batch, length, in] → [batch, length, out], by a layer's full name.

        weight: the parameter's name, if it is another layer's (a head that is tied to the embedding).
        Raises ExportError for a scheme that has no nodes.
        """
        with self._graph.within(layer):
            return self._layer(layer, x, weight or f"{layer}.weight")

    def _layer(self, layer: str, x: str, name: str) -> str:
        """name: of the weight."""
        scheme = self._model.schemes.get(layer)
        activation = None if scheme is None else scheme.activation
        value = self._model.read(name)
        if isinstance(value, QuantizedTensor):
            self.half_scales |= value.scale.dtype in (torch.bfloat16, torch.float16)
        calibrated: dict[str, Tensor] = {}
        if activation is not None:
            check_activation(layer, activation)
            calibrated = self._model.calibrated(layer)
            self.input_bits = min(activation.bits, self.input_bits or activation.bits)
        result = self._product(layer, x, name, value, activation, calibrated)
        bias = f"{layer}.bias"
        if bias not in self._model.checkpoint.tensors:
            return result
        return self._graph.op("Add", result, self.vector(bias, dtype=self._graph.dtype))

    def vector(self, name: str, *, offset: float = 0.0, dtype: torch.dtype = torch.float32) -> str:
        """A vector, with something added to it."""
        value = self._model.read(name)
        assert isinstance(value, Tensor)
        self.types["FLOAT"] += value.numel() * (name not in self._graph.stored)
        return self._graph.store(name, _checked(name, (value.float() + offset).to(dtype)))

    def matrix(self, name: str, value: Tensor) -> tuple[str, torch.dtype]:
        """A matrix [out, in], and the dtype that it is in: the graph's, if that is half precision, or the one it is
        stored in, and cast after it is read."""
        if self._graph.dtype != torch.float32:
            value = _checked(name, value.to(self._graph.dtype))
        value = value if value.dtype in _PLAIN else value.float()
        kind = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}.get(value.dtype, "FLOAT")
        self.types[kind] += value.numel() * (name not in self._graph.stored)
        return self._graph.store(name, value), value.dtype

    def _product(
        self,
        layer: str,
        x: str,
        name: str,
        value: QuantizedTensor | Tensor,
        activation: TensorScheme | None,
        calibrated: Mapping[str, Tensor],
    ) -> str:
        """Without the bias. name: of the weight."""
        if isinstance(value, QuantizedTensor) and _in_integers(value, activation):
            assert activation is not None
            return self._integers(layer, x, value, activation, calibrated)
        if activation is not None:
            x = self._fake_quantized(x, activation, calibrated)
        if isinstance(value, Tensor):
            return self._plain(x, name, value)
        if (block := block_size(value)) is not None:
            return self._blocks(layer, x, value, block)
        return self._values(layer, x, value)

    def _plain(self, x: str, name: str, value: Tensor) -> str:
        stored, dtype = self.matrix(name, value)
        if dtype != self._graph.dtype:
            stored = self._graph.cast(stored, self._graph.dtype)
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
            results.append(
                graph.op(
                    "MatMulNBits",
                    *inputs,
                    domain=MICROSOFT,
                    accuracy_level=0,
                    K=width,
                    N=out,
                    bits=part.bits,
                    block_size=part.block,
                )
            )
        self.types[f"{len(parts)} × INT4" if len(parts) > 1 else f"INT{parts[0].bits}"] += (
            out * width
        )
        return self._with_kept(layer, x, value, results)

    def _with_kept(self, layer: str, x: str, value: QuantizedTensor, results: list[str]) -> str:
        """The sum of products, and of that with the columns that are kept beside the codes."""
        graph = self._graph
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
        """A product of integers. The weight lies as [in, out], as the nodes want it.

        Inputs are unsigned, 128 higher and so is their zero-point: signed ones have no kernel that is quick.
        """
        graph, out = self._graph, value.shape[0]
        codes = graph.store(f"{layer}.weight", value.codes.T)
        scale = graph.store(f"{layer}.weight.scales", _of_rows(value.scale.float(), out))
        zeros = torch.zeros(1, 1, dtype=torch.int8) if value.zero is None else value.zero
        zero = graph.store(f"{layer}.weight.zero_points", _of_rows(zeros, out))
        self.types["INT8"] += value.shape.numel()
        middle = 128
        if activation.static:
            middle += 0 if activation.symmetric else int(calibrated["input_zero_point"])
            point = graph.constant(np.array(middle, dtype=np.uint8))
            of_input = graph.number(calibrated["input_scale"].float().item())
            key = ("static", x, of_input, point)
            units = self._once(key, lambda: graph.op("QuantizeLinear", x, of_input, point))
        else:
            point = graph.constant(np.array(middle, dtype=np.uint8))
            units, of_input = self._per_token(x, activation, calibrated)
        sums = graph.cast(graph.op("MatMulInteger", units, codes, point, zero), torch.float32)
        return graph.op("Mul", graph.op("Mul", sums, of_input), scale)

    def _per_token(
        self, x: str, scheme: TensorScheme, calibrated: Mapping[str, Tensor]
    ) -> tuple[str, str]:
        graph = self._graph
        share = calibrated["input_share"].float().item() if scheme.clipped else None
        key = ("token", x, scheme, share)
        scale = self._once((*key, "scale"), lambda: dynamic_scale(graph, x, scheme, calibrated))

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


def _checked(name: str, value: Tensor) -> Tensor:
    """A parameter that is finite. Raises ExportError."""
    if not torch.isfinite(value).all():
        raise ExportError(
            f"{name} has values beyond the range of half precision: use another form."
        )
    return value


def _of_rows(value: Tensor, rows: int) -> Tensor:
    """[rows or 1, 1] → [rows]."""
    return value.expand(rows, 1).flatten()


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
