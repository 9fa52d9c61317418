"""The form for TensorRT: it keeps to the rules, runs in ONNX Runtime, and what breaks a rule is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_onnx_file import IDS, distance, exactly, quantized

import bitfold
from bitfold.errors import ExportError
from bitfold.export.exporting import export_to
from models_zoo import CONFIGS, TOKENS, Zoo

pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")

import onnx

from bitfold.engines.onnx_runtime import OnnxRuntime
from bitfold.engines.verify_onnx import verify_onnx
from bitfold.export.onnx_tensorrt import tensorrt_faults

INT8 = ("w8a8", "weight.symmetric=true", "activation.static=true")


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_itself_in_half_precision(
    family: str, checkpoint: Zoo, tmp_path: Path
) -> None:
    model = checkpoint(family, torch.float32)
    export_to(model, "onnx", tmp_path / "model", form="tensorrt")
    engine, tokens = OnnxRuntime(tmp_path / "model"), TOKENS[0]
    with torch.no_grad():
        expected = exactly(model)(TOKENS[:1]).logits[0]
    assert distance(engine.logits(tokens), expected) < 0.02
    engine.start()
    pieces = [engine.decode(tokens[:7].tolist())]
    pieces += [engine.decode([int(token)]) for token in tokens[7:]]
    assert distance(torch.cat(pieces), expected) < 0.02
    assert tensorrt_faults(tmp_path / "model" / "model.onnx") == []


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("tensorrt") / "artifact", *INT8)


@pytest.fixture(scope="module")
def directory(artifact: Path) -> Path:
    out = artifact.parent / "model"
    export_to(artifact, "onnx", out, form="tensorrt")
    return out


def test_an_artifact_is_itself(artifact: Path, directory: Path) -> None:
    assert verify_onnx(directory).difference is not None
    with torch.no_grad():
        expected = exactly(artifact)(IDS[None]).logits[0]
    difference = (OnnxRuntime(directory).logits(IDS) - expected).square().mean().sqrt()
    assert difference / expected.std() < 0.1  # what half precision makes in PyTorch too


def test_integers_are_the_artifacts(artifact: Path, directory: Path) -> None:
    from bitfold.export.reading import read_model

    model = onnx.load(directory / "model.onnx")
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    stored, name = read_model(artifact), "model.layers.2.mlp.down_proj.weight"
    value: Any = stored.read(name)
    assert np.array_equal(found[name].T, value.codes.numpy())
    assert np.array_equal(found[f"{name}.scales"], value.scale.flatten().half().numpy())


def test_layers_that_are_left_alone_are_in_half_precision(tmp_path: Path) -> None:
    bitfold.quantize(
        Path(bitfold.__file__).parent / "assets" / "tiny-llama", tmp_path / "artifact", method="rtn",
        scheme=INT8[0], set=INT8[1:], samples=2, ignore="*.down_proj",
    )  # fmt: skip
    exported = export_to(tmp_path / "artifact", "onnx", tmp_path / "model", form="tensorrt")
    of_down = 6 * 256 * 768
    assert exported.types["INT8"] == 4_718_592 - of_down
    assert exported.types["FLOAT16"] == 4096 * 256 + of_down
    assert verify_onnx(tmp_path / "model").difference is not None


@pytest.mark.parametrize(
    "asked",
    [
        ("w4a16g128",),
        ("w8a8", "weight.symmetric=true"),
        ("w8a8", "activation.static=true"),
        (*INT8, "activation.symmetric=false"),
    ],
)
def test_what_tensorrt_does_not_take_is_refused(asked: tuple[str, ...], tmp_path: Path) -> None:
    model = quantized(tmp_path / "artifact", *asked)
    with pytest.raises(ExportError, match=r"TensorRT runs model\.layers\.0\.self_attn\.q_proj in"):
        export_to(model, "onnx", tmp_path / "model", form="tensorrt")
    assert [file.name for file in tmp_path.iterdir()] == ["artifact"]


# -- each rule, broken ----------------------------------------------------------------------------


def _node(graph: Any, kind: str, place: int = 0) -> Any:
    return [node for node in graph.node if node.op_type == kind][place]


def _set(graph: Any, name: str, value: Any) -> str:
    """Another constant under this name."""
    graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), f"broken.{name}"))
    return f"broken.{name}"


def _asymmetric(graph: Any) -> None:
    node = _node(graph, "QuantizeLinear")
    node.input[2] = _set(graph, "zero", np.int8(3))


def _unsigned(graph: Any) -> None:
    node = _node(graph, "QuantizeLinear")
    node.input[2] = _set(graph, "zero", np.uint8(0))


def _negative(graph: Any) -> None:
    node = _node(graph, "QuantizeLinear")
    node.input[1] = _set(graph, "scale", np.float16(-1))


def _channels_of_inputs(graph: Any) -> None:
    node = _node(graph, "QuantizeLinear")
    node.input[1] = _set(graph, "scale", np.ones(256, dtype=np.float16))


def _wrong_axis(graph: Any) -> None:
    node = next(n for n in graph.node if n.op_type == "DequantizeLinear" and n.attribute)
    node.attribute[0].i = 0


def _running_scale(graph: Any) -> None:
    node = _node(graph, "QuantizeLinear")
    node.input[1] = node.input[0]


def _other_scale(graph: Any) -> None:
    node = next(n for n in graph.node if n.op_type == "DequantizeLinear" and not n.attribute)
    node.input[1] = _set(graph, "scale", np.float16(0.25))


def _half_quantized(graph: Any) -> None:
    pair = next(n for n in graph.node if n.op_type == "DequantizeLinear" and not n.attribute)
    reader = next(n for n in graph.node if pair.output[0] in n.input)
    reader.input[0] = _node(graph, "QuantizeLinear").input[0]


def _elsewhere(graph: Any) -> None:
    pair = next(n for n in graph.node if n.op_type == "DequantizeLinear" and not n.attribute)
    _node(graph, "Sigmoid").input[0] = pair.output[0]


def _integer_node(graph: Any) -> None:
    _node(graph, "MatMul").op_type = "MatMulInteger"


BROKEN: dict[str, tuple[Callable[[Any], None], str]] = {
    "a zero-point": (_asymmetric, "zero-points of .* are not all 0"),
    "unsigned": (_unsigned, "zero-points of .* are not all 0 of INT8"),
    "a negative scale": (_negative, "scale of .* is not above 0"),
    "channels of inputs": (_channels_of_inputs, "which only weights may have"),
    "the wrong axis": (_wrong_axis, "not those of the output channels"),
    "a scale that is computed": (_running_scale, "scale of .* is no constant"),
    "two scales": (_other_scale, "has another scale than the node that it follows"),
    "one input": (_half_quantized, "one quantized input and one that is not"),
    "a pair elsewhere": (_elsewhere, "is followed by .*Sigmoid"),
    "integer nodes": (_integer_node, "is MatMulInteger"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_what_breaks_a_rule_is_named(rule: str, directory: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(directory, tmp_path / "broken")
    change, sentence = BROKEN[rule]
    model = onnx.load(broken / "model.onnx", load_external_data=False)
    change(model.graph)
    (broken / "model.onnx").write_bytes(model.SerializeToString())
    faults = tensorrt_faults(broken / "model.onnx")
    assert any(re.search(sentence, fault) for fault in faults), faults


def test_the_other_forms_are_not_tensorrts(artifact: Path, tmp_path: Path) -> None:
    export_to(artifact, "onnx", tmp_path / "model")
    faults = tensorrt_faults(tmp_path / "model" / "model.onnx")
    assert "The graph is of opset 23, above 21" in faults
    assert any("MatMulInteger" in fault for fault in faults)
    assert json.loads((tmp_path / "model" / "export.json").read_text())["form"] == "fast"
