"""Values by product quantization: in loops, with gradients, and closer than integers of the same bits."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitfold.numerics import TensorScheme, fake_quantize_dynamic, quantize_values
from bitfold.rounding.kmeans import first_entries, kmeans
from bitfold.runtime.attention import (
    ATTENTION,
    VALUE_CODEBOOK,
    HeadQuantizers,
    set_head_quantizers,
)

BATCH, HEADS, TOKENS, SIZE = 2, 2, 40, 64


def _values(batch: int = BATCH, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dimensions of a head correlate, the more the nearer they are: by 0.8 where they are adjacent."""
    place = torch.arange(SIZE)
    covariance = 0.8 ** (place[:, None] - place).abs()
    x = torch.randn(batch, HEADS, TOKENS, SIZE, generator=torch.Generator().manual_seed(batch))
    return (x @ torch.linalg.cholesky(covariance).T).to(dtype)


def _learned(x: Tensor, dim: int, entries: int) -> Tensor:
    points = x.transpose(1, 2).flatten(0, 1).flatten(1).unflatten(1, (-1, dim)).transpose(0, 1)
    first = first_entries(points, len(points), entries)
    eye = torch.eye(dim).expand(len(points), -1, -1)
    return kmeans(points, eye, torch.ones(points.shape[1]), first, 20)


@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loops(dim: int, dtype: torch.dtype) -> None:
    x = _values(dtype=dtype)
    codebook = torch.randn(HEADS * SIZE // dim, 9, dim).to(dtype)
    found = quantize_values(x, codebook)
    assert found.dtype == dtype
    expected = np.zeros(x.shape)
    for batch, head, token, part in np.ndindex(BATCH, HEADS, TOKENS, SIZE // dim):
        columns = slice(part * dim, part * dim + dim)
        book = codebook[head * SIZE // dim + part].double()
        near = (x[batch, head, token, columns].double() - book).square().sum(1).argmin()
        expected[batch, head, token, columns] = book[near]
    assert np.array_equal(found.double().numpy(), expected)


@pytest.mark.parametrize(("bits", "dim"), [(2, 4), (3, 2), (4, 2)])
def test_closer_than_integers_on_correlated_values(bits: int, dim: int) -> None:
    """On values that nothing was learned from; the integers' scales and zero-points come on top of their bits."""
    learned, x = _values(400), _values(8)
    found = quantize_values(x, _learned(learned, dim, 2 ** (bits * dim)))
    integers = TensorScheme(bits=bits, symmetric=False, granularity="token")
    errors = [
        float((one - x).square().sum()) for one in (found, fake_quantize_dynamic(x, integers))
    ]
    assert errors[0] < 0.9 * errors[1]


def test_gradients_pass_straight_through() -> None:
    x = _values().requires_grad_()
    pull = torch.randn(x.shape)
    (quantize_values(x, torch.randn(HEADS * SIZE, 4, 1)) * pull).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, pull)


def test_the_attention_sees_quantized_values() -> None:
    """By the codebook of the quantizers, or else by the module's own."""
    module = torch.nn.Module()
    query, key, value = _values(), _values(3)[:BATCH], _values(4)[:BATCH]
    codebook = torch.randn(HEADS * SIZE // 2, 8, 2)
    scheme = TensorScheme(grid="codebook", bits=2, granularity="token")
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    expected = plain(module, query, key, quantize_values(value, codebook), None)[0]
    assert not torch.allclose(expected, plain(module, query, key, value, None)[0])
    set_head_quantizers(
        module, HeadQuantizers(None, None, scheme, tensors={VALUE_CODEBOOK: codebook})
    )
    attend = ALL_ATTENTION_FUNCTIONS[ATTENTION]
    assert torch.equal(attend(module, query, key, value, None)[0], expected)
    set_head_quantizers(module, HeadQuantizers(None, None, scheme))
    module.register_buffer(VALUE_CODEBOOK, codebook)
    assert torch.equal(attend(module, query, key, value, None)[0], expected)
