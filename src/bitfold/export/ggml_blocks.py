"""Integers of a weight as ggml stores them: blocks of 32 or 256 inputs, each with its scale in half precision.

From the layouts of ggml's block types (ggml-common.h of llama.cpp; the tests hold them against the dequantization of
its package `gguf`). In the small types a value is d · (q − offset); in those of 256 inputs d · s · q − e · m, with
small integers s and m for each 16 or 32 inputs. Our groups have one scale, so every s is 1; a zero-point z is e = d and
m = z.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitfold.export.exported import half_scales
from bitfold.numerics import QuantizedTensor

__all__ = ["MXFP4", "TYPES", "BlockType", "Stored", "smallest", "store"]

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types.

    inputs: of a block. size: its bytes. low, high: the integers that it holds, scale taken off. most_zero: where zero
    may lie above the lowest integer, at most; None where there is no place for it and zero is at −low.
    pack: integers from 0, zero-points [blocks], and scales in half precision [blocks] → bytes [blocks, size].
    """

    name: str
    inputs: int
    size: int
    low: int
    high: int
    most_zero: int | None
    pack: Callable[[Bytes, Bytes, Bytes], Bytes]

    @property
    def bits(self) -> float:
        """Of a weight, its scale counted."""
        return 8 * self.size / self.inputs


@dataclass(frozen=True)
class Stored:
    """data: [out, bytes] of a type. scale_error: largest change of a scale by half precision, relative to it."""

    type: BlockType
    data: Bytes
    scale_error: float


def smallest(tensor: QuantizedTensor) -> BlockType | None:
    """The type of fewest bytes that holds a weight's integers as they are; None where there is none. mxfp4 is one."""
    if tensor.scheme.grid == "mxfp4" and tensor.kept is None:
        return MXFP4
    if tensor.scheme.grid != "int" or tensor.kept is not None:
        return None
    share = tensor.shape[1] // tensor.scale.shape[1]  # inputs of a scale
    lowest, highest = _extent(tensor)
    zero = None if tensor.zero is None else tensor.zero.to(torch.int32) - _floor(tensor)
    for kind in TYPES:
        if share % kind.inputs:
            continue
        if kind.most_zero is None:
            if kind.low <= lowest and highest <= kind.high:
                return kind
            continue
        wide = tensor.scheme.bits <= (kind.high - kind.low).bit_length()
        if wide and (zero is None or int(zero.max()) <= kind.most_zero):
            return kind
    return None


