"""A linear layer whose codes of at most 4 bits stay packed, run by PyTorch's own 4-bit product where tokens are few.

`torch.ops.aten._weight_int4pack_mm_for_cpu` multiplies rows of bfloat16 by w = (c − 8) · s + o, codes c of 4 bits, with
s and o in bfloat16 for every group of inputs. It sums in float32 and rounds what comes out to bfloat16, the only
rounding that is left here:

* s is the artifact's scale, where that is stored in bfloat16: nothing is lost. Any other scale is refused.
* o = −z s of an asymmetric weight does not fit into bfloat16. What its rounding loses is e = −z s − o for each group,
  and e times the sum of the group's inputs is added in float32.
* An input in float32 is two rows in bfloat16, x = high + low, which one or two tokens get for nearly nothing.

The kernel's time grows with the rows. From `dequantized_from()` tokens on, weights are turned into bfloat16, a chunk of
channels at a time, and multiplied as usual: (c − 8 − z) exactly, times s, which is rounded once, as transformers does.
`kernels/int4.c` does that where the machine has a compiler; elsewhere passes of PyTorch give the same numbers.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.numerics import QuantizedTensor, Scheme
from bitfold.runtime.compiled import Kernel, kernel
from bitfold.runtime.device import has_fast_bfloat16

__all__ = ["Int4Linear", "dequantized_from", "int4_kernel", "no_int4"]

_FROM_COMPILED, _FROM_PLAIN = 32, 64
"""Tokens. 2048 · 5632 weights on a Zen 5 core, by passes of PyTorch: 0.33 ms for 1 row, 1.1 for 8, 6.6 for 48; to turn
them into bfloat16 takes 5 to 6 ms, and multiplying 64 rows 4 ms more. On a Zen 3 core, compiled: 13 ms for 16 rows, 27
for 32; to turn them into float32 takes 2 to 4, and multiplying 32 rows 20. Compiled on the former: not measured."""
SPLIT_UP_TO = 2
"""Tokens whose input is given as two rows in bfloat16: up to 4 rows take at most 1.7 times what 1 takes."""
_BLOCKS = (64, 32)
"""Channels that PyTorch's layout keeps together: where there is AVX-512, and where there is AVX2."""
_WHOLE = 64
"""Channels are filled up to a multiple of it."""
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
    if _block() is None:
        return (
            "the layout of PyTorch's 4-bit product on this processor is not that of AVX-512 or AVX2"
        )
    return None


def _group_of(size: int | None, shape: tuple[int, int]) -> int | None:
    """The largest group that the kernel has and that divides the scheme's."""
    return next((group for group in _GROUPS if (size or shape[1]) % group == 0), None)


