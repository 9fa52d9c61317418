"""A graph of `onnx_decoder` as OpenVINO's own: attention in one operation, the cache as variables of the model."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch

from bitfold.export.artifact import tensor_sum
from bitfold.export.onnx_graph import DATA_FILE as ONNX_DATA_FILE
from bitfold.export.onnx_graph import Stored
from bitfold.export.openvino_linear import DOMAIN, linear_of_node
from bitfold.export.openvino_package import openvino_package

__all__ = ["DATA_FILE", "GRAPH_FILE", "write_graph"]

GRAPH_FILE, DATA_FILE = "openvino_model.xml", "openvino_model.bin"
# What OpenVINO would round to 8 bits by itself: the inputs of weights in few bits, keys and values.
_OPTIONS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
_CACHE, _NEXT = "past_key_values.", "present."


def write_graph(
    graph: Path, stored: Mapping[str, Stored], directory: Path, made_by: str
) -> Mapping[str, Stored]:
    """Write an ONNX graph as openvino_model.xml and .bin; where each constant lies in the latter, by name.

    graph, stored: a directory with model.onnx and its weights, and where they lie.

    Its inputs are input_ids, attention_mask, position_ids and beam_idx, the rows of the cache that each row of the
    batch goes on from; its output is logits. Weights are copied from file to file.
    """
    package = openvino_package()
    extension = package.frontend.onnx.ConversionExtension
    # Mapped here, because what the frontend has mapped is gone when it has read the graph.
    data = np.memmap(graph / ONNX_DATA_FILE, mode="r")
    weights = {name: data[at.offset : at.offset + at.length] for name, at in stored.items()}
    core = package.Core()
    core.add_extension(extension("Linear", DOMAIN, partial(linear_of_node, weights=weights)))
    core.add_extension(extension("Attention", _attention_of_node))
    model = core.read_model(graph / "model.onnx")
    _keep_cache(package, model)
    for name, value in _OPTIONS.items():
        model.set_rt_info(value, ["runtime_options", name])
    model.set_rt_info(made_by, "bitfold")
    package.save_model(model, directory / GRAPH_FILE, compress_to_fp16=False)
    return _stored(directory)


def _stored(directory: Path) -> Mapping[str, Stored]:
    """Of every constant."""
    stored = {}
    with (directory / DATA_FILE).open("rb") as data:
        for _, layer in ElementTree.iterparse(directory / GRAPH_FILE):
            if layer.tag != "layer" or layer.get("type") != "Const":
                continue
            place = layer.find("data")
            assert place is not None
            offset, length = int(place.attrib["offset"]), int(place.attrib["size"])
            data.seek(offset)
            raw = torch.from_numpy(np.frombuffer(bytearray(data.read(length)), dtype=np.uint8))
            stored[layer.attrib["name"]] = Stored(offset, length, tensor_sum(raw))
    return stored


def _attention_of_node(node: Any) -> list[Any]:
    """ONNX's Attention (opset 23) of queries, keys and values [batch, length, heads · head_dim], what is added to
    scores, and a cache [batch, KV heads, past, head_dim], as the operations that OpenVINO's plugins run as one."""
    package = openvino_package()
    op = package.opset15
    query, key, value, mask, *past = (node.get_input(i) for i in range(6))
    heads, kv_heads = (node.get_attribute(f"{name}_num_heads") for name in ("q", "kv"))
    head_dim = past[0].get_partial_shape()[3].get_length()

    def by_head(x: Any, count: int) -> Any:
        x = op.reshape(x, _integers(op, 0, 0, count, head_dim), special_zero=True)
        return op.transpose(x, _integers(op, 0, 2, 1, 3))

    def for_queries(x: Any) -> Any:
        """Each KV head as often as there are queries that share it."""
        if heads == kv_heads:
            return x
        shape = _integers(op, 1, 1, heads // kv_heads, 1, 1)
        x = op.broadcast(op.unsqueeze(x, _integers(op, 2)), shape, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(x, _integers(op, 0, heads, -1, head_dim), special_zero=True)

    key, value = (
        op.concat([before, by_head(x, kv_heads)], 2)
        for before, x in zip(past, (key, value), strict=True)
    )
    result = op.scaled_dot_product_attention(
        by_head(query, heads),
        for_queries(key),
        for_queries(value),
        mask,
        op.constant(np.array(node.get_attribute("scale"), dtype=np.float32)),
        causal=False,
    )
    result = op.transpose(result, _integers(op, 0, 2, 1, 3))
    result = op.reshape(result, _integers(op, 0, 0, heads * head_dim), special_zero=True)
    return [x.output(0) for x in (result, key, value)]


def _keep_cache(package: Any, model: Any) -> None:
    """Make variables of the cache's inputs and outputs, which begin with no tokens."""
    op = package.opset15
    rows = op.parameter([-1], np.int32, name="beam_idx")
    rows.output(0).get_tensor().set_names({"beam_idx"})
    tokens = op.shape_of(model.input("input_ids").get_node(), output_type="i64")
    zero = op.constant(np.array(0, dtype=np.int64))
    batch = op.gather(tokens, _integers(op, 0), zero)
    results = {name: result for result in model.get_results() for name in _names(result.input(0))}
    variables, sinks = [], []
    for past in model.get_parameters():
        name = past.output(0).get_any_name()
        if not name.startswith(_CACHE):
            continue
        heads, head_dim = (past.get_partial_shape()[axis].get_length() for axis in (1, 3))
        info = package.op.util.VariableInfo()
        info.variable_id = name
        info.data_type = past.get_element_type()
        info.data_shape = package.PartialShape([-1, heads, -1, head_dim])
        variable = package.op.util.Variable(info)
        empty = op.concat([batch, _integers(op, heads, 0, head_dim)], 0)
        nothing = op.constant(np.array(0, dtype=np.float32))
        read = op.read_value(op.broadcast(nothing, empty), variable)
        past.output(0).replace(op.gather(read, rows, zero).output(0))
        result = results[name.replace(_CACHE, _NEXT)]
        sinks.append(op.assign(result.input_value(0).get_node(), variable))
        variables.append(variable)
        model.remove_result(result)
        model.remove_parameter(past)
    model.add_variables(variables)
    model.add_sinks(sinks)
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()


def _names(place: Any) -> set[str]:
    return set(place.get_source_output().get_names())


def _integers(op: Any, *values: int) -> Any:
    return op.constant(np.array(values, dtype=np.int64))
