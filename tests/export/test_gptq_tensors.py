"""GPTQ's and AWQ's tensors, against their formulas written out bit by bit, and back."""

import pytest
import torch
from torch import Tensor

from bitfold.export.gptq import from_awq, from_gptq, to_awq, to_gptq, unsayable
from bitfold.numerics import QuantizedTensor, TensorScheme, to_groups

ROWS, COLUMNS = 64, 96


def weight(bits: int, group: int | None, *, symmetric: bool) -> QuantizedTensor:
    torch.manual_seed(bits)
    values = torch.randn(ROWS, COLUMNS) + 0.3
    values[0] = values[0].abs()  # a group without negative weights: its zero-point is the lowest
    scheme = TensorScheme(
        bits=bits,
        symmetric=symmetric,
        granularity="group" if group else "channel",
        group_size=group,
    )
    low, high = to_groups(values, scheme).aminmax(dim=-1, keepdim=True)
    low = low.clamp(max=0)
    return QuantizedTensor.from_limits(values, low, high, scheme, torch.float16)


def field(words: Tensor, start: int, bits: int) -> int:
    """The unsigned integer of some bits of a row of int32 words, by Python's integers."""
    number = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(words.tolist()))
    return number >> start & ((1 << bits) - 1)


@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_by_its_formula(bits: int, group: int | None, symmetric: bool, less_one: bool) -> None:
    tensor = weight(bits, group, symmetric=symmetric)
    stored = to_gptq("layer", tensor, less_one=less_one)
    qweight, qzeros = stored["layer.qweight"], stored["layer.qzeros"]
    groups = 3 if group else 1
    assert qweight.shape == (COLUMNS * bits // 32, ROWS)
    assert qzeros.shape == (groups, ROWS * bits // 32)
    exact = tensor.dequantize(torch.float64)
    for row, column in ((0, 0), (1, 31), (5, 10), (5, 11), (33, 64), (63, 95)):
        of = int(stored["layer.g_idx"][column])
        assert of == column // (group or COLUMNS)
        code = field(qweight[:, row], column * bits, bits)
        zero = (field(qzeros[of], row * bits, bits) + less_one) % (1 << bits)
        scale = stored["layer.scales"][of, row].double()
        assert torch.isclose(scale * (code - zero), exact[row, column], rtol=1e-12)
    back = from_gptq("layer", stored, tensor.scheme, less_one=less_one)
    assert torch.equal(back.dequantize(torch.float64), exact)
    assert torch.equal(back.codes, tensor.codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_awq_by_its_formula(group: int | None, symmetric: bool) -> None:
    tensor = weight(4, group, symmetric=symmetric)
    stored = to_awq("layer", tensor)
    assert stored["layer.qweight"].shape == (COLUMNS, ROWS // 8)
    exact = tensor.dequantize(torch.float64)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    for row, column in ((0, 0), (1, 31), (7, 32), (33, 64), (63, 95)):
        of = column // (group or COLUMNS)
        shift = 4 * order.index(row % 8)
        code = int(stored["layer.qweight"][column, row // 8]) >> shift & 15
        zero = int(stored["layer.qzeros"][of, row // 8]) >> shift & 15
        scale = stored["layer.scales"][of, row].double()
        assert torch.isclose(scale * (code - zero), exact[row, column], rtol=1e-12)
    back = from_awq("layer", stored, tensor.scheme)
    assert torch.equal(back.dequantize(torch.float64), exact)


def test_groups_in_another_order_are_refused() -> None:
    tensor = weight(4, 32, symmetric=True)
    stored = to_gptq("layer", tensor, less_one=True)
    stored["layer.g_idx"] = stored["layer.g_idx"].flip(0)
    with pytest.raises(ValueError, match="scattered"):
        from_gptq("layer", stored, tensor.scheme, less_one=True)


@pytest.mark.parametrize(
    ("method", "bits", "reason"),
    [("awq", 3, "integers of 4 bits, not int of 3"), ("gptq", 5, "2 or 3 or 4 or 8 bits")],
)
def test_other_bits_are_refused(method: str, bits: int, reason: str) -> None:
    assert reason in str(unsayable(weight(bits, 32, symmetric=True), method))
    assert unsayable(weight(4, 32, symmetric=True), method) is None


def test_scales_beyond_half_precision_are_refused() -> None:
    tensor = weight(4, 32, symmetric=True)
    wide = QuantizedTensor(tensor.codes, tensor.scale.float() * 1e9, None, tensor.scheme)
    assert "half precision" in str(unsayable(wide, "gptq"))
