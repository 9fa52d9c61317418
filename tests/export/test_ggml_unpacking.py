"""Blocks of every type against the dequantization of the package gguf: random bytes, and what its quantizer writes."""

import numpy as np
import pytest
import torch
from gguf_models import quantized_by_llama_cpp
from tiny_artifacts import assert_same_tensor

from bitfold.export import native
from bitfold.export.ggml_blocks import smallest, store
from bitfold.export.ggml_unpacking import LAYOUTS, as_weight
from bitfold.export.layout import WeightFormat
from bitfold.numerics import QuantizedTensor, TensorScheme, to_groups

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")

ROWS, COLUMNS = 6, 512
# Where half precision numbers stand in a block.
HALVES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82)},
    **{"Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ2_0": (64,), "MXFP4": ()},
    **{"IQ4_NL": (0,), "IQ4_XS": (0,)},
}


def random_blocks(name: str, rows: int = ROWS) -> np.ndarray:
    """Every bit drawn, but for numbers in half precision, which are finite."""
    inputs, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    generator = np.random.default_rng(len(name))
    blocks = generator.integers(0, 256, (rows * COLUMNS // inputs, size), dtype=np.uint8)
    for place in HALVES[name]:
        drawn = generator.normal(size=(len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = drawn.view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = generator.integers(0, 250, len(blocks))
    if name == "TQ2_0":  # the fourth value is written by no one
        codes = generator.integers(0, 3, (len(blocks), 64, 4)) << np.array([0, 2, 4, 6])
        blocks[:, :64] = np.bitwise_or.reduce(codes, axis=2)
    return blocks.reshape(rows, -1)


def reference(data: np.ndarray, name: str) -> np.ndarray:
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_are_ggmls_to_the_last_bit(name: str) -> None:
    data = random_blocks(name)
    weight = as_weight(data, name)
    assert weight.shape == (ROWS, COLUMNS)
    values = weight.dequantize(torch.float32).numpy()
    assert np.array_equal(values, reference(data, name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_bitfolds_own_format_holds_them(name: str) -> None:
    weight = as_weight(random_blocks(name), name)
    how = WeightFormat(native.NAME, "")
    back = native.from_tensors("a", native.to_tensors("a", weight, how), weight.scheme, how)
    assert_same_tensor(weight, back)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_llama_cpps_quantizer_writes(name: str) -> None:
    pytest.importorskip("xllamacpp", reason="the extra 'gguf' is not installed")
    values = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    data = quantized_by_llama_cpp(values, name)
    weight = as_weight(data, name)
    found = weight.dequantize(torch.float32).numpy()
    assert np.array_equal(found, reference(data, name))
    # Worse than a step of the grid would be another layout.
    error = np.sqrt(np.mean((found - values) ** 2))
    assert error < (1.0 if name == "TQ2_0" else 2.0 / 2 ** LAYOUTS[name].bits)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, 256, None])
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_bitfold_wrote_comes_back_as_it_was(
    bits: int, group: int | None, symmetric: bool
) -> None:
    torch.manual_seed(bits)
    values = torch.randn(ROWS, COLUMNS) + 0.2
    scheme = TensorScheme(
        bits=bits,
        symmetric=symmetric,
        granularity="group" if group else "channel",
        group_size=group,
    )
    low, high = to_groups(values, scheme).aminmax(dim=-1, keepdim=True)
    weight = QuantizedTensor.from_limits(values, low, high, scheme, torch.float16)
    kind = smallest(weight)
    if kind is None:
        assert (bits, symmetric) == (8, False)
        return
    back = as_weight(store(weight, kind).data, kind.name)
    assert torch.equal(back.dequantize(torch.float32), weight.dequantize(torch.float32))
    assert back.scale.shape == weight.scale.shape
    if not symmetric and kind.most_zero is not None:
        assert_same_tensor(back, weight)  # to the bit: codes, zero-points, scheme
    elif symmetric and back.scheme.bits == bits and back.zero is None:
        assert torch.equal(back.codes, weight.codes)
    again = smallest(back)
    assert again is not None
    assert again.bits <= kind.bits


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_scales_that_are_no_numbers_are_refused(name: str, number: float) -> None:
    data = random_blocks(name).copy()
    data[2, :2] = np.array([number], dtype=np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="no number"):
        as_weight(data, name)
