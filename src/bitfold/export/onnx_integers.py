"""Integers of a weight as ONNX Runtime's MatMulNBits takes them: blocks of inputs, each with a scale and a zero-point.

A value is s · (u − z), u and z unsigned in 2, 4 or 8 bits, s in float32 (ContribOperators.md of ONNX Runtime). Fewer
bits stand in more without a change. On a CPU only 4 bits have a kernel that multiplies what is packed; the others
unpack the whole weight for every token. So 5 to 8 bits are also said as two weights of 4,
s · (u − z) = 16 s · (u_high − z_high) + s · (u_low − z_low), which is exact because u = 16 u_high + u_low, and z too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.numerics import QuantizedTensor

__all__ = ["Packed", "block_size", "in_bytes", "pack_compact", "pack_nibbles"]

# The least that MatMulNBits takes, and the most that it takes of every number of bits.
_LEAST, _MOST = 16, 256


@dataclass(frozen=True)
class Packed:
    """One MatMulNBits. integers: [out, blocks, bytes] uint8. scales: [out, blocks] float32. zeros: [out, bytes] uint8;
    None where all are half of the range, which is what is taken then."""

    bits: int
    block: int
    integers: Tensor
    scales: Tensor
    zeros: Tensor | None


def block_size(tensor: QuantizedTensor) -> int | None:
    """Inputs of a block, so that each has one scale; None where MatMulNBits cannot say the weight."""
    if tensor.scheme.grid != "int":
        return None
    width = tensor.shape[1]
    share = width // tensor.scale.shape[1]
    if share == width:  # the last block may go beyond the row
        return min(_MOST, max(_LEAST, 1 << (width - 1).bit_length()))
    block = min(_MOST, share & -share)  # the largest power of two that divides it
    return block if block >= _LEAST else None


def pack_nibbles(tensor: QuantizedTensor, block: int) -> tuple[Packed, ...]:
    """The weight as a sum of one or two in 4 bits."""
    if tensor.scheme.bits <= 4:
        return (_pack(*_unsigned(tensor, block, 4), 4, block),)
    integers, scales, zeros = _unsigned(tensor, block, 8)
    return (
        _pack(integers >> 4, 16 * scales, zeros >> 4, 4, block),
        _pack(integers & 15, scales, zeros & 15, 4, block),
    )


def pack_compact(tensor: QuantizedTensor, block: int) -> tuple[Packed, ...]:
    """The weight in the fewest of 2, 4 and 8 bits."""
    bits = next(bits for bits in (2, 4, 8) if bits >= tensor.scheme.bits)
    return (_pack(*_unsigned(tensor, block, bits), bits, block),)


def _unsigned(tensor: QuantizedTensor, block: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers [out, blocks, block] and zero-points [out, blocks] from 0, uint8; scales [out, blocks].

    Columns that are kept beside the codes are zeros here.
    """
    rows, width = tensor.shape
    half = 1 << (bits - 1)
    blocks = -(-width // block)
    repeats = blocks // tensor.scale.shape[1]
    scales = tensor.scale.float().expand(rows, -1)
    signed = torch.zeros_like(scales, dtype=torch.int16)
    if tensor.zero is not None:
        signed = tensor.zero.to(torch.int16).expand(rows, -1)
    zeros = (signed + half).to(torch.uint8)
    integers = (tensor.codes.to(torch.int16) + half).to(torch.uint8)
    if tensor.columns is not None:
        at = tensor.columns.long()
        integers[:, at] = zeros[:, at // (width // scales.shape[1])]
    zeros = zeros.repeat_interleave(repeats, dim=1)
    integers = torch.nn.functional.pad(integers, (0, blocks * block - width))
    return (
        integers.reshape(rows, blocks, block),
        scales.repeat_interleave(repeats, dim=1).contiguous(),
        zeros,
    )


def _pack(integers: Tensor, scales: Tensor, zeros: Tensor, bits: int, block: int) -> Packed:
    usual = bool((zeros == 1 << (bits - 1)).all())
    points = None if usual else in_bytes(zeros, bits)
    return Packed(bits, block, in_bytes(integers, bits), scales, points)


def in_bytes(values: Tensor, bits: int) -> Tensor:
    """Values [..., n] uint8 of 2, 4 or 8 bits → [..., ⌈n·bits/8⌉], the first in the lowest bits."""
    each = 8 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % each))
    parts = values.unflatten(-1, (-1, each))
    result = torch.zeros_like(parts[..., 0])
    for place in range(each):
        result |= parts[..., place] << (bits * place)
    return result.contiguous()
