"""Products of bytes are those of integers, by whichever way the processor has."""

import pytest
import torch
from torch import Tensor

from bitfold.runtime import int8_product
from bitfold.runtime.compiled import DISABLED, forget_kernels
from bitfold.runtime.int8_product import MIDDLE, BytesWeight, no_products

pytestmark = pytest.mark.skipif(no_products() is not None, reason=str(no_products()))


def _bytes(rows: int, inputs: int) -> Tensor:
    draw = torch.Generator().manual_seed(rows + inputs)
    return torch.randint(0, 256, (rows, inputs), generator=draw, dtype=torch.uint8)


def _codes(channels: int, inputs: int) -> Tensor:
    draw = torch.Generator().manual_seed(channels)
    return torch.randint(-128, 128, (channels, inputs), generator=draw, dtype=torch.int8)


def _wanted(given: Tensor, codes: Tensor) -> Tensor:
    return ((given.long() - MIDDLE) @ codes.long().T).float()


@pytest.fixture(params=["chosen", "compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the processor has, and what others have."""
    if request.param == "compiled":
        if int8_product._int8_kernel().library is None:
            pytest.skip(int8_product._int8_kernel().why)
        monkeypatch.setattr(int8_product, "_onednn_is_exact", lambda: False)
    return str(request.param)


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 67])
@pytest.mark.parametrize(("channels", "inputs"), [(1, 16), (7, 33), (48, 384), (101, 15)])
def test_it_is_exact(way: str, rows: int, channels: int, inputs: int) -> None:
    given, codes = _bytes(rows, inputs), _codes(channels, inputs)
    assert torch.equal(BytesWeight(codes).product(given), _wanted(given, codes))


def test_sums_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bytes and codes that are all at the ends: in parts, each of which is exact."""
    if int8_product._int8_kernel().library is None:
        pytest.skip(int8_product._int8_kernel().why)
    monkeypatch.setattr(int8_product, "_onednn_is_exact", lambda: False)
    inputs = (1 << 17) + 40
    given = torch.zeros(2, inputs, dtype=torch.uint8)
    codes = torch.full((3, inputs), -128, dtype=torch.int8)
    assert torch.equal(BytesWeight(codes).product(given), _wanted(given, codes))


def test_rows_that_are_not_contiguous(way: str) -> None:
    given, codes = _bytes(64, 9).T, _codes(20, 64).flip(0)
    assert torch.equal(BytesWeight(codes).product(given), _wanted(given, codes))


def test_threads_share_channels(way: str) -> None:
    given, codes, before = _bytes(64, 512), _codes(257, 512), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = BytesWeight(codes).product(given)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, _wanted(given, codes))


def test_without_either_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_product, "_onednn_is_exact", lambda: False)
    monkeypatch.setenv(DISABLED, "1")
    forget_kernels()
    try:
        said = no_products()
    finally:
        monkeypatch.delenv(DISABLED)
        forget_kernels()
    assert said is not None
    assert DISABLED in said
