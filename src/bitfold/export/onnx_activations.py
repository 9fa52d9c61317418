"""What happens to the input of a linear layer, in standard nodes of ONNX, one by one as `fake_quantize` has them."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from bitfold.errors import ExportError
from bitfold.export.onnx_graph import Graph
from bitfold.numerics import TensorScheme

__all__ = ["check_activation", "dynamic_scale", "fake_quantized", "rounded"]

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_EPSILON = torch.finfo(torch.float32).eps


def check_activation(layer: str, scheme: TensorScheme) -> None:
    """Raises ExportError for what has no nodes here."""
    if scheme.grid not in ("int", "fp8_e4m3"):
        raise ExportError(
            f"{layer} has inputs on the grid {scheme.grid}, which ONNX is written without: quantize them as integers "
            "or fp8, or use another --to."
        )
    if scheme.clusters and not scheme.static:
        raise ExportError(
            f"{layer} has inputs in clusters with a range for each token, which ONNX is written without: set "
            "activation.static=true, or use another --to."
        )


def fake_quantized(
    graph: Graph, x: str, scheme: TensorScheme, calibrated: Mapping[str, Tensor]
) -> str:
    """x [batch, length, inputs] rounded to the grid, float32. calibrated: of the layer (`StoredModel.calibrated`)."""
    grouped = scheme.granularity == "group"
    values = x
    if grouped:
        assert scheme.group_size is not None
        values = graph.op("Reshape", x, graph.integers(0, 0, -1, scheme.group_size))
    if scheme.static:
        scale, zero = _static(graph, scheme, calibrated)
    elif scheme.symmetric:
        scale, zero = dynamic_scale(graph, values, scheme, calibrated), None
    else:
        scale, zero = _dynamic_asymmetric(graph, values, scheme, calibrated)
    values = rounded(graph, values, scheme, scale, zero)
    if zero is not None:
        values = graph.op("Sub", values, zero)
    values = graph.op("Mul", values, scale)
    return graph.op("Reshape", values, graph.op("Shape", x)) if grouped else values


def rounded(graph: Graph, x: str, scheme: TensorScheme, scale: str, zero: str | None) -> str:
    """The codes of x, in float32."""
    values = graph.op("Div", x, scale)
    if zero is not None:
        values = graph.op("Add", values, zero)
    if scheme.grid == "fp8_e4m3":
        values = graph.op("Clip", values, graph.number(-_FP8_MAX), graph.number(_FP8_MAX))
        return graph.cast(graph.cast(values, torch.float8_e4m3fn), torch.float32)
    values = graph.op("Clip", values, graph.number(scheme.qmin), graph.number(scheme.qmax))
    return graph.op("Round", values)


def dynamic_scale(
    graph: Graph, x: str, scheme: TensorScheme, calibrated: Mapping[str, Tensor]
) -> str:
    """The scale of each token or group of x, symmetric: [..., 1]."""
    largest = graph.op("ReduceMax", graph.op("Abs", x), _axes(graph, scheme), keepdims=1)
    if scheme.clipped:
        # A share of zero or more: that of the larger end is the larger of both ends' shares.
        largest = graph.op("Mul", largest, _share(graph, calibrated))
    half = _FP8_MAX if scheme.grid == "fp8_e4m3" else _steps(scheme) / 2
    return _not_zero(graph, graph.op("Div", largest, graph.number(half)))


def _dynamic_asymmetric(
    graph: Graph, x: str, scheme: TensorScheme, calibrated: Mapping[str, Tensor]
) -> tuple[str, str]:
    low = graph.op("ReduceMin", x, _axes(graph, scheme), keepdims=1)
    high = graph.op("ReduceMax", x, _axes(graph, scheme), keepdims=1)
    if scheme.clipped:
        share = _share(graph, calibrated)
        low, high = graph.op("Mul", low, share), graph.op("Mul", high, share)
    nothing = graph.number(0)
    low, high = graph.op("Min", low, nothing), graph.op("Max", high, nothing)
    steps = graph.number(_steps(scheme))
    scale = _not_zero(graph, graph.op("Div", graph.op("Sub", high, low), steps))
    least, most = graph.number(scheme.qmin), graph.number(scheme.qmax)
    # Of a group of zeros this is qmin, with which they stay zeros as well.
    zero = graph.op("Sub", least, graph.op("Div", low, scale))
    return scale, graph.op("Round", graph.op("Clip", zero, least, most))


def _static(
    graph: Graph, scheme: TensorScheme, calibrated: Mapping[str, Tensor]
) -> tuple[str, str | None]:
    scale = calibrated["input_scale"].float()
    zero = None if scheme.symmetric else calibrated["input_zero_point"].float()
    if scheme.clusters:
        at = calibrated["input_clusters"].long()
        scale, zero = scale[at], None if zero is None else zero[at]
    return graph.constant(scale.numpy()), None if zero is None else graph.constant(zero.numpy())


def _axes(graph: Graph, scheme: TensorScheme) -> str:
    return graph.integers(0, 1, 2) if scheme.granularity == "tensor" else graph.integers(-1)


def _share(graph: Graph, calibrated: Mapping[str, Tensor]) -> str:
    return graph.constant(calibrated["input_share"].float().numpy())


def _steps(scheme: TensorScheme) -> float:
    return 2.0 * scheme.qmax if scheme.narrow else float(scheme.qmax - scheme.qmin)


def _not_zero(graph: Graph, scale: str) -> str:
    """Something that can be divided by, where all values are zero."""
    zeros = graph.op("Equal", scale, graph.constant(np.array(0, dtype=np.float32)))
    return graph.op("Where", zeros, graph.number(_EPSILON), scale)
