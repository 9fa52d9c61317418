"""Products of signs: 64 of them in a word, multiplied by counting the bits that differ.

A number's sign is −1 where it is below zero and +1 elsewhere, so at 0, −0 and NaN too (BinaryConnect, arXiv 1511.00363;
BNN, arXiv 1602.02830). With a bit for each, 1 for −1, the product of two rows of k signs is

    Σ a b = k − 2 popcount(a xor b)

(XNOR-Net, arXiv 1603.05279, section 3.2). `kernels/xnor.c` does it where the machine has a compiler, in as many threads
as PyTorch has; elsewhere, and on other devices, a product of numbers ±1 gives the same integers.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.runtime.compiled import Kernel, kernel

__all__ = ["Signs", "pack_signs", "panels_of", "signed_linear", "xnor_kernel", "xnor_product"]

WORD = 64
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_EXACT_FLOAT32 = 2**24
"""Integers up to which every one is a number of float32."""


@dataclass(frozen=True)
class Signs:
    """Rows of signs.

    words: [rows, words] int64, of which bit i of word w is 1 where sign 64 w + i is −1; bits that stand for nothing are
    0. bits: how many signs a row has.
    """

    words: Tensor
    bits: int


def pack_signs(x: Tensor) -> Signs:
    """The signs of the rows of x, [rows, k], in any dtype and with any strides.

    Raises RecipeError for what is no matrix.

    >>> int(pack_signs(torch.tensor([[1.0, -2.0, 0.0, -0.5]])).words)
    10
    """
    if x.dim() != 2:
        raise RecipeError(
            f"Signs are packed of a matrix, not of a tensor of shape {tuple(x.shape)}"
        )
    x = x.detach()
    library = _library(x)
    if library is None:
        return Signs(_pack(x), x.shape[1])
    return Signs(_packed_by(library, x), x.shape[1])


def xnor_product(left: Signs, right: Signs, panels: Tensor | None = None) -> Tensor:
    """Signs [m, k] by signs [n, k]: [m, n] int32, exact.

    panels: `panels_of(right)`, for a right side that is used again.

    Raises RecipeError for rows of different lengths.

    >>> xnor_product(pack_signs(torch.tensor([[1.0, -1.0]])), pack_signs(torch.tensor([[2.0, 3.0]])))
    tensor([[0]], dtype=torch.int32)
    """
    library = _checked(left, right)
    if library is None:
        return _product(left, right).to(torch.int32)
    if panels is None:
        panels = panels_of(right)
        assert panels is not None
    return _product_by(library, left, panels, len(right.words))


def signed_linear(
    x: Tensor,
    right: Signs,
    panels: Tensor | None = None,
    *,
    of_column: Tensor | None = None,
    of_row: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The signs of x [m, k] by signs [n, k], times of_column [n], times of_row [m], plus bias [n]: [m, n] float32.

    Each step is rounded once. The three are float32 side by side, or None; panels as in `xnor_product`. Raises
    RecipeError for rows of different lengths.
    """
    library = _library(x)
    if x.shape[1] != right.bits:
        raise RecipeError(_unequal(x.shape[1], right.bits))
    if library is None:
        found = _product(pack_signs(x), right).float()
        if of_column is not None:
            found *= of_column
        if of_row is not None:
            found *= of_row[:, None]
        return found if bias is None else found.add_(bias)
    if panels is None:
        panels = panels_of(right)
        assert panels is not None
    x, kind = _readable(x.detach())
    (columns, words), rows, threads = right.words.shape, x.shape[0], torch.get_num_threads()
    found = torch.empty(rows, columns)
    signs = torch.empty(rows * words, dtype=torch.int64)
    scratch = torch.empty(threads * library.xnor_scratch(words), dtype=torch.uint8)
    library.xnor_linear(
        *(x.data_ptr(), kind, x.stride(0), signs.data_ptr(), panels.data_ptr()),
        *(rows, columns, right.bits, found.data_ptr()),
        *(_address(of_column, columns), _address(of_row, rows), _address(bias, columns)),
        *(scratch.data_ptr(), threads),
    )
    return found


def panels_of(right: Signs) -> Tensor | None:
    """The right side of a product as the kernel reads it, int64; None where plain PyTorch runs."""
    library = _library(right.words)
    if library is None:
        return None
    return _panels_by(library, right.words.contiguous())


def xnor_kernel() -> Kernel:
    """What runs products of signs on this machine's processor, and why; its library is None for plain PyTorch."""
    return _told(kernel("xnor"))


# -- the kernel ---------------------------------------------------------------------------------------


