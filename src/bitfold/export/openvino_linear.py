"""A linear layer in OpenVINO: its codes in the element types that there are, with scales and zero-points as they are.

A value is s · (q − z), s in float32. Convert, Subtract and Multiply before a MatMul are what OpenVINO's plugins
multiply without unpacking the weight (its documentation of weight compression). 2 bits lie in u2, 3 and 4 in u4, or i4
where they are symmetric, 5 to 8 in u8 or i8; nf4, fp8 and the codes of mxfp4 and nvfp4 in types of their own.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfold.export.onnx_graph import Graph
from bitfold.export.onnx_integers import in_bytes
from bitfold.export.onnx_linear import Linears
from bitfold.export.openvino_package import openvino_package
from bitfold.export.reading import StoredModel
from bitfold.numerics import QuantizedTensor, TensorScheme

__all__ = ["DOMAIN", "OpenVinoLinears", "linear_of_node"]

DOMAIN = "bitfold"
_FLOATS = {"nf4": "nf4", "fp8_e4m3": "f8e4m3", "mxfp4": "f4e2m1", "nvfp4": "f4e2m1"}


class OpenVinoLinears(Linears):
    """Linear layers as nodes of bitfold's own, which `linear_of_node` makes OpenVINO's of."""

    def __init__(self, graph: Graph, model: StoredModel) -> None:
        super().__init__(graph, model, "compact")

    def _product(
        self,
        layer: str,
        x: str,
        name: str,
        value: QuantizedTensor | Tensor,
        activation: TensorScheme | None,
        calibrated: Mapping[str, Tensor],
    ) -> str:
        if activation is not None:
            x = self._rounded(x, value, activation, calibrated)
        if isinstance(value, Tensor):
            return self._plain(x, name, value)
        if value.codebook is not None:
            return self._values(layer, x, value)
        return self._with_kept(layer, x, value, [self._in_few_bits(layer, x, value)])

    def _rounded(
        self,
        x: str,
        value: QuantizedTensor | Tensor,
        scheme: TensorScheme,
        calibrated: Mapping[str, Tensor],
    ) -> str:
        """Where OpenVINO multiplies integers by integers as they are, inputs are rounded by a pair of nodes, from which
        it learns that; elsewhere by the simulation's arithmetic."""
        if not _in_integers(value, scheme):
            return self._fake_quantized(x, scheme, calibrated)
        graph = self._graph
        middle = 128 if scheme.symmetric else 128 + int(calibrated["input_zero_point"])
        scale = graph.number(calibrated["input_scale"].float().item())
        point = graph.constant(np.array(middle, dtype=np.uint8))

        def pair() -> str:
            units = graph.op("QuantizeLinear", x, scale, point)
            return graph.op("DequantizeLinear", units, scale, point)

        return self._once(("static", x, scale, point), pair)

    def _in_few_bits(self, layer: str, x: str, value: QuantizedTensor) -> str:
        """x times the weight's codes, of which those at columns that are kept beside them stand for zeros."""
        graph, (rows, width) = self._graph, value.shape
        groups = value.scale.shape[1]
        kind, bits, codes, zeros = _codes(value)
        scales = value.scale.float().expand(rows, groups)
        if value.global_scale is not None:
            scales = scales / value.global_scale
        inputs = [
            x,
            graph.store(f"{layer}.weight", in_bytes(codes.flatten(), bits)),
            graph.store(f"{layer}.weight.scales", scales),
        ]
        if zeros is not None:
            packed = in_bytes(zeros.expand(rows, groups).flatten(), bits)
            inputs.append(graph.store(f"{layer}.weight.zero_points", packed))
        self.types[kind.upper()] += rows * width
        return graph.op(
            "Linear", *inputs, domain=DOMAIN, type=kind, rows=rows, width=width, groups=groups
        )


def linear_of_node(node: Any, weights: Mapping[str, NDArray[Any]]) -> list[Any]:
    """The output of a node of `OpenVinoLinears`, x [..., width] times a weight [rows, width], in OpenVINO's operations.

    node: the frontend's, which has its inputs and attributes. weights: bytes by name; they must stay for as long as the
    output is in use, since they are not copied.
    """
    package = openvino_package()
    op = package.opset15
    kind = getattr(package.Type, node.get_attribute("type"))  # Type("u4") would be NumPy's: uint32
    rows, width, groups = (node.get_attribute(name) for name in ("rows", "width", "groups"))
    in_groups = (rows, width) if groups == 1 else (rows, groups, width // groups)
    per_group = (*in_groups[:-1], 1)

    def constant(place: int, kind: Any, shape: tuple[int, ...]) -> Any:
        """What is stored, as it lies in memory, under its name."""
        name = node.get_input(place).get_node().get_friendly_name()
        made = op.constant(package.Tensor(weights[name], package.Shape(shape), kind))
        made.set_friendly_name(name)
        return made

    weight = op.convert(constant(1, kind, in_groups), package.Type.f32)
    if node.get_input_size() > 3:
        zeros = constant(3, kind, per_group)
        weight = op.subtract(weight, op.convert(zeros, package.Type.f32))
    weight = op.multiply(weight, constant(2, package.Type.f32, per_group))
    if groups > 1:
        shape = op.constant(np.array((rows, width), dtype=np.int64))
        weight = op.reshape(weight, shape, special_zero=False)
    return [op.matmul(node.get_input(0), weight, False, True).output(0)]


def _codes(value: QuantizedTensor) -> tuple[str, int, Tensor, Tensor | None]:
    """OpenVINO's element type, its bits, codes [out, in] uint8 in as many, and zero-points [out, groups] of the same
    type."""
    scheme = value.scheme
    if scheme.grid != "int":
        return _FLOATS[scheme.grid], scheme.bits, value.codes.view(torch.uint8), None
    bits = next(bits for bits in (2, 4, 8) if bits >= scheme.bits)
    # There is no i2.
    half = 0 if value.zero is None and bits > 2 else 1 << (bits - 1)
    zeros = torch.zeros_like(value.scale, dtype=torch.int16)
    if value.zero is not None:
        zeros = value.zero.to(torch.int16)
    codes, zeros = value.codes.to(torch.int16) + half, zeros + half
    if value.columns is not None:
        at = value.columns.long()
        group = value.shape[1] // zeros.shape[1]
        codes[:, at] = zeros.expand(value.shape[0], -1)[:, at // group]
    most = (1 << bits) - 1
    kind = f"{'u' if half else 'i'}{bits}"
    codes, zeros = ((x & most).to(torch.uint8) for x in (codes, zeros))
    return kind, bits, codes, zeros if half else None


def _in_integers(value: QuantizedTensor | Tensor, activation: TensorScheme) -> bool:
    """Whether both have 8 bits, inputs one range that is known beforehand, and weights no zero-points: with these
    OpenVINO computed something else (0.04 of the logits' spread)."""
    if isinstance(value, Tensor) or value.kept is not None:
        return False
    weight = value.scheme
    return (
        (weight.grid, activation.grid, activation.bits) == ("int", "int", 8)
        and weight.bits > 4
        and weight.symmetric
        and weight.granularity in ("channel", "tensor")
        and activation.static
        and activation.granularity == "tensor"
        and not activation.clusters
        and not activation.narrow
    )
