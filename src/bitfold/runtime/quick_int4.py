"""A linear layer whose codes of at most 4 bits stay packed, run by PyTorch's own 4-bit product where tokens are few.

`torch.ops.aten._weight_int4pack_mm_for_cpu` multiplies rows of bfloat16 by w = (c − 8) · s + o, codes c of 4 bits, with
s and o in bfloat16 for every group of inputs. It sums in float32 and rounds what comes out to bfloat16, the only
rounding that is left here:

* s is the artifact's scale, where that is stored in bfloat16: nothing is lost. Any other scale is refused.
* o = −z s of an asymmetric weight does not fit into bfloat16. What its rounding loses is e = −z s − o for each group,
  and e times the sum of the group's inputs is added in float32.
* An input in float32 is two rows in bfloat16, x = high + low, which one or two tokens get for nearly nothing.

The kernel's time grows with the rows. From `DEQUANTIZED_FROM` tokens on, weights are turned into bfloat16, a chunk of
channels at a time, and multiplied as usual: (c − 8 − z) exactly, times s, which is rounded once, as transformers does.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.numerics import QuantizedTensor, Scheme
from bitfold.runtime.device import has_fast_bfloat16

__all__ = ["DEQUANTIZED_FROM", "Int4Linear", "no_int4"]

DEQUANTIZED_FROM = 64
"""Tokens. On a Zen 5 core 2048 · 5632 weights take 0.33 ms for 1 row, 1.1 for 8, 6.6 for 48; to turn them into bfloat16
takes 5 to 6 ms, and multiplying 64 rows 4 ms more."""
SPLIT_UP_TO = 2
"""Tokens whose input is given as two rows in bfloat16: up to 4 rows take at most 1.7 times what 1 takes."""
BLOCK = 64
"""Channels that PyTorch's layout keeps together where there is AVX-512."""
CHUNK = 512
"""Channels that are turned into bfloat16 at a time: they stay in the processor's cache until they are multiplied."""
_GROUPS = (256, 128, 64, 32)


def no_int4(scheme: Scheme, shape: tuple[int, int], scale: torch.dtype) -> str | None:
    """Why a weight [out, in] of a scheme, with scales of a dtype, cannot be run so; None if it can."""
    weight = scheme.weight
    if weight is None or weight.grid != "int" or weight.kept:
        return "only weights that are all integers have a quick form"
    if weight.bits > 4:
        return "the 4-bit product takes codes of at most 4 bits"
    if scheme.activation is not None:
        return "the 4-bit product takes no quantized inputs"
    if (
        weight.granularity not in ("group", "channel")
        or _group_of(weight.group_size, shape) is None
    ):
        return "groups must be multiples of 32 inputs for the 4-bit product"
    if scale != torch.bfloat16:
        return f"the 4-bit product takes scales in bfloat16, and these are {str(scale)[6:]}"
    if not _layout_is_known():
        return "the layout of PyTorch's 4-bit product on this processor is not the one of AVX-512"
    return None


def _group_of(size: int | None, shape: tuple[int, int]) -> int | None:
    """The largest group that the kernel has and that divides the scheme's."""
    return next((group for group in _GROUPS if (size or shape[1]) % group == 0), None)


