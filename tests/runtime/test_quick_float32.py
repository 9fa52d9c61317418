"""float32 products by oneDNN: as exact as PyTorch's default, and only within the context."""

import pytest
import torch

from bitfold.runtime import device
from bitfold.runtime.device import quick_float32

SWITCH = getattr(torch.backends.mkldnn, "matmul", None)

pytestmark = pytest.mark.skipif(SWITCH is None, reason="PyTorch is built without oneDNN")


BEFORE = "" if SWITCH is None else str(SWITCH.fp32_precision)


def state() -> str:
    assert SWITCH is not None
    return str(SWITCH.fp32_precision)


@pytest.mark.parametrize("shape", [(64, 256, 96), (1, 512, 256), (300, 700, 130)])
def test_products_are_as_exact_as_float32(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    exact = x.double() @ weight.double().T
    with quick_float32():
        found = torch.nn.functional.linear(x, weight)
    assert float((found - exact).norm() / exact.norm()) < 1e-6


def test_the_switch_goes_back_after_an_error() -> None:

    @quick_float32()
    def fails() -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fails()
    assert state() == BEFORE


def test_a_context_within_a_context_leaves_the_outer_one() -> None:
    with quick_float32():
        outer = state()
        with quick_float32():
            pass
        assert state() == outer
    assert state() == BEFORE


def test_a_cpu_that_would_multiply_in_bfloat16_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What oneDNN does with units for bfloat16, put in the place of the product."""
    plain = torch.Tensor.__matmul__

    def low(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32 and state() == "bf16":
            return plain(x.bfloat16(), other.bfloat16()).float()
        return plain(x, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", low)
    device._onednn_is_exact.cache_clear()
    try:
        with quick_float32():
            assert state() == BEFORE
    finally:
        device._onednn_is_exact.cache_clear()