class Int4Linear(nn.Module):
    """The product with a quantized weight [out, in] that `no_int4` has nothing against.

    packed: [⌈out/64⌉·64, in/2] uint8 as PyTorch packs it: blocks of 64 channels, each [in, 32], of which byte i has
        channel i in its lower and 32 + i in its upper half; with AVX2 of 32 channels, likewise.
    scales_offsets: [groups, channels, 2] bfloat16. zero: [groups, channels] int8, and lost: [groups, channels]
        float32, e of above; None where all zero-points are 0. order: [channels] int64, those channels in the order in
        which the passes of PyTorch give their weights.
    """

    packed: Tensor
    order: Tensor
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
        rows = -self.out_features % _WHOLE
        codes = F.pad(codes, (0, 0, 0, rows))
        scale = _per_group(tensor.scale, times, rows)
        zeros = None if zero is None else _per_group(zero, times, rows)
        wanted = torch.zeros_like(scale, dtype=torch.float32)
        if zeros is not None:
            wanted = -zeros.float() * scale.float()
        offset = wanted.to(torch.bfloat16)
        block = _block()
        assert block is not None
        self.block = block
        self.register_buffer("order", _order(len(codes), block))
        self.register_buffer("packed", _pack(codes))
        self.register_buffer("scales_offsets", torch.stack([scale, offset], dim=-1))
        self.register_buffer("zero", zeros)
        self.register_buffer("lost", None if zeros is None else wanted - offset.float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in the dtype of x."""
        rows = x.reshape(-1, self.in_features)
        few = len(rows) < dequantized_from()
        found = self._by_codes(rows) if few else self._by_weights(rows)
        if self.bias is not None:
            found = found + self.bias
        return found.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], rounded to bfloat16."""
        chunks = [self._weights(at, torch.bfloat16).T for at in range(0, len(self.packed), CHUNK)]
        found = torch.cat(chunks)
        if int4_kernel().library is None:
            found = found[self.order.argsort()]
        return found[: self.out_features].to(dtype)

    def _by_codes(self, rows: Tensor) -> Tensor:
        high = rows.to(torch.bfloat16)
        count, split = len(rows), rows.dtype != torch.bfloat16 and len(rows) <= SPLIT_UP_TO
        given = torch.cat([high, (rows - high).to(torch.bfloat16)]) if split else high
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(
            given, self.packed, self.group_size, self.scales_offsets
        )
        found = found.float()
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
            torch.mm(rows, self._weights(at, dtype), out=found[:, at : at + CHUNK])
        if int4_kernel().library is None:
            found = found.index_select(1, self.order.argsort())
        return found[:, : self.out_features]

    def _weights(self, at: int, dtype: torch.dtype) -> Tensor:
        """The weights of `CHUNK` channels from `at` on, transposed: [in, channels], rounded to bfloat16.

        dtype: bfloat16 or float32. In the channels' own order if they are compiled, else in `order`.
        """
        library = int4_kernel().library
        if library is None:
            return self._weights_by_passes(at).to(dtype)
        channels = min(CHUNK, len(self.packed) - at)
        found = torch.empty(self.in_features, channels, dtype=dtype)
        half = dtype == torch.bfloat16
        library.int4_weights(
            *(self.packed.data_ptr(), self.scales_offsets.data_ptr()),
            None if self.zero is None else self.zero.data_ptr(),
            *(self.in_features, self.block, self.group_size, len(self.packed), at, channels),
            *(found.data_ptr() if half else None, None if half else found.data_ptr()),
            torch.get_num_threads(),
        )
        return found

    def _weights_by_passes(self, at: int) -> Tensor:
        """In bfloat16, in `order`."""
        blocks = self.packed[at : at + CHUNK].view(-1, self.in_features, self.block // 2)
        words = blocks.transpose(0, 1).contiguous().view(torch.int32).flatten(1)
        # A word has 8 codes. 0x4300 is 128 in bfloat16, and has the ones' place as its last bit: so two codes of 4
        # bits, 16 bits apart, become two numbers 128 + c by an addition of bits.
        numbers = words.new_empty(len(words), 4, words.shape[1])
        for shift in range(4):
            part = numbers[:, shift]
            torch.bitwise_right_shift(words, 4 * shift, out=part)
            part.bitwise_and_(0x000F000F).bitwise_or_(0x43004300)
        groups, order = self.scales_offsets.shape[0], self.order[at : at + CHUNK]
        values = numbers.flatten(1).view(torch.bfloat16).unflatten(0, (groups, self.group_size))
        if self.zero is None:
            values.sub_(128 + 8)
        else:
            zero = self.zero.index_select(1, order)
            values.sub_(zero[:, None].to(torch.bfloat16) + 136)
        scale = self.scales_offsets[..., 0].index_select(1, order)
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


def _order(channels: int, block: int) -> Tensor:
    """The channels as the passes of PyTorch give them: that of nibble 4 l + 2 o + h of word j of block b of its chunk,
    which is channel `block` b + `block`/2 h + 4 j + 2 l + o, comes in the order of o, h, b, j, l."""
    chunks = [
        chunk.view(-1, 2, block // 8, 2, 2).permute(4, 1, 0, 2, 3).flatten()
        for chunk in torch.arange(channels).split(CHUNK)
    ]
    return torch.cat(chunks)


@cache
def _block() -> int | None:
    """How many channels PyTorch keeps together here, if it packs as `Int4Linear` reads it; that depends on the
    processor."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (128, 64), generator=generator, dtype=torch.int32)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (AttributeError, RuntimeError):  # an older PyTorch, or one built without it
        return None
    for block in _BLOCKS:
        blocks = codes.view(-1, block, 64).transpose(1, 2)
        known = blocks[..., : block // 2] | (blocks[..., block // 2 :] << 4)
        if torch.equal(packed.flatten(), known.to(torch.uint8).flatten()):
            return block
    return None


# -- the kernel ---------------------------------------------------------------------------------------


def int4_kernel() -> Kernel:
    """What turns codes into weights on this machine, and why; its library is None for passes of PyTorch."""
    return _told(kernel("int4"))


def dequantized_from() -> int:
    """From how many tokens on weights are turned into bfloat16."""
    return _FROM_PLAIN if int4_kernel().library is None else _FROM_COMPILED


@cache
def _told(found: Kernel) -> Kernel:
    """The kernel with its arguments declared; without its library where that does not give what it should."""
    if found.library is None:
        return found
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    found.library.int4_weights.argtypes = [*[pointer] * 3, *[integer] * 6, *[pointer] * 2, integer]
    found.library.int4_weights.restype = None
    if not all(_is_right(found.library, block) for block in _BLOCKS):
        return Kernel(found.name, None, "plain PyTorch: the compiled kernel errs on this machine")
    return found


def _is_right(library: ctypes.CDLL, block: int) -> bool:
    """Whether every code becomes the number that it stands for: compilers, and instructions, differ."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(block).view(2, -1, block // 2)
    codes = torch.cat([packed & 15, packed >> 4], dim=-1).transpose(0, 1).flatten(1).float() - 8
    scales = torch.linspace(-3, 5, 4 * block).bfloat16().view(1, -1, 2)
    zeros = torch.arange(2 * block).remainder(16).sub(8).to(torch.int8)[None]
    found = torch.empty(codes.shape, dtype=torch.bfloat16)
    library.int4_weights(
        *(packed.data_ptr(), scales.data_ptr(), zeros.data_ptr(), len(codes), block, len(codes)),
        *(2 * block, 0, 2 * block, found.data_ptr(), None, 1),
    )
    return torch.equal(found, ((codes - zeros) * scales[..., 0].float()).bfloat16())