class Int4Linear(nn.Module):
    """The product with a quantized weight [out, in] that `no_int4` has nothing against.

    packed: [⌈out/64⌉·64, in/2] uint8 as PyTorch packs it: blocks of 64 channels, each [in, 32], of which byte i has
        channel i in its lower and 32 + i in its upper half. Channels are in the order in which `_weights` need not
        reorder them; place: [channels] int64, where each is.
    scales_offsets: [groups, channels, 2] bfloat16, in that order too. zero: [groups, channels] int8, and lost:
        [groups, channels] float32, e of above; None where all zero-points are 0.
    """

    packed: Tensor
    place: Tensor
    scales_offsets: Tensor
    zero: Tensor | None
    lost: Tensor | None
    bias: Tensor | None

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        """bias: [out], in any dtype."""
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        group = _group_of(tensor.scheme.group_size, (self.out_features, self.in_features))
        assert group is not None
        self.group_size = group
        times = self.in_features // group // tensor.scale.shape[1]
        codes, zero = tensor.codes, tensor.zero
        if zero is not None and tensor.scheme.bits < 4:
            # Differences of fewer bits are codes of 4 themselves.
            codes = codes - zero.repeat_interleave(self.in_features // zero.shape[1], dim=1)
            zero = None
        rows = -self.out_features % BLOCK
        codes = F.pad(codes, (0, 0, 0, rows))
        scale = _per_group(tensor.scale, times, rows)
        zeros = None if zero is None else _per_group(zero, times, rows)
        wanted = torch.zeros_like(scale, dtype=torch.float32)
        if zeros is not None:
            wanted = -zeros.float() * scale.float()
        offset = wanted.to(torch.bfloat16)
        place = _places(len(codes))
        order = torch.argsort(place)
        self.register_buffer("place", place)
        self.register_buffer("packed", _pack(codes[order]))
        self.register_buffer("scales_offsets", torch.stack([scale, offset], dim=-1)[:, order])
        self.register_buffer("zero", zeros)
        self.register_buffer("lost", None if zeros is None else wanted - offset.float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in the dtype of x."""
        rows = x.reshape(-1, self.in_features)
        few = len(rows) < DEQUANTIZED_FROM
        found = self._by_codes(rows) if few else self._by_weights(rows)
        if self.bias is not None:
            found = found + self.bias
        return found.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], rounded to bfloat16."""
        chunks = [self._weights(at).T for at in range(0, len(self.packed), CHUNK)]
        return torch.cat(chunks)[: self.out_features].to(dtype)

    def _by_codes(self, rows: Tensor) -> Tensor:
        high = rows.to(torch.bfloat16)
        count, split = len(rows), rows.dtype != torch.bfloat16 and len(rows) <= SPLIT_UP_TO
        given = torch.cat([high, (rows - high).to(torch.bfloat16)]) if split else high
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(
            given, self.packed, self.group_size, self.scales_offsets
        )
        found = found.index_select(1, self.place).float()
        if split:
            found = found[:count].add_(found[count:])
        if self.lost is not None:
            seen = rows if split else high
            sums = seen.float().unflatten(1, (-1, self.group_size)).sum(dim=-1)
            found.addmm_(sums, self.lost)
        return found[:, : self.out_features]

    def _by_weights(self, rows: Tensor) -> Tensor:
        dtype = torch.bfloat16 if has_fast_bfloat16(rows.device) else torch.float32
        rows = rows.to(dtype)
        found = rows.new_empty(len(rows), len(self.packed))
        for at in range(0, len(self.packed), CHUNK):
            torch.mm(rows, self._weights(at).to(dtype), out=found[:, at : at + CHUNK])
        return found[:, : self.out_features]

    def _weights(self, at: int) -> Tensor:
        """The weights of `CHUNK` channels from `at` on, transposed: [in, channels] bfloat16."""
        blocks = self.packed[at : at + CHUNK].view(-1, self.in_features, BLOCK // 2)
        words = blocks.transpose(0, 1).contiguous().view(torch.int32).flatten(1)
        # A word has 8 codes. 0x4300 is 128 in bfloat16, and has the ones' place as its last bit: so two codes of 4
        # bits, 16 bits apart, become two numbers 128 + c by an addition of bits.
        numbers = words.new_empty(len(words), 4, words.shape[1])
        for shift in range(4):
            part = numbers[:, shift]
            torch.bitwise_right_shift(words, 4 * shift, out=part)
            part.bitwise_and_(0x000F000F).bitwise_or_(0x43004300)
        groups = self.scales_offsets.shape[0]
        values = numbers.flatten(1).view(torch.bfloat16).unflatten(0, (groups, self.group_size))
        if self.zero is None:
            values.sub_(128 + 8)
        else:
            values.sub_((self.zero[:, None, at : at + CHUNK]).to(torch.bfloat16) + 136)
        scale = self.scales_offsets[..., 0].index_select(1, self.place[at : at + CHUNK])
        return values.mul_(scale[:, None]).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"


def _per_group(per_row: Tensor, times: int, rows: int) -> Tensor:
    """[out, groups] of a scheme → [groups, channels] of the kernel, whose groups may be smaller."""
    return F.pad(per_row.repeat_interleave(times, dim=1), (0, 0, 0, rows)).T.contiguous()


def _pack(codes: Tensor) -> Tensor:
    """Codes −8 … 7, [channels, in] int8, as PyTorch packs them; a chunk at a time, for they must be int32."""
    packed = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(part.int() + 8, 1)
        for part in codes.split(CHUNK)
    ]
    return torch.cat(packed)


def _places(channels: int) -> Tensor:
    """Where each channel is packed: that of nibble 4 l + 2 o + h of word j of block b of its chunk, which is channel
    64 b + 32 h + 4 j + 2 l + o in PyTorch's layout, comes in the order of o, h, b, j, l out of `_weights`."""
    chunks = [
        chunk.view(-1, 2, 8, 2, 2).permute(4, 1, 0, 2, 3).flatten()
        for chunk in torch.arange(channels).split(CHUNK)
    ]
    return torch.cat(chunks)


@cache
def _layout_is_known() -> bool:
    """Whether PyTorch packs here as `Int4Linear` reads it; the layout depends on the processor."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2 * BLOCK, 64), generator=generator, dtype=torch.int32)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (AttributeError, RuntimeError):  # an older PyTorch, or one built without it
        return False
    blocks = codes.view(2, BLOCK, 64).transpose(1, 2)
    known = blocks[..., : BLOCK // 2] | (blocks[..., BLOCK // 2 :] << 4)
    return torch.equal(packed.flatten(), known.to(torch.uint8).flatten())
