"""What ggml's blocks hold, as weights: the way back from `ggml_blocks`, and from what llama.cpp's quantizer writes.

From the layouts of ggml's block types (ggml-common.h of llama.cpp; the tests hold them against the dequantization of
its package `gguf`). Each is read as one of three things, exactly:

    d · q             Q4_0, Q5_0, Q8_0, Q3_K, Q6_K, TQ2_0: integers around 0, the grid `int`
    d · q + e         Q4_1, Q5_1, Q2_K, Q4_K, Q5_K: integers from 0 and a number for each group, the grid `shifted`
    d · entry[q]      MXFP4: the grid `mxfp4`; IQ4_NL, IQ4_XS: sixteen integers, the same for all, a codebook

A K type's scale is a half precision number times a small integer, which float32 holds exactly. What groups next to one
another have in common is then said once: so a weight that bitfold wrote comes back in the scheme that it had.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.numerics.codebook import CodebookShape

__all__ = ["LAYOUTS", "as_weight"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
# The sixteen values of IQ4_NL and IQ4_XS, before the scale.
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class _Read:
    """codes: [blocks, inputs] uint8, from 0. scale: [blocks, groups] float32 (of mxfp4 the exponents' bytes, uint8).
    shift: as scale, what is added; None where there is none."""

    codes: Bytes
    scale: Any
    shift: Floats | None = None


@dataclass(frozen=True)
class _Layout:
    """One of ggml's types.

    inputs: of a block. size: its bytes. bits: of an integer. grid: as which it is read. middle: the integer that stands
    for 0, of the grid `int`. read: bytes [blocks, size] → what they hold.
    """

    inputs: int
    size: int
    bits: int
    grid: str
    read: Callable[[Bytes], _Read]
    middle: int = 0


def as_weight(data: Bytes, type: str) -> QuantizedTensor:
    """A weight [out, in] from its bytes [out, bytes of a row] in a type of LAYOUTS: every value as ggml has it.

    Raises ValueError for scales that are no numbers.
    """
    layout = LAYOUTS[type]
    rows = data.shape[0]
    read = layout.read(np.ascontiguousarray(data).reshape(-1, layout.size))
    codes = torch.from_numpy(read.codes.reshape(rows, -1))
    groups = torch.from_numpy(np.ascontiguousarray(read.scale).reshape(rows, -1))
    if not torch.isfinite(groups.float()).all() or (
        layout.grid == "mxfp4" and (groups > 254).any()
    ):
        raise ValueError("a block has a scale that is no number")
    size = codes.shape[1] // groups.shape[1]
    at = {"bits": layout.bits, "granularity": "group", "group_size": size}
    if layout.grid == "mxfp4":
        scheme = TensorScheme.model_validate(at | {"grid": "mxfp4"})
        # Code 8 is −0, which is 0.
        return QuantizedTensor(codes, groups.view(torch.float8_e8m0fnu), None, scheme)
    if layout.grid == "codebook":
        book = torch.tensor(_IQ4_VALUES, dtype=torch.int8).reshape(1, -1, 1)
        shape = CodebookShape(dim=1, entries=len(_IQ4_VALUES))
        scheme = TensorScheme.model_validate(at | {"grid": "codebook", "codebook": shape})
        return _merged(QuantizedTensor(codes, _narrow(groups), None, scheme, codebook=book))
    if layout.grid == "int":
        scheme = TensorScheme.model_validate(at)
        signed = (codes.to(torch.int16) - layout.middle).to(torch.int8)
        return _merged(QuantizedTensor(signed, _narrow(groups), None, scheme))
    assert read.shift is not None
    shift = torch.from_numpy(np.ascontiguousarray(read.shift).reshape(rows, -1))
    if not torch.isfinite(shift).all():
        raise ValueError("a block has an offset that is no number")
    return _merged(_shifted(codes, groups, shift, at))


def _shifted(codes: Tensor, scale: Tensor, shift: Tensor, at: dict[str, Any]) -> QuantizedTensor:
    """With integer zero-points where every shift is one: shift = −scale · zero, 0 ≤ zero < 2^bits."""
    half = 1 << (at["bits"] - 1)
    zero = torch.where(scale == 0, torch.zeros_like(scale), -shift / scale).round()
    inside = bool(((zero >= 0) & (zero < 2 * half)).all())
    if inside and torch.equal(-scale * zero, shift):
        scheme = TensorScheme.model_validate(at | {"symmetric": False})
        signed = (codes.to(torch.int16) - half).to(torch.int8)
        return QuantizedTensor(signed, _narrow(scale), (zero - half).to(torch.int8), scheme)
    scheme = TensorScheme.model_validate(at | {"grid": "shifted"})
    narrow, beside = _narrow(scale), _narrow(shift)
    if narrow.dtype != beside.dtype:
        narrow, beside = scale, shift
    return QuantizedTensor(codes, narrow, None, scheme, shift=beside)


def _narrow(scale: Tensor) -> Tensor:
    """In half precision where that changes nothing."""
    half = scale.half()
    return half if torch.equal(half.float(), scale) else scale


def _merged(weight: QuantizedTensor) -> QuantizedTensor:
    """With groups twice as wide for as long as each two of them have the same scale, zero-point and shift."""
    parts = {"scale": weight.scale, "zero": weight.zero, "shift": weight.shift}
    there = {name: part for name, part in parts.items() if part is not None}
    groups = weight.scale.shape[1]
    while groups % 2 == 0 and all(
        torch.equal(part[:, ::2], part[:, 1::2]) for part in there.values()
    ):
        there = {name: part[:, ::2].contiguous() for name, part in there.items()}
        groups //= 2
    if groups > 1 and all(torch.equal(p, p[:, :1].expand_as(p)) for p in there.values()):
        there = {name: part[:, :1].contiguous() for name, part in there.items()}
        groups = 1
    where: dict[str, Any] = {"granularity": "group", "group_size": weight.shape[1] // groups}
    if groups == 1:
        where = {"granularity": "channel", "group_size": None}
    scheme = weight.scheme.model_copy(update=where)
    changes: dict[str, Any] = there
    return replace(weight, scheme=scheme, **changes)


# -- the layouts: blocks [blocks, size] -------------------------------------------------------------


def _half(block: Bytes, start: int) -> Floats:
    """The half precision number at a byte of each block, [blocks, 1] float32."""
    found: Floats = block[:, start : start + 2].copy().view(np.float16).astype(np.float32)
    return found


def _bytes(values: NDArray[Any]) -> Bytes:
    return values.astype(np.uint8, copy=False)


def _halves(packed: Bytes) -> Bytes:
    """[…, n] → […, 2n]: what is below, then what is above."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _bits(packed: Bytes) -> Bytes:
    """[…, n] → […, 8n]: the lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _pairs(packed: Bytes) -> Bytes:
    """Two bits of four inputs that are 32 apart in one byte: [blocks, n] → [blocks, 4n]."""
    parts = packed.reshape(len(packed), -1, 1, 32) >> np.array([[0], [2], [4], [6]], dtype=np.uint8)
    return _bytes(parts & 3).reshape(len(packed), -1)


def _nibbles(packed: Bytes) -> Bytes:
    """Four bits of two inputs that are 32 apart in one byte: [blocks, n] → [blocks, 2n]."""
    return _halves(packed.reshape(len(packed), -1, 32)).reshape(len(packed), -1)


def _planes(packed: Bytes) -> Bytes:
    """One bit of eight inputs that are 32 apart in one byte: [blocks, 32] → [blocks, 256]."""
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    return _bytes(packed[:, None, :] >> shifts & 1).reshape(len(packed), -1)


def _q4_0(block: Bytes) -> _Read:
    return _Read(_halves(block[:, 2:]), _half(block, 0))


def _q4_1(block: Bytes) -> _Read:
    return _Read(_halves(block[:, 4:]), _half(block, 0), _half(block, 2))


def _q5_0(block: Bytes) -> _Read:
    return _Read(_bytes(_halves(block[:, 6:]) | _bits(block[:, 2:6]) << 4), _half(block, 0))


def _q5_1(block: Bytes) -> _Read:
    fifth = _bits(block[:, 4:8])
    return _Read(_bytes(_halves(block[:, 8:]) | fifth << 4), _half(block, 0), _half(block, 2))


def _q8_0(block: Bytes) -> _Read:
    return _Read(block[:, 2:] + np.uint8(128), _half(block, 0))


def _q2_k(block: Bytes) -> _Read:
    small = block[:, :16]
    scale = _half(block, 80) * (small & 15)
    return _Read(_pairs(block[:, 16:80]), scale, -(_half(block, 82) * (small >> 4)))


def _q3_k(block: Bytes) -> _Read:
    """Sixteen scales of six bits, less 32: their lower four bits in eight bytes, then the upper two in four."""
    low = _halves(block[:, 96:104])
    upper = block[:, None, 104:108] >> np.array([[0], [2], [4], [6]], dtype=np.uint8) & 3
    small = (low | upper.reshape(len(block), 16) << 4).astype(np.float32) - 32
    codes = _pairs(block[:, 32:96]) | _planes(block[:, :32]) << 2
    return _Read(_bytes(codes), _half(block, 108) * small)


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight scales and eight offsets [blocks, 8]: the first four each in a byte, whose upper bits are the others'."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, rest & 15 | first >> 6 << 4], axis=1)
    return scales, np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=1)


def _q4_k(block: Bytes) -> _Read:
    scales, offsets = _six_bits(block[:, 4:16])
    return _Read(_nibbles(block[:, 16:]), _half(block, 0) * scales, -(_half(block, 2) * offsets))


def _q5_k(block: Bytes) -> _Read:
    scales, offsets = _six_bits(block[:, 4:16])
    codes = _nibbles(block[:, 48:]) | _planes(block[:, 16:48]) << 4
    return _Read(_bytes(codes), _half(block, 0) * scales, -(_half(block, 2) * offsets))


def _q6_k(block: Bytes) -> _Read:
    low = _halves(block[:, :128].reshape(len(block), 2, 64)).reshape(len(block), -1)
    scales = np.ascontiguousarray(block[:, 192:208]).view(np.int8)
    return _Read(_bytes(low | _pairs(block[:, 128:192]) << 4), _half(block, 208) * scales)


def _tq2_0(block: Bytes) -> _Read:
    return _Read(_pairs(block[:, :64]), _half(block, 64))


def _mxfp4(block: Bytes) -> _Read:
    return _Read(_halves(block[:, 1:]), block[:, :1])


def _iq4_nl(block: Bytes) -> _Read:
    return _Read(_halves(block[:, 2:]), _half(block, 0))


def _iq4_xs(block: Bytes) -> _Read:
    """Eight scales of six bits, less 32: their upper two bits in two bytes, then the lower four in four."""
    upper = block[:, 2:4].repeat(4, axis=1) >> np.tile(np.arange(0, 8, 2, dtype=np.uint8), 2) & 3
    low = block[:, 4:8].repeat(2, axis=1) >> np.tile(np.array([0, 4], dtype=np.uint8), 4) & 15
    small = (low | upper << 4).astype(np.float32) - 32
    codes = _halves(block[:, 8:].reshape(len(block), 8, 16)).reshape(len(block), -1)
    return _Read(codes, _half(block, 0) * small)


LAYOUTS = {
    "Q4_0": _Layout(32, 18, 4, "int", _q4_0, middle=8),
    "Q4_1": _Layout(32, 20, 4, "shifted", _q4_1),
    "Q5_0": _Layout(32, 22, 5, "int", _q5_0, middle=16),
    "Q5_1": _Layout(32, 24, 5, "shifted", _q5_1),
    "Q8_0": _Layout(32, 34, 8, "int", _q8_0, middle=128),
    "Q2_K": _Layout(256, 84, 2, "shifted", _q2_k),
    "Q3_K": _Layout(256, 110, 3, "int", _q3_k, middle=4),
    "Q4_K": _Layout(256, 144, 4, "shifted", _q4_k),
    "Q5_K": _Layout(256, 176, 5, "shifted", _q5_k),
    "Q6_K": _Layout(256, 210, 6, "int", _q6_k, middle=32),
    "TQ2_0": _Layout(256, 66, 2, "int", _tq2_0, middle=1),
    "MXFP4": _Layout(32, 17, 4, "mxfp4", _mxfp4),
    "IQ4_NL": _Layout(32, 18, 4, "codebook", _iq4_nl),
    "IQ4_XS": _Layout(256, 136, 4, "codebook", _iq4_xs),
}
"""What is read exactly, by ggml's name."""
