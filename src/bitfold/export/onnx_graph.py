"""An ONNX graph that is built node by node, its weights written to a file beside it as they come."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfold.errors import MissingExtraError
from bitfold.export.artifact import tensor_sum

__all__ = ["DATA_FILE", "MICROSOFT", "Graph", "Stored", "onnx_package"]

# Attention, norms and rotary embeddings are nodes of 23. Each opset with the first intermediate representation for it.
_OPSET, _BASIC_OPSET = (23, 11), (21, 10)
MICROSOFT = "com.microsoft"
DATA_FILE = "model.onnx.data"
# Large tensors begin at a page of memory, so that they can be mapped; a page of Apple's processors has 16 KiB.
_PAGE, _LINE = 16384, 64


@dataclass(frozen=True)
class Stored:
    """A tensor of the data file: where its bytes are, and their sum (`tensor_sum`)."""

    offset: int
    length: int
    sum: str


class Graph:
    """Nodes, inputs and outputs; constants lie in the graph, weights in the data file, one at a time.

    Attributes: stored (weight's name → Stored), scope (put before the names of nodes), dtype (in which the model
    computes), basic (whether it does without the nodes of opset 23).
    """

    def __init__(
        self, data: BinaryIO, *, dtype: torch.dtype = torch.float32, basic: bool = False
    ) -> None:
        """data: where the weights go. Raises MissingExtraError without the package onnx."""
        self.dtype, self.basic = dtype, basic
        self._onnx = onnx_package()
        self._data = data
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._domains: set[str] = set()
        self._names = count()
        self.stored: dict[str, Stored] = {}
        self.scope = "model"

    # -- nodes -------------------------------------------------------------------------------------

    def op(
        self, kind: str, *inputs: str, domain: str = "", out: str = "", **attributes: Any
    ) -> str:
        """Add a node of one output, and give that value's name. An input that is left out is empty."""
        return self.ops(kind, inputs, [out or self._name(kind)], domain=domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[str]:
        """Add a node of several outputs, whose names are given; an empty one stands for a name of its own."""
        names = [name or self._name(kind) for name in outputs]
        node = self._onnx.helper.make_node(
            kind, list(inputs), names, name=names[0], domain=domain, **attributes
        )
        self._nodes.append(node)
        self._domains.add(domain)
        return names

    @contextmanager
    def within(self, scope: str) -> Iterator[None]:
        """Nodes that are added meanwhile are named after a part of the model."""
        before, self.scope = self.scope, scope
        yield
        self.scope = before

    def cast(self, value: str, dtype: torch.dtype) -> str:
        """A value in another dtype."""
        return self.op("Cast", value, to=self._type(dtype))

    def _name(self, kind: str) -> str:
        return f"{self.scope}/{kind}_{next(self._names)}"

    # -- values that are known ---------------------------------------------------------------------

    def constant(self, value: NDArray[Any]) -> str:
        """A small one, in the graph; the same values share a name."""
        value = np.ascontiguousarray(value).reshape(value.shape)
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._onnx.numpy_helper.from_array(value, name)
        name = self._constants[key].name
        assert isinstance(name, str)
        return name

    def number(self, value: float, dtype: torch.dtype = torch.float32) -> str:
        """A scalar."""
        return self.constant(torch.tensor(value, dtype=dtype).numpy())

    def integers(self, *values: int) -> str:
        """A vector of int64."""
        return self.constant(np.array(values, dtype=np.int64))

    def store(self, name: str, value: Tensor, shape: Sequence[int] | None = None) -> str:
        """Write a weight into the data file. shape: its shape, if another than the tensor's."""
        if name in self.stored:
            return name
        value = value.detach().contiguous()
        raw = value.reshape(-1).view(torch.uint8).numpy()
        step = _PAGE if raw.nbytes >= _PAGE else _LINE
        self._data.write(bytes(-self._data.tell() % step))
        self.stored[name] = Stored(self._data.tell(), raw.nbytes, tensor_sum(value))
        self._data.write(raw.data)
        proto = self._onnx.TensorProto(
            name=name,
            data_type=self._type(value.dtype),
            dims=list(value.shape if shape is None else shape),
            data_location=self._onnx.TensorProto.EXTERNAL,
        )
        place = self.stored[name]
        for key, entry in {
            "location": DATA_FILE,
            "offset": str(place.offset),
            "length": str(place.length),
        }.items():
            proto.external_data.add(key=key, value=entry)
        self._weights.append(proto)
        return name

    # -- the whole ---------------------------------------------------------------------------------

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> str:
        """Declare an input; a dimension that is not known has a name."""
        self._inputs.append(self._value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> None:
        """Declare an output, which a node must have made under this name."""
        self._outputs.append(self._value(name, dtype, shape))

    def to_bytes(self, name: str, metadata: dict[str, str]) -> bytes:
        """The file model.onnx, without the weights."""
        helper = self._onnx.helper
        opset, representation = _BASIC_OPSET if self.basic else _OPSET
        others = sorted(self._domains - {""})
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in others)]
        weights = [*self._weights, *self._constants.values()]
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, weights)
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=representation,
            producer_name="bitfold",
        )
        helper.set_model_props(model, metadata)
        content = model.SerializeToString()
        assert isinstance(content, bytes)
        return content

    def _value(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> Any:
        return self._onnx.helper.make_tensor_value_info(name, self._type(dtype), list(shape))

    def _type(self, dtype: torch.dtype) -> int:
        proto = self._onnx.TensorProto
        types = {
            torch.float32: proto.FLOAT,
            torch.float16: proto.FLOAT16,
            torch.bfloat16: proto.BFLOAT16,
            torch.float8_e4m3fn: proto.FLOAT8E4M3FN,
            torch.int64: proto.INT64,
            torch.int32: proto.INT32,
            torch.int8: proto.INT8,
            torch.uint8: proto.UINT8,
            torch.bool: proto.BOOL,
        }
        return int(types[dtype])


def onnx_package() -> Any:
    """The package onnx. Raises MissingExtraError without it."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(
            "ONNX files are written with the package onnx: pip install -c constraints.txt '.[onnx]'."
        ) from error
    return onnx
