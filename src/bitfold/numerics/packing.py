"""Bit packing: integer codes of 1 to 8 bits in int32 words, without wasted bits.

Code i of a row occupies bits [i·b, (i+1)·b) of the row, least significant first, across word borders: the dense
layout of compressed-tensors 0.19 and later. Each row is padded to whole words.

8 codes fill exactly b bytes. As bytes they are one 64-bit number of 8 fields, and folding neighbouring fields
together, three times, leaves the 8·b bits at its low end:

    ·······h·······g·······f·······e·······d·······c·······b·······a        8 fields of 1 code (here of 1 bit)
    ··············hg··············fe··············dc··············ba        4 fields of 2
    ····························hgfe····························dcba        2 fields of 4
    ························································hgfedcba        1 field of 8
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pack", "packed_width", "unpack"]

CHUNK = 2**15
"""64-bit numbers worked on at once: they stay in a core's cache, and PyTorch starts no threads for so few, whose
meeting after each of many small steps takes longer than the steps where the other cores are busy."""


def packed_width(columns: int, bits: int) -> int:
    """int32 words that a row of `columns` codes takes."""
    return math.ceil(columns * bits / 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack signed int8 codes [rows, columns] (−2^(b−1) … 2^(b−1)−1) into int32 [rows, packed_width]."""
    rows, columns = codes.shape
    half = 1 << (bits - 1)
    # 32 codes fill whole words, and whole eights.
    shifted = F.pad(codes, (0, -columns % 32), value=-half).flatten().view(torch.uint8) + half
    fields = shifted.view(torch.int64)
    for part in fields.split(CHUNK):
        for low, high, shift in _folds(bits):
            part.copy_((part & low) | ((part >> shift) & high))
    packed = shifted.unflatten(0, (-1, 8))[:, :bits].flatten().contiguous().view(torch.int32)
    words = packed.unflatten(0, (rows, math.ceil(columns / 32) * bits))
    return words[:, : packed_width(columns, bits)].contiguous()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: int8 codes [rows, columns]."""
    padded = F.pad(words, (0, -words.shape[1] % bits))
    packed = padded.flatten().view(torch.uint8).unflatten(0, (-1, bits))
    codes = F.pad(packed, (0, 8 - bits)).flatten()
    for part in codes.view(torch.int64).split(CHUNK):
        for low, high, shift in reversed(_folds(bits)):
            part.copy_((part & low) | ((part & high) << shift))
    codes -= 1 << (bits - 1)
    in_rows = codes.view(torch.int8).unflatten(0, (-1, padded.shape[1] * 32 // bits))
    return in_rows[:, :columns].contiguous()


def _folds(bits: int) -> list[tuple[int, int, int]]:
    """Of each folding: the bits that stay, those where the others go, and how far they are shifted."""
    folds = []
    for codes in (1, 2, 4) if bits < 8 else ():
        width, stride = codes * bits, 16 * codes
        low = sum(((1 << width) - 1) << start for start in range(0, 64, stride))
        folds.append((low, low << width, codes * (8 - bits)))
    return folds
