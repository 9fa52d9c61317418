"""Hadamard matrices: ±1, orthogonal, of the sizes that models have; the transform is the product with them."""

import pytest
import torch

from bitfold.numerics.hadamard import hadamard_matrix, hadamard_size, hadamard_transform

# 2^k, and q + 1 or 2(q + 1) for fields of prime and of prime power order (28 = 27 + 1, 52 = 2 (25 + 1), 344 = 343 + 1).
SIZES = [1, 2, 4, 64, 12, 20, 28, 36, 40, 44, 52, 60, 68, 76, 84, 108, 140, 148, 172 * 2, 768]


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_orthogonal_and_of_signs(size: int) -> None:
    matrix = hadamard_matrix(size)
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix.abs(), torch.ones(size, size, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 10, 14, 92, 0, -4])
def test_a_size_without_one_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size {size} is"):
        hadamard_matrix(size)


@pytest.mark.parametrize(
    "width", [1536, 2560, 4096, 4864, 5120, 5632, 8960, 11008, 13824, 14336, 18944, 28672]
)
def test_widths_of_models_have_one(width: int) -> None:
    assert hadamard_size(width) == width


@pytest.mark.parametrize(("width", "size"), [(7, 1), (6, 2), (30, 2), (24, 24), (92, 4), (1, 1)])
def test_other_widths_have_one_that_divides_them(width: int, size: int) -> None:
    assert hadamard_size(width) == size


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 12, 28, 40, 96, 256, 768, 1000])
def test_the_transform_is_the_product(size: int, inner: int) -> None:
    x = torch.randn(2, 3, size, inner, dtype=torch.float64)
    expected = torch.einsum("abni,nm->abmi", x, hadamard_matrix(size)) / size**0.5
    found = hadamard_transform(x)
    assert found.shape == x.shape
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert torch.allclose(found.norm(), x.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_every_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(5, 96, 1)
    found = hadamard_transform(x.to(dtype))
    assert found.dtype == dtype
    exact = hadamard_transform(x.to(dtype).double())
    assert (found - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()


def test_what_inference_mode_used_first_can_be_trained_through() -> None:
    x = torch.randn(1, 36, 1, dtype=torch.float64)
    with torch.inference_mode():
        hadamard_transform(x)
    again = x.clone().requires_grad_()
    hadamard_transform(again).square().sum().backward()
    assert torch.allclose(again.grad, 2 * x)


def test_gradients_pass() -> None:
    x = torch.randn(2, 24, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard_transform, x)
