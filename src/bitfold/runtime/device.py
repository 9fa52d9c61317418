"""Which device, and which dtype, a model runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch

from bitfold.errors import RecipeError, did_you_mean

__all__ = ["has_fast_bfloat16", "quick_float32", "resolve_device", "resolve_dtype"]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """A device that is there: "auto" is CUDA if there is one, else the CPU.

    Raises RecipeError for a name that is none, and for a CUDA device this machine does not have.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = str(device).partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        known = did_you_mean(kind, ["auto", "cpu", "cuda"])
        raise RecipeError(f"Unknown device '{device}': {known} (cuda:1 is the second GPU).")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise RecipeError(
                f"The device '{device}' was asked for, but PyTorch sees {count} CUDA devices here: "
                "use another device, or 'auto'."
            )
    return torch.device(str(device))


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | Literal["auto"]:
    """The dtype to load in, as transformers takes it.

    "auto" is float32 on the CPU, where half precision is slow and coarse, and the checkpoint's own
    dtype (transformers' "auto") elsewhere. RecipeError for a name that is none.

    >>> resolve_dtype("bfloat16", torch.device("cpu"))
    torch.bfloat16
    """
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise RecipeError(f"A model cannot run in {dtype}: use one of {', '.join(DTYPES)}.")
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise RecipeError(f"Unknown dtype '{dtype}': {did_you_mean(dtype, ['auto', *DTYPES])}.")
    return DTYPES[dtype]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are quicker there than in float32: on any GPU, on a CPU with instructions
    for them (elsewhere they are emulated, several times slower)."""
    if device.type != "cpu":
        return True
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


@contextmanager
def quick_float32() -> Iterator[None]:
    """Within this context the CPU's matrix products in float32 are oneDNN's where those are float32's to the last bits:
    PyTorch's default, MKL, leaves half of what AMD's processors can do unused. The last bit is another one, so what is
    compared with other programs' results for equality is computed outside. Also a decorator.
    """
    # The switch is meant to allow bfloat16 inside, and chooses oneDNN; where that has no units for it, the product is
    # an ordinary one.
    switch = _switch()
    if switch is None or not _onednn_is_exact():
        yield
        return
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _switch() -> Any:
    """Where PyTorch is told how oneDNN may multiply; None in a build without it."""
    return getattr(torch.backends.mkldnn, "matmul", None)


@cache
def _onednn_is_exact() -> bool:
    """Whether the products that `quick_float32` chooses are as exact as float32 is."""
    switch = _switch()
    before = switch.fp32_precision
    x = torch.linspace(0.5, 1.5, 128 * 128).reshape(128, 128)
    exact = x.double() @ x.double()
    switch.fp32_precision = "bf16"
    try:
        return bool((x @ x - exact).norm() <= 1e-6 * exact.norm())
    finally:
        switch.fp32_precision = before
