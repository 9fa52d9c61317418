"""Keys or values in few bits: packed codes, scales and zero-points, as a cache keeps them.

What comes out is what `runtime/attention.py` makes of the same keys or values, to the bit: codes are made by the same
arithmetic, and scales are kept in the dtype in which they were computed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfold.numerics import (
    TensorScheme,
    dequantize,
    dynamic_scale_and_zero,
    pack,
    quantize,
    unpack,
)
from bitfold.runtime.token_groups import full_tokens

__all__ = ["Coding", "PackedHeads", "can_pack"]

_NUMBERS = 2**20
"""So many are read back at once."""


@dataclass(frozen=True)
class Coding:
    """How keys or values are stored: a scheme, None for as they are; of a static one its calibrated scale and
    zero-point, which broadcast over [batch, heads, tokens, head_dim]."""

    scheme: TensorScheme | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many consecutive tokens are quantized at once."""
        size = None if self.scheme is None else self.scheme.group_size
        return size if self.scheme is not None and self.scheme.groups_tokens and size else 1


def can_pack(scheme: TensorScheme | None) -> bool:
    """Whether a cache stores what has this scheme: integers, and what is left alone."""
    return scheme is None or scheme.grid == "int"


class PackedHeads:
    """Keys or values [batch, heads, tokens, head_dim] that grow at the end.

    codes: [batch, heads, packed tokens, ⌈head_dim · bits / 8⌉] uint8, each row packed densely.
    scale: [batch, heads, packed tokens, groups], or [batch, heads, groups of tokens, head_dim]; zero: the same, int8.
           Both None where they are static.
    rest:  [batch, heads, tokens, head_dim], the newest that do not fill a group yet; all, without a scheme.
    """

    def __init__(self, coding: Coding, like: Tensor) -> None:
        """like: keys or values that are to be stored, for their sizes, dtype and device."""
        self.coding, self.size = coding, like.shape[-1]
        self.rest = like[..., :0, :].clone()
        self.codes: Tensor | None = None
        self.scale: Tensor | None = None
        self.zero: Tensor | None = None

    @property
    def packed(self) -> int:
        """Tokens that are stored as codes."""
        return 0 if self.codes is None else self.codes.shape[2]

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.packed + self.rest.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held; static scales are the model's."""
        held = (self.codes, self.scale, self.zero, self.rest)
        return sum(part.nbytes for part in held if part is not None)

    def append(self, x: Tensor) -> None:
        """Store further tokens [batch, heads, tokens, head_dim]."""
        if self.coding.scheme is None:
            self.rest = torch.cat([self.rest, x], dim=2)
            return
        rest = torch.cat([self.rest, x], dim=2) if self.rest.shape[2] else x
        full = full_tokens(rest.shape[2], self.coding.tokens)
        if full:
            added = self._encode(rest[:, :, :full])
            held = (self.codes, self.scale, self.zero)
            self.codes, self.scale, self.zero = map(_joined, held, added)
        # A copy: a view would keep all of the pass' keys in memory.
        self.rest = rest[:, :, full:].clone()

    def read(self) -> Tensor:
        """[batch, heads, tokens, head_dim] in the dtype of what was appended."""
        if self.codes is None:
            return self.rest
        batch, count, packed = self.codes.shape[:3]
        values = self.rest.new_empty(batch, count, self.tokens, self.size)
        values[:, :, packed:] = self.rest
        # In portions, whose many intermediate forms stay in a core's cache and take no memory to speak of.
        step = self.coding.tokens * max(
            1, _NUMBERS // (batch * count * self.size * self.coding.tokens)
        )
        for start in range(0, packed, step):
            tokens = slice(start, min(start + step, packed))
            values[:, :, tokens] = self._decode(*self._parts(tokens))
        return values

    def drop_first(self, count: int) -> int:
        """Forget at most so many of the oldest tokens, whole groups; returns how many those were."""
        count = full_tokens(count, self.coding.tokens)
        if self.coding.scheme is None:
            self.rest = self.rest[:, :, count:].clone()
        elif count:
            self._keep(slice(count, self.packed))
        return count

    def drop_last(self, count: int) -> None:
        """Forget so many of the newest tokens. What is left of a group that was full stays at its quantized values, as
        part of a group that is to be filled again."""
        of_rest = min(count, self.rest.shape[2])
        self.rest = self.rest[:, :, : self.rest.shape[2] - of_rest].clone()
        left = self.packed - (count - of_rest)
        if left == self.packed:
            return
        whole = full_tokens(left, self.coding.tokens)
        if left > whole:
            self.rest = self.read()[:, :, whole:left].clone()
        self._keep(slice(0, whole))

    def change(self, how: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that is held; the batch is their first axis."""
        self.rest = how(self.rest)
        self.codes, self.scale, self.zero = (
            None if part is None else how(part) for part in (self.codes, self.scale, self.zero)
        )

    def _keep(self, tokens: slice) -> None:
        """Of the packed tokens only some, whole groups."""
        codes, scale, zero = self._parts(tokens)
        self.codes = codes.clone()
        self.scale = None if scale is None else scale.clone()
        self.zero = None if zero is None else zero.clone()

    def _parts(self, tokens: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Codes, scale and zero-point of some packed tokens, whole groups."""
        assert self.codes is not None
        groups = slice(tokens.start // self.coding.tokens, tokens.stop // self.coding.tokens)
        scale = None if self.scale is None else self.scale[:, :, groups]
        zero = None if self.zero is None else self.zero[:, :, groups]
        return self.codes[:, :, tokens], scale, zero

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Codes, and scale and zero-point where they are not static, of whole groups."""
        scheme = self.coding.scheme
        assert scheme is not None
        groups = self._grouped(x)
        scale, zero = (
            self._static(x.dtype) if scheme.static else dynamic_scale_and_zero(groups, scheme)
        )
        assert scale is not None
        codes = self._ungrouped(quantize(groups, scale, zero, scheme))
        words = pack(codes.flatten(0, 2), scheme.bits).view(torch.uint8)
        packed = words[:, : math.ceil(self.size * scheme.bits / 8)].unflatten(0, x.shape[:3])
        if scheme.static:
            return packed, None, None
        return packed, scale[..., 0], None if zero is None else zero[..., 0].to(torch.int8)

    def _decode(self, packed: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        scheme = self.coding.scheme
        assert scheme is not None
        padded = F.pad(packed, (0, -packed.shape[-1] % 4)).contiguous()
        words = padded.flatten(0, 2).view(torch.int32)
        codes = unpack(words, scheme.bits, self.size).unflatten(0, packed.shape[:3])
        if scale is None:
            scale, zero = self._static(self.rest.dtype)
        else:
            scale, zero = scale[..., None], None if zero is None else zero[..., None]
        return self._ungrouped(dequantize(self._grouped(codes), scale, zero, scheme))

    def _static(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        scale, zero = self.coding.scale, self.coding.zero
        assert scale is not None
        return scale.to(dtype), None if zero is None else zero.to(dtype)

    def _grouped(self, x: Tensor) -> Tensor:
        """A view whose last axis shares one scale; itself where scales are static."""
        scheme = self.coding.scheme
        assert scheme is not None
        if scheme.static:
            return x
        if scheme.groups_tokens:
            return x.unflatten(2, (-1, self.coding.tokens)).transpose(-1, -2)
        return x.unflatten(-1, (-1, scheme.group_size or self.size))

    def _ungrouped(self, groups: Tensor) -> Tensor:
        scheme = self.coding.scheme
        assert scheme is not None
        if scheme.static:
            return groups
        if scheme.groups_tokens:
            return groups.transpose(-1, -2).flatten(2, 3)
        return groups.flatten(-2)


def _joined(held: Tensor | None, added: Tensor | None) -> Tensor | None:
    if held is None or added is None:
        return None if added is None else added.clone()
    return torch.cat([held, added], dim=2)
