"""The tensors of bitsandbytes' checkpoints, read: 4 bits (nf4, fp4; absmax nested or not) and LLM.int8.

From the layouts of its QuantState and Linear8bitLt (the tests hold them against a writer of their own; files that
bitsandbytes 0.50 wrote gave its values to the last bit). A weight is flattened, and `blocksize` adjacent values share a
scale, across rows where a row is no multiple: groups of the greatest common divisor of both say the same.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor

from bitfold.errors import CheckpointError
from bitfold.models.checkpoint import Checkpoint
from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.numerics.nested_scale import NestedScale
from bitfold.numerics.quantize import NF4_LEVELS

__all__ = ["NAME", "PARTS", "Loose", "decode", "nested", "read_layers"]

NAME = "bitsandbytes"
_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *_STATES)
PARTS = (*(f"weight.{part}" for part in _BESIDE), "SCB", "weight_format")
"""Behind a layer's name: what belongs to its weight."""

Loose = Callable[[str, Mapping[str, Tensor]], Tensor]
"""Makes values [out, in] of a layer's tensors, by its name."""


def read_layers(checkpoint: Checkpoint) -> tuple[dict[str, TensorScheme], dict[str, Loose]]:
    """The schemes of the layers whose weights bitfold's own format holds, and for other layers what makes their weights
    floating point: those of fp4, whose levels are no grid of bitfold's.

    Raises CheckpointError for what is damaged or stored in another way.
    """
    schemes: dict[str, TensorScheme] = {}
    loose: dict[str, Loose] = {}
    for name in checkpoint.tensors:
        if name.endswith(".SCB"):
            schemes[name.removesuffix(".SCB")] = TensorScheme(bits=8, granularity="channel")
        for state in _STATES:
            if name.endswith(f".weight.{state}"):
                layer = name.removesuffix(f".weight.{state}")
                _place(layer, _state(checkpoint, layer, name), checkpoint, schemes, loose)
    for name, info in checkpoint.tensors.items():
        layer = name.removesuffix(".weight")
        packed = info.dtype in (torch.uint8, torch.int8) and layer != name
        if packed and layer not in schemes and layer not in loose:
            raise CheckpointError(
                f"{checkpoint.path} has {name} in few bits without what says how (its quant_state, or SCB): the "
                "checkpoint is incomplete, or of an older bitsandbytes; save it again."
            )
    return schemes, loose


def decode(name: str, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> QuantizedTensor:
    """A weight of a scheme that `read_layers` gave; KeyError, RuntimeError or ValueError where it is damaged."""
    if scheme.grid == "int":
        codes, largest = tensors[f"{name}.weight"], tensors[f"{name}.SCB"]
        if codes.dtype != torch.int8 or codes.ndim != 2 or largest.shape != codes.shape[:1]:
            raise ValueError(f"SCB {list(largest.shape)} of a weight {list(codes.shape)}")
        if f"{name}.weight_format" in tensors and int(tensors[f"{name}.weight_format"]):
            raise ValueError("its rows lie in the order of a GPU's tiles")
        return QuantizedTensor(codes, largest[:, None].float() / 127, None, scheme)
    state = _parsed(tensors[f"{name}.weight.{_STATES[0]}"])
    levels = tensors[f"{name}.weight.quant_map"]
    if not torch.equal(levels, torch.tensor(NF4_LEVELS, dtype=levels.dtype)):
        raise ValueError("its quant_map is not nf4's")
    rows, columns = state["shape"]
    absmax = _absmax(name, tensors, state)
    # Groups that no block and no row ends within.
    start = torch.arange(0, rows * columns, gcd(columns, state["blocksize"]))
    scale = absmax[start // state["blocksize"]].reshape(rows, -1)
    return QuantizedTensor(_codes(name, tensors, state), scale, None, scheme)


def nested(name: str, tensors: Mapping[str, Tensor]) -> NestedScale | None:
    """The nested scales of a weight, as they are stored; None where its blocks are not the groups of `decode`.

    Their values are the scales of `decode`.
    """
    state = _parsed(tensors[f"{name}.weight.{_STATES[0]}"])
    rows, columns = state["shape"]
    absmax = tensors[f"{name}.weight.absmax"].flatten()
    if columns % state["blocksize"] or absmax.numel() != rows * columns // state["blocksize"]:
        return None
    return NestedScale(
        codes=absmax.view(rows, -1),
        levels=tensors[f"{name}.weight.nested_quant_map"].float(),
        outer=tensors[f"{name}.weight.nested_absmax"].float(),
        mean=torch.tensor(float(state["nested_offset"])),
        block=int(state["nested_blocksize"]),
    )


def _place(
    layer: str,
    state: Mapping[str, Any],
    checkpoint: Checkpoint,
    schemes: dict[str, TensorScheme],
    loose: dict[str, Loose],
) -> None:
    """A layer of 4 bits among those with a scheme, or those without."""
    stored = checkpoint.tensors.get(f"{layer}.weight")
    if stored is not None and stored.dtype != torch.uint8:
        raise CheckpointError(
            f"{checkpoint.path} stores the 4 bits of {layer} as {stored.dtype} (bnb_4bit_quant_storage), and bitfold "
            "reads bytes: save it with uint8."
        )
    columns = state["shape"][1]
    size = gcd(columns, state["blocksize"])
    if state["quant_type"] != "nf4" or size < 2:
        loose[layer] = partial(_values, state=state)
        return
    where: dict[str, Any] = {"granularity": "channel"}
    if size < columns:
        where = {"granularity": "group", "group_size": size}
    schemes[layer] = TensorScheme.model_validate({"grid": "nf4", "bits": 4} | where)


def _state(checkpoint: Checkpoint, layer: str, name: str) -> dict[str, Any]:
    try:
        return _parsed(checkpoint.read([name])[name])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path} does not say how the weight of {layer} is quantized ({' '.join(str(error).split())}): "
            "copy or save it again."
        ) from error


