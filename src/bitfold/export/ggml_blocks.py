"""Integers of a weight as ggml stores them: blocks of 32 or 256 inputs, each with its scale in half precision.

From the layouts of ggml's block types (ggml-common.h of llama.cpp; the tests hold them against the dequantization of
its package `gguf`). In the small types a value is d · (q − offset); in those of 256 inputs d · s · q − e · m, with
small integers s and m for each 16 or 32 inputs. A group of ours has one scale, so that every s is 1, and a zero-point z
is e = d and m = z; but where the scheme has its scales in blocks (`numerics/stored_scale.py`), they are the s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfold.export.exported import half_scales
from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.numerics.stored_scale import block_steps, could_be_in_blocks

__all__ = ["MXFP4", "TYPES", "BlockType", "Stored", "expected", "smallest", "store"]

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types.

    inputs: of a block. size: its bytes. low, high: the integers that it holds, scale taken off. most_zero: where zero
    may lie above the lowest integer, at most; None where there is no place for it and zero is at −low.
    pack: integers from 0, zero-points [blocks], scales in half precision [blocks], and the s of each 16 inputs
    [blocks, 16], or None where all of them are 1 → bytes [blocks, size].
    """

    name: str
    inputs: int
    size: int
    low: int
    high: int
    most_zero: int | None
    pack: Callable[[Bytes, Bytes, Bytes, Bytes | None], Bytes]

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
    scheme = tensor.scheme
    if scheme.grid == "mxfp4" and tensor.kept is None:
        return MXFP4
    if scheme.grid != "int" or tensor.kept is not None:
        return None
    if _in_blocks(tensor) is not None:
        return _of_bits(scheme.bits)
    share = tensor.shape[1] // tensor.scale.shape[1]
    zero = None if tensor.zero is None else int(tensor.zero.max()) - _floor(scheme)
    return _smallest(share, scheme.bits, *_extent(tensor), zero)


def expected(scheme: TensorScheme, columns: int) -> BlockType | None:
    """The type that holds any weight of a scheme with so many inputs; None where there is none."""
    if scheme.grid == "mxfp4" and not scheme.kept:
        return MXFP4
    if scheme.grid != "int" or scheme.kept:
        return None
    if scheme.scales == "blocks":
        return _of_bits(scheme.bits)
    share = scheme.group_size or columns
    span = scheme.qmax - scheme.qmin
    extent = (scheme.qmin, scheme.qmax) if scheme.symmetric else (-span, span)
    return _smallest(share, scheme.bits, *extent, None if scheme.symmetric else span)


def _smallest(
    share: int, bits: int, lowest: int, highest: int, zero: int | None
) -> BlockType | None:
    """share: inputs of a scale. lowest, highest: integers, zero-points taken off. zero: the highest zero-point above
    the lowest integer, None if all are in the middle."""
    for kind in TYPES:
        if share % kind.inputs:
            continue
        if kind.most_zero is None:
            if kind.low <= lowest and highest <= kind.high:
                return kind
        elif bits <= (kind.high - kind.low).bit_length() and (zero or 0) <= kind.most_zero:
            return kind
    return None


def _of_bits(bits: int) -> BlockType:
    return next(kind for kind in TYPES if kind.name == f"Q{bits}_K")


