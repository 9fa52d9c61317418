"""The form of a graph that TensorRT takes: explicit QuantizeLinear and DequantizeLinear of INT8, the rest in FP16.

The rules are those of NVIDIA's documentation ("Working with Quantized Types", and the operators of onnx-tensorrt's
parser): symmetric INT8, zero-points 0, scales that are constants, one of a tensor for inputs and one of each output
channel for weights, and a pair of nodes at both inputs of whatever is to run in INT8. TensorRT itself is not run here.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfold.errors import ExportError
from bitfold.export.exported import half_scales
from bitfold.export.onnx_graph import Graph, onnx_package
from bitfold.export.onnx_linear import Linears
from bitfold.export.reading import StoredModel
from bitfold.numerics import QuantizedTensor, TensorScheme

__all__ = ["TensorRtLinears", "tensorrt_faults"]

_LATEST_OPSET = 21
_WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_INTEGER_NODES = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearMatMul")


class TensorRtLinears(Linears):
    """Linear layers as explicit pairs of nodes, or in FP16. Attributes: scale_error (of half precision, relative)."""

    def __init__(self, graph: Graph, model: StoredModel) -> None:
        super().__init__(graph, model, "fast")
        self.scale_error = 0.0

    def _product(
        self,
        layer: str,
        x: str,
        name: str,
        value: QuantizedTensor | Tensor,
        activation: TensorScheme | None,
        calibrated: Mapping[str, Tensor],
    ) -> str:
        if isinstance(value, Tensor) and activation is None:
            return self._plain(x, name, value)
        if not isinstance(value, QuantizedTensor) or not _sayable(value, activation):
            raise ExportError(
                f"TensorRT runs {layer} in INT8 only with symmetric weights of 8 bits per channel and symmetric static "
                "inputs of 8 bits: quantize it by w8a8 with weight.symmetric=true and activation.static=true, or leave "
                'it alone; or use form="fast".'
            )
        graph, out = self._graph, value.shape[0]
        nothing = graph.constant(np.array(0, dtype=np.int8))
        scale = graph.constant(self._half(layer, calibrated["input_scale"].reshape(())).numpy())
        units = self._once(
            ("static", x, scale), lambda: graph.op("QuantizeLinear", x, scale, nothing)
        )
        x = graph.op("DequantizeLinear", units, scale, nothing)
        codes = graph.store(f"{layer}.weight", value.codes.T)
        scales = self._half(layer, value.scale.expand(out, 1).flatten())
        of_rows = graph.store(f"{layer}.weight.scales", scales)
        # Each layer has its own, because ONNX Runtime cannot make unsigned weights of two that share them.
        zeros = graph.store(f"{layer}.weight.zero_points", torch.zeros(out, dtype=torch.int8))
        self.types["INT8"] += value.shape.numel()
        return graph.op("MatMul", x, graph.op("DequantizeLinear", codes, of_rows, zeros, axis=1))

    def _half(self, layer: str, scale: Tensor) -> Tensor:
        """Scales in half precision. Raises ExportError for those that are out of its range."""
        try:
            half, change = half_scales(scale)
        except OverflowError as error:
            raise ExportError(f"{layer} cannot be written for TensorRT: {error}.") from error
        self.scale_error = max(self.scale_error, change)
        return half


def _sayable(value: QuantizedTensor, activation: TensorScheme | None) -> bool:
    weight = value.scheme
    return (
        activation is not None
        and (weight.grid, activation.grid, activation.bits) == ("int", "int", 8)
        and weight.symmetric
        and activation.symmetric
        and not activation.narrow
        and weight.granularity in ("channel", "tensor")
        and value.kept is None
        and activation.static
        and activation.granularity == "tensor"
    )


# -- the rules -------------------------------------------------------------------------------------


def tensorrt_faults(file: Path) -> list[str]:
    """What of a graph TensorRT's rules forbid, a sentence each, naming the node; empty where it keeps to them."""
    onnx = onnx_package()
    model = onnx.load(file, load_external_data=False)
    return list(_faults(onnx, model, file.parent))


def _faults(onnx: Any, model: Any, directory: Path) -> Iterator[str]:
    for used in model.opset_import:
        if used.domain not in ("", "ai.onnx"):
            yield f"The graph has nodes of {used.domain}"
        elif used.version > _LATEST_OPSET:
            yield f"The graph is of opset {used.version}, above {_LATEST_OPSET}"
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def value(name: str) -> Any:
        return onnx.numpy_helper.to_array(known[name], str(directory))

    for node in model.graph.node:
        if node.op_type in _INTEGER_NODES:
            yield f"{node.name} is {node.op_type}, which the parser has not"
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from _pair_faults(node, known, value)
            yield from _placement_faults(node, known, makers, readers)
        elif node.op_type in _WEIGHTED:
            made = [makers[name].op_type for name in node.input[:2] if name in makers]
            count = made.count("DequantizeLinear")
            if count == 1:
                yield f"{node.name} has one quantized input and one that is not"


def _pair_faults(node: Any, known: Mapping[str, Any], value: Any) -> Iterator[str]:
    """Scale and zero-point."""
    if node.input[1] not in known:
        yield f"The scale of {node.name} is no constant"
        return
    scale = value(node.input[1])
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield f"A scale of {node.name} is not above 0"
    if len(node.input) > 2 and node.input[2]:
        if node.input[2] not in known:
            yield f"The zero-point of {node.name} is no constant"
            return
        zero = value(node.input[2])
        if zero.dtype != np.int8 or zero.any():
            yield f"The zero-points of {node.name} are not all 0 of INT8"
    if scale.ndim and node.input[0] not in known:
        yield f"{node.name} has scales of channels, which only weights may have"
    if scale.ndim and node.input[0] in known:
        weight = known[node.input[0]]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if axis != 1 or list(scale.shape) != [weight.dims[1]]:
            yield f"The scales of {node.name} are not those of the output channels"


def _placement_faults(
    node: Any, known: Mapping[str, Any], makers: Mapping[str, Any], readers: Mapping[str, Any]
) -> Iterator[str]:
    """What stands before and behind."""
    behind = {reader.op_type for reader in readers.get(node.output[0], ())}
    if node.op_type == "QuantizeLinear":
        if behind != {"DequantizeLinear"}:
            yield f"{node.name} is followed by {', '.join(sorted(behind)) or 'nothing'}"
        return
    if not behind or behind - set(_WEIGHTED):
        yield f"{node.name} is followed by {', '.join(sorted(behind)) or 'nothing'}"
    source = makers.get(node.input[0])
    if source is not None and source.op_type != "QuantizeLinear":
        yield f"{node.name} follows {source.op_type}"
    if source is not None and list(source.input[1:3]) != list(node.input[1:3]):
        yield f"{node.name} has another scale than the node that it follows"
    if source is None and node.input[0] not in known:
        yield f"{node.name} reads neither a weight nor what was quantized"