def _parsed(packed: Tensor) -> dict[str, Any]:
    """A QuantState's settings, JSON as bytes; ValueError, KeyError or TypeError for what they cannot be."""
    state: dict[str, Any] = json.loads(bytes(packed.tolist()))
    rows, columns = (int(size) for size in state["shape"])
    if min(rows, columns, int(state["blocksize"])) < 1 or state["quant_type"] not in ("nf4", "fp4"):
        raise ValueError(f"{state['quant_type']} in blocks of {state['blocksize']}")
    if state["dtype"] not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"values in {state['dtype']}")
    return state | {"shape": (rows, columns), "blocksize": int(state["blocksize"])}


def _codes(name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    """[out, in] uint8; of each byte the upper half comes first. An odd one out at the end is padding."""
    packed = tensors[f"{name}.weight"].flatten()
    rows, columns = state["shape"]
    if packed.numel() != (rows * columns + 1) // 2:
        raise ValueError(f"{packed.numel()} bytes for {rows} by {columns} values")
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    return codes[: rows * columns].reshape(rows, columns)


def _absmax(name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    """The scale of each block, [blocks] float32. Nested ones are bytes: indices of levels, times a scale for each
    nested_blocksize of them, plus an offset."""
    absmax = tensors[f"{name}.weight.absmax"].flatten()
    rows, columns = state["shape"]
    blocks = -(-rows * columns // state["blocksize"])
    if absmax.numel() != blocks:
        raise ValueError(f"{absmax.numel()} scales for {blocks} blocks")
    if absmax.dtype != torch.uint8:
        return absmax.float()
    levels = tensors[f"{name}.weight.nested_quant_map"].float()
    outer = tensors[f"{name}.weight.nested_absmax"].float()
    which = torch.arange(blocks) // int(state["nested_blocksize"])
    return levels[absmax.long()] * outer[which] + float(state["nested_offset"])


def _values(name: str, tensors: Mapping[str, Tensor], *, state: Mapping[str, Any]) -> Tensor:
    """A weight [out, in] in the dtype that bitsandbytes gives it: level · absmax in float32, then rounded."""
    levels = tensors[f"{name}.weight.quant_map"].float()
    codes, absmax = _codes(name, tensors, state), _absmax(name, tensors, state)
    block = torch.arange(codes.numel()) // state["blocksize"]
    values = levels[codes.flatten().long()] * absmax[block]
    dtype: torch.dtype = getattr(torch, state["dtype"])
    return values.to(dtype).reshape(codes.shape)