def store(tensor: QuantizedTensor, kind: BlockType) -> Stored:
    """A weight in blocks of a type that `smallest` found to hold it."""
    rows, columns = tensor.shape
    blocks = columns // kind.inputs
    if kind is MXFP4:
        exponents = tensor.scale.view(torch.uint8).reshape(-1, 1).numpy()
        codes = tensor.codes.reshape(-1, kind.inputs).numpy()
        data = kind.pack(codes, exponents, exponents, None)
        return Stored(kind, data.reshape(rows, blocks * kind.size), 0.0)
    scale, steps = _in_blocks(tensor) or (tensor.scale.float().expand(rows, -1), None)
    repeats = blocks // scale.shape[1]
    half, change = half_scales(scale)
    units = tensor.codes.to(torch.int32)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if kind.most_zero is None:
        if tensor.zero is not None:
            per_weight = tensor.zero.expand(rows, -1).to(torch.int32)
            units = units - per_weight.repeat_interleave(columns // scale.shape[1], dim=1)
        units = units - kind.low
    else:
        units = units - _floor(tensor.scheme)
        zero = (
            zero - _floor(tensor.scheme)
            if tensor.zero is None
            else tensor.zero.to(torch.int32) - _floor(tensor.scheme)
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
        None if steps is None else steps.reshape(-1, 16).to(torch.uint8).numpy(),
    )
    return Stored(kind, data.reshape(rows, blocks * kind.size), change)


def _in_blocks(tensor: QuantizedTensor) -> tuple[Tensor, Tensor] | None:
    """d [out, blocks] and s [out, blocks, 16], float32, where the scales are such; artifacts do not say so."""
    if not could_be_in_blocks(tensor.scheme) or tensor.shape[1] % 256:
        return None
    found = block_steps(tensor.scale, tensor.scheme)
    return None if found is None else (found[0].squeeze(-1).float(), found[1].float())


def _floor(scheme: TensorScheme) -> int:
    """The least code of the grid."""
    return -(1 << (scheme.bits - 1))


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


def _ones(units: Bytes) -> Bytes:
    return np.ones((len(units), 16), dtype=np.uint8)


def _halves(units: Bytes) -> Bytes:
    """Two nibbles a byte: input j below, input j + n/2 above."""
    half = units.shape[-1] // 2
    return _bytes(units[..., :half] & 15 | (units[..., half:] & 15) << 4)


def _q4_0(units: Bytes, zero: Bytes, half: Bytes, steps: Bytes | None) -> Bytes:
    return np.concatenate([half, _halves(units)], axis=1)


def _q5_0(units: Bytes, zero: Bytes, half: Bytes, steps: Bytes | None) -> Bytes:
    fifth = np.packbits(units >> 4, axis=1, bitorder="little")
    return np.concatenate([half, fifth, _halves(units)], axis=1)


def _q8_0(units: Bytes, zero: Bytes, half: Bytes, steps: Bytes | None) -> Bytes:
    return np.concatenate([half, units - np.uint8(128)], axis=1)


def _pairs(units: Bytes) -> Bytes:
    """Two bits of four inputs that are 32 apart in one byte, for each half of a block of 256: [blocks, 64]."""
    parts = (units & 3).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(-1, 64)


def _nibbles(units: Bytes) -> Bytes:
    """Four bits of two inputs that are 32 apart in one byte: [blocks, 128]."""
    return _halves(units.reshape(-1, 64)).reshape(-1, 128)


def _q2_k(units: Bytes, zero: Bytes, half: Bytes, steps: Bytes | None) -> Bytes:
    if steps is None:
        scales = np.repeat((1 | zero << 4)[:, None], 16, axis=1)
        return np.concatenate([scales, _pairs(units), half, half], axis=1)
    # d · s · (q − 2) is d · s · q − e · m with m = s and e = 2d.
    twice = (half.view(np.float16) * np.float16(2)).view(np.uint8)
    return np.concatenate([steps | steps << 4, _pairs(units), half, twice], axis=1)


def _q3_k(units: Bytes, zero: Bytes, half: Bytes, steps: Bytes | None) -> Bytes:
    third = (units >> 2 & 1).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce(third << shifts, axis=1)
    # Sixteen times s + 32 in six bits: first the lower four of them, then the upper two.
    moved = _ones(units) + 32 if steps is None else steps + 32
    lower = moved[:, :8] & 15 | (moved[:, 8:] & 15) << 4
    turns = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    upper = np.bitwise_or.reduce((moved >> 4).reshape(-1, 4, 4) << turns, axis=1)
    scales = _bytes(np.concatenate([lower, upper], axis=1))
    return np.concatenate([high, _pairs(units), scales, half], axis=1)


def _six_bits(zero: Bytes) -> Bytes:
    """Eight scales of 1 and eight zero-points below 64, six bits each: [blocks, 12].

    Of the last four the upper two bits stand above the first four.
    """
    one = np.ones((len(zero), 4), dtype=np.uint8)
    zero = np.repeat(zero[:, None], 4, axis=1)
    return np.concatenate([one, zero | zero >> 4 << 6, one | (zero & 15) << 4], axis=1)


def _q4_k(units: Bytes, zero: Bytes, half: Bytes, steps: Bytes | None) -> Bytes:
    return np.concatenate([half, half, _six_bits(zero), _nibbles(units)], axis=1)


def _q5_k(units: Bytes, zero: Bytes, half: Bytes, steps: Bytes | None) -> Bytes:
    fifth = (units >> 4 & 1).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce(fifth << shifts, axis=1)
    return np.concatenate([half, half, _six_bits(zero), high, _nibbles(units)], axis=1)


def _q6_k(units: Bytes, zero: Bytes, half: Bytes, steps: Bytes | None) -> Bytes:
    low = _halves(units.reshape(-1, 128)).reshape(-1, 128)
    scales = _ones(units) if steps is None else steps
    return np.concatenate([low, _pairs(_bytes(units >> 4)), scales, half], axis=1)


def _mxfp4(units: Bytes, zero: Bytes, exponents: Bytes, steps: Bytes | None) -> Bytes:
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
