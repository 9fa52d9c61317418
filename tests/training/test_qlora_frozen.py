"""The frozen base: packed in memory, its gradient exact, nothing unpacked kept for the backward pass."""

from pathlib import Path

import pytest
import torch
from adapter_bases import artifact_of, base, frozen_of, logits

import bitfold
from bitfold.errors import CheckpointError, RecipeError
from bitfold.numerics import QuantizedTensor, Scheme
from bitfold.numerics.nested_scale import nested_nearest
from bitfold.runtime.frozen import FrozenLinear, load_frozen

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def layer(notation: str = "wnf4a16g32", *, nested: bool = False) -> FrozenLinear:
    scheme = Scheme.parse(notation)
    assert scheme.weight is not None
    w = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    tensor, scales = nested_nearest(w, scheme.weight)
    return FrozenLinear(tensor, scheme, torch.ones(96), nested=scales if nested else None)


@pytest.mark.parametrize("notation", ["wnf4a16g32", "w4a16g32", "w3a16g64", "wfp8a16"])
@pytest.mark.parametrize("nested", [False, True])
def test_values_and_gradient_are_those_of_the_weight(notation: str, nested: bool) -> None:
    frozen = layer(notation, nested=nested)
    w = frozen.quantized().dequantize(torch.float64)
    x = torch.randn(5, 7, 64, requires_grad=True)
    g = torch.randn(5, 7, 96)
    y = frozen(x)
    y.backward(g)
    assert torch.allclose(y.double(), x.double() @ w.T + 1, atol=1e-4)
    assert x.grad is not None
    assert torch.allclose(x.grad.double(), g.double() @ w, atol=1e-4)


def test_nothing_unpacked_is_kept_for_the_backward_pass() -> None:
    frozen, kept = layer(nested=True), list[int]()
    x = torch.randn(3, 64, requires_grad=True)

    def see(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        frozen(x).sum()
    assert 96 * 64 not in kept
    dense = torch.nn.functional.linear
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        dense(x, frozen.dequantize(torch.float32)).sum()
    assert 96 * 64 in kept  # else the test would see nothing


def test_nested_scales_stay_in_8_bits() -> None:
    frozen = layer("wnf4a16g64", nested=True)
    # 4 bits of code, a byte for each 64, an outer scale for up to 256 of those, the mean, the levels and the shape.
    assert frozen.nbytes == 96 * 64 // 2 + 96 + 4 + 4 + 4 * 256 + 4 * 96 - 4 * 96 + 16


def test_autocast_and_its_backward() -> None:
    frozen = layer()
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    expected = frozen.dequantize(torch.float32).sum(0).expand(3, 64)
    assert float((x.grad - expected).norm() / expected.norm()) < 0.02


def test_the_rounding_of_inputs_is_passed_straight_through() -> None:
    scheme = Scheme.parse("w4a8")
    assert scheme.weight is not None
    w = torch.randn(8, 16)
    low, high = w.amin(1)[:, None, None], w.amax(1)[:, None, None]
    tensor = QuantizedTensor.from_limits(w, low, high, scheme.weight, torch.float32)
    frozen = FrozenLinear(tensor, scheme, None)
    x = torch.randn(4, 16, requires_grad=True)
    y = frozen(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, tensor.dequantize().sum(0).expand(4, 16), atol=1e-5)
    plain = frozen(x.detach())
    assert torch.allclose(y, plain, atol=1e-6)
    assert not torch.allclose(plain, x.detach() @ tensor.dequantize().T, atol=1e-3)


@pytest.mark.parametrize("scheme", ["w4a16g32", "wnf4a16g32", "w8a8", "w2a16g32"])
def test_an_artifact_computes_what_it_does_when_loaded(tmp_path: Path, scheme: str) -> None:
    artifact = artifact_of(base(tmp_path), scheme)
    model = load_frozen(artifact, **CPU)
    assert len(frozen_of(model)) == 14
    expected = logits(bitfold.load(artifact))
    assert float((logits(model) - expected).norm() / expected.norm()) < 1e-5
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gemma"])
def test_an_original_is_rounded_as_it_is_loaded(tmp_path: Path, family: str) -> None:
    original = base(tmp_path, family)
    model = load_frozen(original, scheme=Scheme.parse("wnf4a16g32"), **CPU)
    dense = bitfold.load(original)
    for name, one in frozen_of(model).items():
        weight = dense.get_submodule(name).weight
        assert one.scheme.weight is not None
        expected = nested_nearest(weight.detach(), one.scheme.weight)[0].dequantize()
        assert torch.equal(one.dequantize(torch.float32), expected)
        weight.data = expected
    assert len(frozen_of(model)) == {"opt": 12}.get(family, 14)
    assert torch.allclose(logits(model), logits(dense), atol=1e-4)


def test_an_original_may_stay_as_it_is(tmp_path: Path) -> None:
    original = base(tmp_path)
    model = load_frozen(original, scheme=Scheme.parse("w16a16"), **CPU)
    assert torch.equal(logits(model), logits(bitfold.load(original)))


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    original = base(tmp_path)
    with pytest.raises(CheckpointError, match="queries, keys or values"):
        load_frozen(artifact_of(original, "w4a16kv4g32"), **CPU)
    with pytest.raises(RecipeError, match="quantized already"):
        load_frozen(artifact_of(original), scheme=Scheme.parse("w4a16"), **CPU)
    with pytest.raises(RecipeError, match="weights alone"):
        load_frozen(original, scheme=Scheme.parse("w4a8"), **CPU)
    with pytest.raises(RecipeError, match="does not divide"):
        load_frozen(original, scheme=Scheme.parse("w4a16g128"), **CPU)