@cache
def _told(found: Kernel) -> Kernel:
    """The kernel with its arguments declared; without its library where that does not give what it should."""
    library = found.library
    if library is None:
        return found
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.xnor_way.restype = ctypes.c_char_p
    library.xnor_panel.restype = library.xnor_scratch.restype = integer
    library.xnor_scratch.argtypes = [integer]
    library.xnor_pack.argtypes = [pointer, *[integer] * 4, pointer, integer]
    library.xnor_arrange.argtypes = [pointer, integer, integer, pointer]
    library.xnor_product.argtypes = [*[pointer] * 2, *[integer] * 4, *[pointer] * 6, integer]
    library.xnor_linear.argtypes = [
        *(pointer, integer, integer, pointer, pointer, integer, integer, integer),
        *([pointer] * 5),
        integer,
    ]
    for name in ("xnor_pack", "xnor_arrange", "xnor_product", "xnor_linear"):
        getattr(library, name).restype = None
    if not _is_right(library):
        return Kernel(
            found.name, None, "plain PyTorch: the compiled kernel miscounts on this machine"
        )
    return Kernel(found.name, library, f"{library.xnor_way().decode()}, {found.why}")


def _is_right(library: ctypes.CDLL) -> bool:
    """Whether it counts as plain PyTorch does: compilers, and instructions, differ from machine to machine."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 330, generator=generator)
    y = torch.randn(70, 330, generator=generator)
    left, right = (Signs(_pack(rows), 330) for rows in (x, y))
    if not torch.equal(_packed_by(library, x), left.words):
        return False
    found = _product_by(library, left, _panels_by(library, right.words), len(y))
    return torch.equal(found, _product(left, right).to(torch.int32))


def _packed_by(library: ctypes.CDLL, x: Tensor) -> Tensor:
    x, kind = _readable(x)
    rows, columns = x.shape
    words = torch.empty(rows, -(-columns // WORD), dtype=torch.int64)
    threads = torch.get_num_threads()
    library.xnor_pack(x.data_ptr(), kind, rows, columns, x.stride(0), words.data_ptr(), threads)
    return words


def _panels_by(library: ctypes.CDLL, words: Tensor) -> Tensor:
    rows, count = words.shape
    panel = library.xnor_panel()
    found = torch.empty(-(-rows // panel) * panel * count, dtype=torch.int64)
    library.xnor_arrange(words.data_ptr(), rows, count, found.data_ptr())
    return found


def _product_by(library: ctypes.CDLL, left: Signs, panels: Tensor, columns: int) -> Tensor:
    rows, words = left.words.shape
    found = torch.empty(rows, columns, dtype=torch.int32)
    given, threads = left.words.contiguous(), torch.get_num_threads()
    scratch = torch.empty(threads * library.xnor_scratch(words), dtype=torch.uint8)
    library.xnor_product(
        *(given.data_ptr(), panels.data_ptr(), rows, columns, left.bits, words),
        *(found.data_ptr(), None, None, None, None, scratch.data_ptr(), threads),
    )
    return found


def _library(x: Tensor) -> ctypes.CDLL | None:
    return xnor_kernel().library if x.device.type == "cpu" else None


def _readable(x: Tensor) -> tuple[Tensor, int]:
    """A matrix as the kernel reads it, and the kind of its numbers."""
    if x.dtype not in _KINDS:
        x = (x < 0).float().neg_()
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    return x, _KINDS[x.dtype]


def _address(factor: Tensor | None, length: int) -> int | None:
    if factor is None:
        return None
    assert factor.shape == (length,)
    assert factor.dtype == torch.float32
    assert factor.is_contiguous()
    return factor.data_ptr()


def _checked(left: Signs, right: Signs) -> ctypes.CDLL | None:
    if left.bits != right.bits or left.words.shape[1] != right.words.shape[1]:
        raise RecipeError(_unequal(left.bits, right.bits))
    return _library(left.words) if right.words.device.type == "cpu" else None


def _unequal(left: int, right: int) -> str:
    return (
        f"Rows of {left} signs cannot be multiplied by rows of {right}: give both the same length"
    )


# -- plain PyTorch ------------------------------------------------------------------------------------


def _pack(x: Tensor) -> Tensor:
    below = F.pad(x < 0, (0, -x.shape[1] % WORD)).to(torch.uint8)
    if not below.numel():
        return torch.empty(len(x), below.shape[1] // WORD, dtype=torch.int64, device=x.device)
    places = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    octets = (below.unflatten(1, (-1, 8)) * places).sum(dim=-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int64)


def _product(left: Signs, right: Signs) -> Tensor:
    """[m, n] float32 or float64, exact."""
    # Bits that stand for nothing are +1 on both sides.
    wide = WORD * left.words.shape[1]
    dtype = torch.float32 if wide <= _EXACT_FLOAT32 else torch.float64
    numbers = [_numbers(signs.words, dtype) for signs in (left, right)]
    return (numbers[0] @ numbers[1].T).sub_(wide - left.bits)


def _numbers(words: Tensor, dtype: torch.dtype) -> Tensor:
    """±1, with a number for every bit of the words."""
    octets = words.contiguous().view(torch.uint8)[..., None]
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((octets >> places) & 1).flatten(1).to(dtype).mul_(-2).add_(1)
