"""Products of bytes that are summed exactly: oneDNN's where the processor has instructions, else compiled ones.

oneDNN (`torch.ops.onednn.qlinear_pointwise`) multiplies bytes 0 … 255 by codes −128 … 127. Without VNNI it adds pairs
of products in 16 bits, which clips; there `kernels/int8.c` multiplies in 16 bits and adds in 32.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bitfold.runtime.compiled import Kernel, kernel

__all__ = ["MIDDLE", "BytesWeight", "no_products"]

MIDDLE = 128
"""What is taken off the bytes of an input."""
_MOST_INPUTS = 1 << 16


class BytesWeight:
    """A weight's codes [out, in] int8, as the product that this processor has takes them: a byte for each."""

    def __init__(self, codes: Tensor) -> None:
        self._channels, self._inputs = codes.shape
        codes = codes.to(torch.int8).contiguous()
        self._codes: Tensor | None = None
        if _onednn_is_exact():
            self._packed: Any = torch.ops.onednn.qlinear_prepack(codes, None)
            self._ones = torch.ones(self._channels)
            self._no_zeros = torch.zeros(self._channels, dtype=torch.int64)
        else:
            self._codes = codes

    def product(self, given: Tensor) -> Tensor:
        """Rows of bytes [rows, in] uint8, less 128, times the codes: [rows, out] float32."""
        if self._codes is None:
            return _by_onednn(given.contiguous(), self._packed, self._ones, self._no_zeros)
        wide = given.to(torch.int16).sub_(MIDDLE).contiguous()
        return _compiled(wide, self._codes)


def no_products() -> str | None:
    """Why there are none on this machine; None if there are."""
    if _onednn_is_exact():
        return None
    found = _int8_kernel()
    if found.library is not None:
        return None
    return (
        "oneDNN's products of bytes are not there, or not exact, on this processor, and others are not compiled "
        f"({found.why})"
    )


def _by_onednn(given: Tensor, weight: Any, ones: Tensor, no_zeros: Tensor) -> Tensor:
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        *(given, 1.0, MIDDLE, weight, ones, no_zeros, None),
        *(1.0, 0, torch.float32, "none", [], ""),
    )
    return found


def _compiled(given: Tensor, codes: Tensor) -> Tensor:
    """given: [rows, in] int16, codes: [out, in] int8, both contiguous."""
    library = _int8_kernel().library
    assert library is not None
    found = torch.empty(len(given), len(codes))
    # Parts whose sums 32 bits hold.
    for at in range(0, given.shape[1], _MOST_INPUTS):
        part = found if at == 0 else torch.empty_like(found)
        whole = given.shape[1] <= _MOST_INPUTS
        own = given if whole else given[:, at : at + _MOST_INPUTS].contiguous()
        of_weight = codes if whole else codes[:, at : at + _MOST_INPUTS].contiguous()
        library.int8_product(
            *(own.data_ptr(), of_weight.data_ptr(), part.data_ptr()),
            *(len(own), own.shape[1], len(of_weight), torch.get_num_threads()),
        )
        if at:
            found += part
    return found


def _int8_kernel() -> Kernel:
    return _told(kernel("int8"))


@cache
def _told(found: Kernel) -> Kernel:
    """The kernel with its arguments declared; without its library where that does not give what it should."""
    if found.library is None:
        return found
    found.library.int8_product.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 4]
    found.library.int8_product.restype = None
    given, codes, wanted = _extremes()
    sums = torch.empty(wanted.shape)
    wide = given.to(torch.int16) - MIDDLE
    found.library.int8_product(
        wide.data_ptr(), codes.data_ptr(), sums.data_ptr(), len(wide), wide.shape[1], len(codes), 1
    )
    if not torch.equal(sums, wanted):
        return Kernel(found.name, None, "plain PyTorch: the compiled kernel errs on this machine")
    return found


@cache
def _onednn_is_exact() -> bool:
    """Whether the sums are those of integers."""
    given, codes, wanted = _extremes()
    try:
        weight = torch.ops.onednn.qlinear_prepack(codes, None)
        ones, no_zeros = torch.ones(len(codes)), torch.zeros(len(codes), dtype=torch.int64)
        found = _by_onednn(given, weight, ones, no_zeros)
    except (AttributeError, RuntimeError):  # built without oneDNN
        return False
    return torch.equal(found, wanted)


def _extremes() -> tuple[Tensor, Tensor, Tensor]:
    """Bytes [rows, in], codes [out, in] and their products, the largest among them."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (32, 256), generator=generator, dtype=torch.int8)
    codes[0], codes[1] = 127, -128
    given = torch.randint(0, 256, (7, 256), generator=generator, dtype=torch.uint8)
    given[0], given[1] = 255, 0
    return given, codes, ((given.int() - MIDDLE) @ codes.int().T).float()
