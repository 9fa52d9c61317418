"""Bit packing: integer codes of 2 to 8 bits in int32 words, without wasted bits.

Code i of a row occupies bits [i·b, (i+1)·b) of the row, least significant first, across word borders: the dense
layout of compressed-tensors 0.19 and later. Each row is padded to whole words.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pack", "packed_width", "unpack"]


def packed_width(columns: int, bits: int) -> int:
    """int32 words that a row of `columns` codes takes."""
    return math.ceil(columns * bits / 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes [rows, columns] (−2^(b−1) … 2^(b−1)−1) into int32 [rows, packed_width].

    32 consecutive codes fill exactly `bits` words, so the work is done on [rows, groups, 32].
    """
    rows, columns = codes.shape
    unsigned = codes.to(torch.int32) + (1 << (bits - 1))
    unsigned = F.pad(unsigned, (0, -columns % 32)).unflatten(1, (-1, 32))
    words = torch.zeros(rows, unsigned.shape[1], bits, dtype=torch.int32, device=codes.device)
    for index in range(32):
        word, shift = divmod(index * bits, 32)
        words[..., word] |= unsigned[..., index] << shift
        if shift + bits > 32:
            words[..., word + 1] |= unsigned[..., index] >> (32 - shift)
    return words.flatten(1)[:, : packed_width(columns, bits)].contiguous()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: int8 codes [rows, columns]."""
    rows = words.shape[0]
    padded = F.pad(words, (0, -words.shape[1] % bits)).unflatten(1, (-1, bits))
    codes = torch.empty(rows, padded.shape[1], 32, dtype=torch.int32, device=words.device)
    mask = (1 << bits) - 1
    for index in range(32):
        word, shift = divmod(index * bits, 32)
        # An int32 shift to the right copies the sign: the mask takes those copies away again,
        # but only after the next word's bits would have been added, so clear them first.
        value = (padded[..., word] >> shift) & ((1 << min(32 - shift, bits)) - 1)
        if shift + bits > 32:
            value = value | (padded[..., word + 1] << (32 - shift))
        codes[..., index] = value & mask
    return (codes.flatten(1)[:, :columns] - (1 << (bits - 1))).to(torch.int8)
