"""Inputs are rounded by ONNX's nodes to the very numbers of the simulation."""

import io
from typing import Any

import pytest
import torch

from bitfold.errors import ExportError
from bitfold.numerics import TensorScheme
from bitfold.numerics.activation import quantize_input

pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")

from bitfold.export.onnx_activations import check_activation, fake_quantized
from bitfold.export.onnx_graph import Graph

SCHEMES: dict[str, dict[str, Any]] = {
    "token": {"granularity": "token"},
    "token, asymmetric": {"granularity": "token", "bits": 4, "symmetric": False},
    "narrow": {"granularity": "token", "narrow": True},
    "clipped": {"granularity": "token", "bits": 4, "clipped": True},
    "clipped, asymmetric": {
        "granularity": "token", "bits": 4, "clipped": True, "symmetric": False,
    },
    "group": {"granularity": "group", "group_size": 16, "bits": 3, "symmetric": False},
    "tensor": {"granularity": "tensor"},
    "static": {"granularity": "tensor", "static": True},
    "static, asymmetric": {"granularity": "tensor", "static": True, "symmetric": False},
    "clusters": {
        "granularity": "cluster", "clusters": 3, "static": True, "symmetric": False, "bits": 4,
    },
    "fp8": {"granularity": "token", "grid": "fp8_e4m3"},
    "static fp8": {"granularity": "tensor", "grid": "fp8_e4m3", "static": True},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_the_numbers_are_the_simulations(name: str) -> None:
    scheme = TensorScheme(**SCHEMES[name])
    torch.manual_seed(0)
    x = torch.randn(2, 5, 48) * torch.tensor([0.01, 1.0, 40.0]).repeat(16)
    x[0, 0], x[1, 2], x[0, 3] = 0, 0.3, x[0, 3].abs()
    count = scheme.clusters or 1
    calibrated = {}
    if scheme.static:
        calibrated["input_scale"] = torch.rand(count) + 0.1
        calibrated["input_zero_point"] = torch.arange(count, dtype=torch.int8) - 3
    if scheme.clipped:
        calibrated["input_share"] = torch.tensor([0.8])
    if scheme.clusters:
        calibrated["input_clusters"] = (torch.arange(48) % 3).to(torch.uint8)
    expected = quantize_input(
        x,
        scheme,
        calibrated.get("input_scale", calibrated.get("input_share")),
        calibrated.get("input_zero_point"),
        calibrated.get("input_clusters"),
    )

    graph = Graph(io.BytesIO())
    result = fake_quantized(
        graph, graph.input("x", torch.float32, ("a", "b", 48)), scheme, calibrated
    )
    graph.op("Identity", result, out="y")
    graph.output("y", torch.float32, ("a", "b", 48))
    import onnxruntime

    session = onnxruntime.InferenceSession(graph.to_bytes("inputs", {}))
    found = torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"grid": "nf4", "bits": 4, "granularity": "token"}, "q_proj has inputs on the grid nf4"),
        ({"granularity": "cluster", "clusters": 2}, "q_proj has inputs in clusters"),
    ],
)
def test_what_has_no_nodes_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ExportError, match=sentence):
        check_activation("q_proj", TensorScheme(**fields))
