"""What llama.cpp and ONNX Runtime make of a model by their own quantizers, in files of the same layout as bitfold's.

llama.cpp: `ggml_quantize_chunk` in the library that xllamacpp brings, which its llama-quantize calls for every tensor;
with an importance of each input, as its `--imatrix` gives it, or without. The same tensors are quantized, to one type,
as in bitfold's files ("--pure", embeddings left as they are). ONNX Runtime: `MatMulNBitsQuantizer`.
"""

import ctypes
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["importances", "llama_cpp_quantized", "onnx_runtime_quantized"]

Floats = NDArray[np.float32]
_LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def importances(model: Path, windows: NDArray[Any]) -> dict[str, Floats]:
    """Mean square of each input of every linear layer on windows of token ids, by its name in llama.cpp: what its
    llama-imatrix collects."""
    import gguf

    import bitfold

    loaded = bitfold.load(model, dtype="float32")
    arch = gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(arch, loaded.config.num_hidden_layers)
    sums: dict[str, torch.Tensor] = {}

    def watch(place: str) -> Any:
        def hook(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            found = inputs[0].flatten(0, -2).double().square().mean(dim=0)
            sums[place] = sums.get(place, torch.zeros_like(found)) + found

        return hook

    for name, layer in loaded.named_modules():
        place = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if isinstance(layer, torch.nn.Linear) and place is not None:
            layer.register_forward_pre_hook(watch(place))
    with torch.no_grad():
        for row in torch.from_numpy(np.asarray(windows)).long():
            loaded(row[None])
    return {
        place: (total / len(windows)).float().numpy().astype(np.float32)
        for place, total in sums.items()
    }


def llama_cpp_quantized(
    plain: Path, out: Path, type_: str, importance: Mapping[str, Floats] | None
) -> None:
    """A GGUF file that is not quantized (`bitfold export MODEL --to gguf`) with the linear layers of its blocks in one
    of ggml's types."""
    import gguf

    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, one in reader.fields.items():
        if name != "general.architecture" and not name.startswith(("GGUF.", "bitfold.")):
            inner = one.types[-1] if one.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, one.contents(), one.types[0], sub_type=inner)
    kind = gguf.GGMLQuantizationType[type_]
    for tensor in reader.tensors:
        if tensor.name.split(".")[-2] in _LINEARS and tensor.name.endswith(".weight"):
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            squares = None if importance is None else importance[tensor.name]
            writer.add_tensor(tensor.name, _rows(weight, kind, squares), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rows(weight: Floats, kind: Any, importance: Floats | None) -> NDArray[np.uint8]:
    """[out, in] in one of ggml's types: [out, bytes]."""
    import gguf

    package = find_spec("xllamacpp")
    assert package is not None
    assert package.origin is not None
    library = ctypes.CDLL(str(next(Path(package.origin).parent.glob("*.so"))))
    inputs, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    found = np.zeros((rows, columns // inputs * size), dtype=np.uint8)
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    pointer = ctypes.c_void_p
    quantize.argtypes = [
        ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer,
    ]  # fmt: skip
    weight = np.ascontiguousarray(weight)
    squares = None if importance is None else np.ascontiguousarray(importance)
    written = quantize(
        int(kind), weight.ctypes.data, found.ctypes.data, 0, rows, columns,
        None if squares is None else squares.ctypes.data,
    )  # fmt: skip
    assert written == found.nbytes
    return found


def onnx_runtime_quantized(plain: Path, out: Path, bits: int, block: int, algorithm: str) -> None:
    """A directory that is not quantized (`bitfold export MODEL --to onnx`) with the matrices of its blocks quantized:
    `rtn`, or ONNX Runtime's `k_quant`, which looks for scales."""
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as own

    shutil.copytree(plain, out, ignore=shutil.ignore_patterns("model.onnx*", "export.json"))
    model = onnx.load(plain / "model.onnx")
    _make_constant(model.graph)
    config = (
        own.KQuantWeightOnlyQuantConfig()
        if algorithm == "k_quant"
        else own.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=False, bits=bits)
    )
    quantizer = own.MatMulNBitsQuantizer(
        model, block_size=block, is_symmetric=False, bits=bits, algo_config=config
    )
    quantizer.process()
    onnx.save(quantizer.model.model, out / "model.onnx", save_as_external_data=True)


def _make_constant(graph: Any) -> None:
    """Matrices of the blocks' products as float32 constants [in, out], which the quantizer looks for; in the file they
    are [out, in] and perhaps in half the precision, and are turned and cast as it runs."""
    from onnx import numpy_helper

    made_by = {node.output[0]: node for node in graph.node}
    stored = {one.name: one for one in graph.initializer}
    for node in graph.node:
        turned = made_by.get(node.input[1]) if node.op_type == "MatMul" else None
        if turned is None or turned.op_type != "Transpose" or node.name.startswith("lm_head"):
            continue
        name = turned.input[0] if turned.input[0] in stored else made_by[turned.input[0]].input[0]
        values = torch.from_numpy(numpy_helper.to_array(stored[name]).astype(np.float32))
        graph.initializer.append(
            numpy_helper.from_array(values.T.contiguous().numpy(), f"{name}.turned")
        )
        node.input[1] = f"{name}.turned"
        graph.initializer.remove(stored.pop(name))
    used = {name for node in graph.node for name in node.input}
    used |= {one.name for one in graph.output}
    while dead := [node for node in graph.node if not used.intersection(node.output)]:
        for node in dead:
            graph.node.remove(node)
        used = {name for node in graph.node for name in node.input}
        used |= {one.name for one in graph.output}
