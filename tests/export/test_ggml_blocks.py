"""Blocks against the dequantization of llama.cpp's own package."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitfold.export.ggml_blocks import TYPES, smallest, store
from bitfold.numerics import QuantizedTensor, TensorScheme, to_groups

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")


def weight(
    bits: int, group: int | None, *, symmetric: bool, dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    torch.manual_seed(bits)
    values = torch.randn(6, 512) + 0.3
    scheme = TensorScheme(
        bits=bits,
        symmetric=symmetric,
        granularity="group" if group else "channel",
        group_size=group,
    )
    groups = to_groups(values, scheme)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return QuantizedTensor.from_limits(values, low, high, scheme, dtype)


def engine_values(tensor: QuantizedTensor) -> tuple[str, np.ndarray]:
    """The type, and what llama.cpp makes of the bytes."""
    kind = smallest(tensor)
    assert kind is not None
    stored = store(tensor, kind)
    assert stored.scale_error == 0
    assert stored.data.shape == (6, 512 // kind.inputs * kind.size)
    type_ = gguf.GGMLQuantizationType[kind.name]
    assert gguf.GGML_QUANT_SIZES[type_] == (kind.inputs, kind.size)
    return kind.name, gguf.quants.dequantize(stored.data, type_)


CASES = [
    (2, None, True, "Q2_K"),
    (2, None, False, "Q2_K"),
    (2, 256, False, "Q2_K"),
    (2, 64, False, "Q4_0"),
    (3, None, True, "Q3_K"),
    (3, 128, True, "Q4_0"),
    (3, 128, False, "Q4_0"),
    (4, 32, True, "Q4_0"),
    (4, None, True, "Q4_0"),
    (4, None, False, "Q4_K"),
    (4, 256, False, "Q4_K"),
    (4, 128, False, "Q5_0"),
    (5, 128, True, "Q5_0"),
    (5, None, False, "Q5_K"),
    (6, None, True, "Q6_K"),
    (6, 128, False, "Q8_0"),
    (8, 32, True, "Q8_0"),
]


@pytest.mark.parametrize(("bits", "group", "symmetric", "name"), CASES)
def test_llama_cpp_reads_the_same_values(
    bits: int, group: int | None, symmetric: bool, name: str
) -> None:
    tensor = weight(bits, group, symmetric=symmetric)
    found, values = engine_values(tensor)
    assert found == name
    assert np.array_equal(values, tensor.dequantize(torch.float32).numpy())


@pytest.mark.parametrize("bits", [2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_in_blocks(bits: int, dtype: torch.dtype) -> None:
    """Groups of 16 of very different size, whose scales were rounded to what K types say."""
    torch.manual_seed(bits)
    values = torch.randn(6, 512) * torch.exp(torch.randn(6, 32)).repeat_interleave(16, dim=1)
    scheme = TensorScheme(bits=bits, granularity="group", group_size=16, scales="blocks")
    limits = to_groups(values, scheme).aminmax(dim=-1, keepdim=True)
    tensor = QuantizedTensor.from_limits(values, *limits, scheme, dtype)
    # What an artifact says of it, which has no word for this.
    tensor = replace(tensor, scheme=scheme.model_copy(update={"scales": "storage"}))
    found, there = engine_values(tensor)
    assert found == f"Q{bits}_K"
    assert np.array_equal(there, tensor.dequantize(torch.float32).numpy())
    assert len(np.unique(tensor.scale.double().numpy())) > 20


def test_groups_of_16_with_scales_of_their_own_have_no_block() -> None:
    assert smallest(weight(3, 16, symmetric=True)) is None


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_holds_its_whole_range(kind) -> None:  # type: ignore[no-untyped-def]
    """All integers, and all zero-points, in all places of a block."""
    span = kind.high - kind.low + 1
    torch.manual_seed(0)
    units = torch.randint(0, span, (6 * 512 // kind.inputs, kind.inputs))
    zero = torch.randint(0, (kind.most_zero or 0) + 1, (len(units),))
    scale = torch.rand(len(units), 1).half()
    data = kind.pack(
        units.to(torch.uint8).numpy(),
        zero.to(torch.uint8).numpy(),
        scale.view(torch.uint8).numpy(),
        None,
    )
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.name])
    shift = zero[:, None] if kind.most_zero is not None else -kind.low
    expected = scale.float() * (units - shift)
    assert np.allclose(values, expected.numpy(), rtol=1e-6, atol=1e-6)


def test_scales_that_half_precision_rounds_are_measured() -> None:
    tensor = weight(4, 32, symmetric=True, dtype=torch.float32)
    stored = store(tensor, TYPES[2])
    assert 0 < stored.scale_error <= 2**-11
    values = gguf.quants.dequantize(stored.data, gguf.GGMLQuantizationType.Q4_0)
    exact = tensor.dequantize(torch.float32).numpy()
    assert np.abs(values - exact).max() <= stored.scale_error * np.abs(exact).max()


@pytest.mark.parametrize("factor", [1e-9, 1e6])
def test_scales_out_of_range_are_refused(factor: float) -> None:
    tensor = weight(4, 32, symmetric=True, dtype=torch.float32)
    wrong = QuantizedTensor(tensor.codes, tensor.scale * factor, None, tensor.scheme)
    with pytest.raises(OverflowError, match="half precision"):
        store(wrong, TYPES[2])


def test_mxfp4_is_a_type_of_its_own() -> None:
    """Every code in every place, and every exponent that is a number."""
    torch.manual_seed(0)
    scheme = TensorScheme(grid="mxfp4", bits=4, granularity="group", group_size=32)
    codes = torch.randint(0, 16, (510, 64)).to(torch.uint8)
    exponents = torch.arange(1020).reshape(510, 2).remainder(255).to(torch.uint8)
    tensor = QuantizedTensor(codes, exponents.view(torch.float8_e8m0fnu), None, scheme)
    kind = smallest(tensor)
    assert kind is not None
    assert (kind.name, kind.bits) == ("MXFP4", 4.25)
    stored = store(tensor, kind)
    assert stored.scale_error == 0
    values = gguf.quants.dequantize(stored.data, gguf.GGMLQuantizationType.MXFP4)
    expected = tensor.dequantize(torch.float64).numpy()
    assert np.array_equal(values.astype(np.float64), expected.astype(np.float32))


def test_what_no_type_holds() -> None:
    assert smallest(weight(8, 32, symmetric=False)) is None
    assert smallest(weight(4, 16, symmetric=True)) is None