def store(tensor: QuantizedTensor, kind: BlockType) -> Stored:
    """A weight in blocks of a type that `smallest` found to hold it."""
    rows, columns = tensor.shape
    blocks = columns // kind.inputs
    if kind is MXFP4:
        exponents = tensor.scale.view(torch.uint8).reshape(-1, 1).numpy()
        codes = tensor.codes.reshape(-1, kind.inputs).numpy()
        data = kind.pack(codes, exponents, exponents)
        return Stored(kind, data.reshape(rows, blocks * kind.size), 0.0)
    repeats = blocks // tensor.scale.shape[1]
    scale = tensor.scale.float().expand(rows, -1)
    half, change = half_scales(scale)
    units = tensor.codes.to(torch.int32)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if kind.most_zero is None:
        if tensor.zero is not None:
            per_weight = tensor.zero.expand(rows, -1).to(torch.int32)
            units = units - per_weight.repeat_interleave(columns // scale.shape[1], dim=1)
        units = units - kind.low
    else:
        units = units - _floor(tensor)
        zero = (
            zero - _floor(tensor)
            if tensor.zero is None
            else tensor.zero.to(torch.int32) - _floor(tensor)
        )
        zero = zero.expand(rows, -1)
    data = kind.pack(
        units.to(torch.uint8).reshape(-1, kind.inputs).numpy(),
        zero.repeat_interleave(repeats, dim=1).reshape(-1).to(torch.uint8).numpy(),
        half.repeat_interleave(repeats, dim=1)
        .reshape(-1, 1)
        .contiguous()
        .view(torch.uint8)
        .numpy(),
    )
    return Stored(kind, data.reshape(rows, blocks * kind.size), change)


def _floor(tensor: QuantizedTensor) -> int:
    """The least code of the grid."""
    return -(1 << (tensor.scheme.bits - 1))


def _extent(tensor: QuantizedTensor) -> tuple[int, int]:
    """The least and the largest code, zero-points taken off."""
    codes = tensor.codes.to(torch.int32)
    if tensor.zero is not None:
        zero = tensor.zero.expand(codes.shape[0], -1).to(torch.int32)
        codes = codes - zero.repeat_interleave(codes.shape[1] // zero.shape[1], dim=1)
    return int(codes.min()), int(codes.max())


# -- the layouts: units [blocks, inputs], zero [blocks], half [blocks, 2] ---------------------------


def _bytes(values: NDArray[Any]) -> Bytes:
    return values.astype(np.uint8, copy=False)


def _halves(units: Bytes) -> Bytes:
    """Two nibbles a byte: input j below, input j + n/2 above."""
    half = units.shape[-1] // 2
    return _bytes(units[..., :half] & 15 | (units[..., half:] & 15) << 4)


def _q4_0(units: Bytes, zero: Bytes, half: Bytes) -> Bytes:
    return np.concatenate([half, _halves(units)], axis=1)


def _q5_0(units: Bytes, zero: Bytes, half: Bytes) -> Bytes:
    fifth = np.packbits(units >> 4, axis=1, bitorder="little")
    return np.concatenate([half, fifth, _halves(units)], axis=1)


def _q8_0(units: Bytes, zero: Bytes, half: Bytes) -> Bytes:
    return np.concatenate([half, units - np.uint8(128)], axis=1)


def _pairs(units: Bytes) -> Bytes:
    """Two bits of four inputs that are 32 apart in one byte, for each half of a block of 256: [blocks, 64]."""
    parts = (units & 3).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(-1, 64)


def _nibbles(units: Bytes) -> Bytes:
    """Four bits of two inputs that are 32 apart in one byte: [blocks, 128]."""
    return _halves(units.reshape(-1, 64)).reshape(-1, 128)


def _q2_k(units: Bytes, zero: Bytes, half: Bytes) -> Bytes:
    scales = np.repeat((1 | zero << 4)[:, None], 16, axis=1)
    return np.concatenate([scales, _pairs(units), half, half], axis=1)


def _q3_k(units: Bytes, zero: Bytes, half: Bytes) -> Bytes:
    third = (units >> 2 & 1).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce(third << shifts, axis=1)
    # Sixteen scales of 1, stored as 33 in six bits: first the lower four of them, then the upper two.
    scales = np.tile(np.array([0x11] * 8 + [0xAA] * 4, dtype=np.uint8), (len(units), 1))
    return np.concatenate([high, _pairs(units), scales, half], axis=1)


def _six_bits(zero: Bytes) -> Bytes:
    """Eight scales of 1 and eight zero-points below 64, six bits each: [blocks, 12].

    Of the last four the upper two bits stand above the first four.
    """
    one = np.ones((len(zero), 4), dtype=np.uint8)
    zero = np.repeat(zero[:, None], 4, axis=1)
    return np.concatenate([one, zero | zero >> 4 << 6, one | (zero & 15) << 4], axis=1)


def _q4_k(units: Bytes, zero: Bytes, half: Bytes) -> Bytes:
    return np.concatenate([half, half, _six_bits(zero), _nibbles(units)], axis=1)


def _q5_k(units: Bytes, zero: Bytes, half: Bytes) -> Bytes:
    fifth = (units >> 4 & 1).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce(fifth << shifts, axis=1)
    return np.concatenate([half, half, _six_bits(zero), high, _nibbles(units)], axis=1)


def _q6_k(units: Bytes, zero: Bytes, half: Bytes) -> Bytes:
    low = _halves(units.reshape(-1, 128)).reshape(-1, 128)
    scales = np.ones((len(units), 16), dtype=np.uint8)
    return np.concatenate([low, _pairs(_bytes(units >> 4)), scales, half], axis=1)


def _mxfp4(units: Bytes, zero: Bytes, exponents: Bytes) -> Bytes:
    """ggml's levels are twice E2M1's, and its scale half of 2^(e − 127): the same exponent e."""
    return np.concatenate([exponents, _halves(units)], axis=1)


MXFP4 = BlockType("MXFP4", 32, 17, 0, 15, None, _mxfp4)
"""The grid of the same name, codes and exponents as they are."""

# From the smallest; of the same size the one that is quicker first.
TYPES = (
    BlockType("Q2_K", 256, 84, 0, 3, 15, _q2_k),
    BlockType("Q3_K", 256, 110, -4, 3, None, _q3_k),
    BlockType("Q4_0", 32, 18, -8, 7, None, _q4_0),
    BlockType("Q4_K", 256, 144, 0, 15, 63, _q4_k),
    BlockType("Q5_0", 32, 22, -16, 15, None, _q5_0),
    BlockType("Q5_K", 256, 176, 0, 31, 63, _q5_k),
    BlockType("Q6_K", 256, 210, -32, 31, None, _q6_k),
    BlockType("Q8_0", 32, 34, -128, 127, None, _q8_0),
)
