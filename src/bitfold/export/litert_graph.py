"""A model of LiteRT (a TFLite flatbuffer) that is built operator by operator, its weights behind the flatbuffer.

LiteRT's schema.fbs: a buffer has its bytes inside, or an `offset` in the file and a `size`, which is what models of
more than 2 GB have. Here all have the latter, at multiples of 64 bytes.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from bitfold.errors import MissingExtraError
from bitfold.export.artifact import tensor_sum
from bitfold.export.onnx_graph import Stored

__all__ = ["TfGraph", "litert_schema"]

Array = NDArray[Any]
# Versions of operators whose first version does not say what is written here.
_VERSIONS = {"FULLY_CONNECTED": 5, "BATCH_MATMUL": 2, "SELECT_V2": 1}
_ALIGNED = 64


class TfGraph:
    """One subgraph, a signature `decode`, and its constants. A value is the index of its tensor.

    Weights are written to `data`, one at a time; `finish` puts them behind the flatbuffer. Dimensions that change are
    −1.
    """

    def __init__(self, data: BinaryIO) -> None:
        """Raises MissingExtraError without the package ai-edge-litert."""
        self._schema = litert_schema()
        self._data = data
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], int] = {}
        self._places: list[tuple[int, int]] = [(0, 0)]  # of the buffers: the first is empty
        self._inputs: list[tuple[str, int]] = []
        self._outputs: list[tuple[str, int]] = []
        self._sums: dict[str, Stored] = {}

    # -- values ------------------------------------------------------------------------------------

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> int:
        """Declare an input."""
        index = self._tensor(name, dtype, shape)
        self._inputs.append((name, index))
        return index

    def output(self, name: str, value: int) -> None:
        """Declare an output."""
        self._outputs.append((name, value))

    def constant(self, value: Array) -> int:
        """A small one; the same values are one."""
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self.weight(name, value, _TYPES[value.dtype.str])
        return self._constants[key]

    def integers(self, *values: int) -> int:
        """A vector of int32."""
        return self.constant(np.array(values, dtype=np.int32))

    def number(self, value: float) -> int:
        """A scalar float32."""
        return self.constant(np.array(value, dtype=np.float32))

    def weight(
        self,
        name: str,
        value: Array,
        dtype: str,
        shape: Sequence[int] | None = None,
        *,
        scales: Array | None = None,
        blocks: tuple[int, int] | None = None,
    ) -> int:
        """A constant. shape: if another than the array's. scales: float32, one for each row. blocks: of a weight that
        has them, the tensor of its scales [out, groups] float16, and how many inputs share one."""
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        self._data.write(bytes(-self._data.tell() % _ALIGNED))
        start = self._data.tell()
        self._data.write(raw.data)
        self._sums[name] = Stored(start, raw.nbytes, tensor_sum(torch.from_numpy(raw.copy())))
        self._places.append((start, raw.nbytes))
        index = self._tensor(name, dtype, value.shape if shape is None else shape)
        self._tensors[index].buffer = len(self._places) - 1
        schema = self._schema
        if scales is not None:
            its = schema.QuantizationParametersT()
            its.scale = scales.astype(np.float32)
            its.zeroPoint = np.zeros(len(scales), dtype=np.int64)
            self._tensors[index].quantization = its
        if blocks is not None:
            its = schema.QuantizationParametersT()
            of_blocks = schema.BlockwiseQuantizationT()
            of_blocks.scales, of_blocks.blockSize = blocks
            of_blocks.zeroPoints = -1
            its.detailsType = schema.QuantizationDetails.BlockwiseQuantization
            its.details = of_blocks
            self._tensors[index].quantization = its
        return index

    # -- operators ---------------------------------------------------------------------------------

    def op(
        self, kind: str, shape: Sequence[int], *inputs: int, dtype: str = "FLOAT32", **options: Any
    ) -> int:
        """Add an operator of one output of this shape, and give it. options: of the operator, by the schema's names."""
        return self.ops(kind, [shape], *inputs, dtype=dtype, **options)[0]

    def ops(
        self,
        kind: str,
        shapes: Sequence[Sequence[int]],
        *inputs: int,
        dtype: str = "FLOAT32",
        **options: Any,
    ) -> list[int]:
        """Add an operator of several outputs."""
        schema = self._schema
        made = schema.OperatorT()
        made.opcodeIndex = self._codes.setdefault(kind, len(self._codes))
        made.inputs = list(inputs)
        number = len(self._operators)
        outputs = [
            self._tensor(f"{kind}_{number}_{i}", dtype, shape) for i, shape in enumerate(shapes)
        ]
        made.outputs = outputs
        name = _OPTIONS.get(kind)
        if name is not None:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            made.builtinOptions = getattr(schema, f"{name}T")()
            for key, value in options.items():
                assert hasattr(made.builtinOptions, key), f"{name} has no {key}"
                setattr(made.builtinOptions, key, value)
        else:
            assert not options, kind
        self._operators.append(made)
        return outputs

    # -- the whole ---------------------------------------------------------------------------------

    def finish(self, file: Path, data: Path, description: str) -> dict[str, Stored]:
        """Write the flatbuffer, and behind it what went to `data`; the place of every weight, and of `the graph`."""
        size = len(self._packed(0, description))
        base = size + -size % _ALIGNED
        head = self._packed(base, description)
        assert len(head) == size
        head += bytes(base - size)
        with file.open("wb") as out, data.open("rb") as weights:
            out.write(head)
            while chunk := weights.read(1 << 24):
                out.write(chunk)
        stored, end = {}, 0
        raw = np.frombuffer(head, dtype=np.uint8).copy()
        stored["the graph"] = Stored(0, base, tensor_sum(torch.from_numpy(raw)))
        end = base
        for name, its in self._sums.items():
            stored[name] = Stored(base + its.offset, its.length, its.sum)
            end = max(end, base + its.offset + its.length)
        assert end == file.stat().st_size
        return stored

    def _packed(self, base: int, description: str) -> bytes:
        """The flatbuffer. base: where in the file the weights begin."""
        builders: Any = importlib.import_module("flatbuffers")
        schema = self._schema
        graph = schema.SubGraphT()
        graph.tensors, graph.operators, graph.name = self._tensors, self._operators, "decode"
        graph.inputs = [index for _, index in self._inputs]
        graph.outputs = [index for _, index in self._outputs]
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "decode", 0
        signature.inputs = [self._mapped(*one) for one in self._inputs]
        signature.outputs = [self._mapped(*one) for one in self._outputs]
        codes = []
        for kind in self._codes:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, kind)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            code.version = _VERSIONS.get(kind, 1)
            codes.append(code)
        buffers = []
        for start, length in self._places:
            buffer = schema.BufferT()
            if length:
                # Never 0, which is not written: both passes have the same size.
                buffer.offset, buffer.size = base + start + (base == 0), length
            buffers.append(buffer)
        model = schema.ModelT()
        model.version, model.description = 3, description
        model.subgraphs, model.operatorCodes, model.buffers = [graph], codes, buffers
        model.signatureDefs = [signature]
        builder = builders.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _mapped(self, name: str, index: int) -> Any:
        made = self._schema.TensorMapT()
        made.name, made.tensorIndex = name, index
        return made

    def _tensor(self, name: str, dtype: str, shape: Sequence[int]) -> int:
        made = self._schema.TensorT()
        made.name = name
        made.type = getattr(self._schema.TensorType, dtype)
        made.shape = [max(1, n) for n in shape]
        if any(n < 0 for n in shape):
            made.shapeSignature = list(shape)
        made.hasRank = True
        made.buffer = 0
        self._tensors.append(made)
        return len(self._tensors) - 1


_TYPES = {"<f4": "FLOAT32", "<f2": "FLOAT16", "<i4": "INT32", "|i1": "INT8", "|u1": "UINT8"}
_OPTIONS = {
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "RESHAPE": "ReshapeOptions",
    "SOFTMAX": "SoftmaxOptions",
    "MEAN": "ReducerOptions",
    "SPLIT": "SplitOptions",
    "CONCATENATION": "ConcatenationOptions",
    "GATHER": "GatherOptions",
    "ADD": "AddOptions",
    "SUB": "SubOptions",
    "MUL": "MulOptions",
    "TRANSPOSE": "TransposeOptions",
    "CAST": "CastOptions",
    "SLICE": "SliceOptions",
}


def litert_schema() -> Any:
    """The flatbuffer's schema, of the package ai-edge-litert. Raises MissingExtraError without it."""
    try:
        return importlib.import_module("ai_edge_litert.schema_py_generated")
    except ImportError as error:
        raise MissingExtraError(
            "Models of LiteRT are written with the package ai-edge-litert: pip install -c constraints.txt '.[litert]', "
            "or make an environment by scripts/make_phones_environment.sh."
        ) from error
