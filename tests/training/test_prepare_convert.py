"""Prepared models train in a plain loop; what is converted computes what was trained, to the bit, and holds codes."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitfold
from bitfold import training
from bitfold.errors import CheckpointError, DataError, OutputError, RecipeError
from bitfold.runtime.quantized_conv2d import QuantizedConv2d
from bitfold.runtime.quantized_embedding import QuantizedEmbedding
from bitfold.runtime.quantized_linear import QuantizedLinear
from bitfold.runtime.xnor_layers import XnorConv2d, XnorLinear


def _convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.Hardtanh(),
        nn.Conv2d(8, 8, 3, groups=2, padding="same"),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def _images(seed: int = 0) -> Tensor:
    return torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def _train(model: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = F.cross_entropy(model(_images()), torch.arange(16) % 10) + bitfold.penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


WAYS: list[tuple[str, str | None, Mapping[str, Any]]] = [
    ("qat", "w4a8", {}),
    ("qat", "w3a4", {"weight.symmetric": False, "embeddings": 8}),
    ("lsq", "w4a4", {}),
    ("lsq", "w2a2", {"ends": "8 bits"}),
    ("lsq", "w4a16g18", {"ends": "full"}),
    ("pact", "w4a4", {}),
    ("dorefa", "w2a4", {}),
    ("binaryconnect", None, {}),
    ("binaryconnect", None, {"stochastic": True}),
    ("binary", "w1a16", {}),
    ("twn", None, {}),
    ("ternary", None, {"weight.granularity": "tensor"}),
]


@pytest.mark.parametrize(("recipe", "scheme", "options"), WAYS)
def test_what_is_converted_computes_what_was_trained(
    recipe: str, scheme: str | None, options: Mapping[str, Any]
) -> None:
    model = _convolutional()
    bitfold.prepare(model, recipe, scheme=scheme, options=options)
    losses = _train(model, 12)
    assert losses[-1] < losses[0]
    weights = training.quantized_weights(model)
    with torch.no_grad():
        before = model(_images(1))
        bitfold.convert(model)
        assert torch.equal(model(_images(1)), before)
    for name, tensor in weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(layer.dequantize(torch.float32), tensor.dequantize())
        assert layer.weight.dtype == torch.int32


@pytest.mark.parametrize(
    "options", [{}, {"input_scaling": False}, {"weight.granularity": "tensor"}]
)
@pytest.mark.parametrize("recipe", ["xnor", "bnn"])
def test_signs_become_layers_that_count_bits(recipe: str, options: Mapping[str, Any]) -> None:
    model = _convolutional()
    bitfold.prepare(model, recipe, options=options, ignore=["3"])
    _train(model)
    with torch.no_grad():
        before = model(_images(1))
        bitfold.convert(model)
        assert torch.allclose(model(_images(1)), before, rtol=1e-5, atol=1e-5)
    assert isinstance(model[0], XnorConv2d)
    assert isinstance(model[5], XnorLinear)


@pytest.mark.parametrize("range_", ["minmax", "moving_average", "percentile", "mse", "kl"])
def test_static_ptq(range_: str) -> None:
    model = _convolutional().eval()
    with torch.no_grad():
        wanted = model(_images())
        bitfold.prepare(model, "static", scheme="w8a8", options={"range": range_})
        assert not torch.equal(model(_images()), wanted)  # weights are rounded from the start
        bitfold.calibrate(model, [_images(), _images(1)])
        rounded = model(_images())
        assert torch.equal(bitfold.convert(model)(_images()), rounded)
    assert (rounded - wanted).norm() < 0.05 * wanted.norm()


def test_dynamic_ptq() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).eval()
    x = torch.randn(5, 7, 32)
    with torch.no_grad():
        wanted = model(x)
        found = bitfold.convert(bitfold.prepare(model, "dynamic", scheme="w8a8"))(x)
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    assert not torch.equal(found, wanted)


def test_embeddings_have_a_scale_for_each_row() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 24, padding_idx=0), nn.Linear(24, 4)).eval()
    ids = torch.randint(0, 20, (3, 5))
    with torch.no_grad():
        wanted = model[0](ids)
        bitfold.prepare(model, "dynamic", scheme="w4a8", options={"embeddings": 8})
        before = model(ids)
        bitfold.convert(model)
        assert torch.equal(model(ids), before)
    assert isinstance(model[0], QuantizedEmbedding)
    step = wanted.abs().amax(dim=-1) / 127
    assert bool(((model[0](ids) - wanted).abs().amax(dim=-1) <= 0.51 * step).all())


def test_gradients_accumulate_and_parameters_stay_the_same_objects() -> None:
    model = _convolutional()
    weight = model[0].weight
    bitfold.prepare(model, "lsq", scheme="w4a4")
    assert model[0].weight is weight
    names = {name for name, _ in model.named_parameters()}
    assert {"0.weight", "0.weights.step", "0.inputs.step", "1.weight"} <= names
    model(_images())
    model.eval()  # batch norms depend on the batch
    for part in (_images()[:8], _images()[8:]):
        model(part).square().mean().div(2).backward()
    accumulated = weight.grad
    assert accumulated is not None
    weight.grad = None
    model(_images()).square().mean().backward()
    assert weight.grad is not None
    assert torch.allclose(accumulated, weight.grad, rtol=1e-4, atol=1e-7)


def test_a_checkpoint_of_training_resumes() -> None:
    """A state dict has all that was learned: the run that goes on from it is the one that was not stopped."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = bitfold.prepare(_convolutional(), "pact", scheme="w4a4")
        return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(_images()), torch.arange(16) % 10).backward()
            optimizer.step()

    whole, optimizer = fresh()
    step(whole, optimizer, 3)
    kept = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    step(whole, optimizer, 3)
    again, optimizer = fresh()
    again.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    step(again, optimizer, 3)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize(("recipe", "scheme"), [("lsq", "w3a4"), ("twn", None), ("binary", None)])
def test_a_converted_model_is_saved_and_loaded(
    recipe: str, scheme: str | None, tmp_path: Path
) -> None:
    model = _convolutional()
    bitfold.prepare(model, recipe, scheme=scheme)
    _train(model)
    bitfold.convert(model)
    out = training.save_converted(model, tmp_path / "saved")
    loaded = training.load_converted(_convolutional(), out)
    with torch.no_grad():
        assert torch.equal(loaded(_images(2)), model(_images(2)))
    with pytest.raises(OutputError, match="is there already"):
        training.save_converted(model, out)
    with pytest.raises(CheckpointError, match="give the model that was converted"):
        training.load_converted(nn.Sequential(nn.Linear(3, 3)), out)
    (out / "quantization.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be read as a converted model"):
        training.load_converted(_convolutional(), out)


def test_layers_of_signs_are_saved_and_loaded(tmp_path: Path) -> None:
    model = _convolutional()
    bitfold.prepare(model, "xnor", ignore=["3"])
    _train(model)
    bitfold.convert(model)
    out = training.save_converted(model, tmp_path / "saved")
    loaded = training.load_converted(_convolutional(), out)
    with torch.no_grad():
        assert torch.equal(loaded(_images(2)), model(_images(2)))


def test_what_cannot_be_prepared_is_one_sentence() -> None:
    with pytest.raises(RecipeError, match="did you mean 'lsq'"):
        bitfold.prepare(_convolutional(), "lsqq")
    with pytest.raises(RecipeError, match=r"Group size 7 does not divide the 18 inputs of 0"):
        bitfold.prepare(_convolutional(), "lsq", scheme="w4a16g7")
    with pytest.raises(RecipeError, match="no tokens"):
        bitfold.prepare(_convolutional(), "dynamic", scheme="w8a8")
    with pytest.raises(RecipeError, match="prepared already"):
        bitfold.prepare(bitfold.prepare(_convolutional(), "lsq"), "lsq")
    with pytest.raises(RecipeError, match="does not leave alone"):
        bitfold.prepare(_convolutional(), "lsq", ignore=["*"])
    with pytest.raises(RecipeError, match="there is nothing to convert"):
        bitfold.convert(_convolutional())
    with pytest.raises(RecipeError, match=r"^0: A learned step of inputs begins"):
        bitfold.convert(bitfold.prepare(_convolutional(), "lsq", scheme="w4a4"))
    with pytest.raises(RecipeError, match="no option 'stepp'"):
        bitfold.prepare(_convolutional(), "lsq", options={"stepp": 1})
    with pytest.raises(RecipeError, match="observes no inputs"):
        bitfold.calibrate(_convolutional(), [_images()])
    static = bitfold.prepare(_convolutional(), "static", scheme="w8a8")
    with pytest.raises(DataError, match="no batches"):
        bitfold.calibrate(static, [])
    with pytest.raises(DataError, match="not finite"):
        bitfold.calibrate(static, [_images() * torch.inf])
    with pytest.raises(RecipeError, match="bits names 7"):
        bitfold.prepare(_convolutional(), "lsq", scheme="w4a16", options={"bits": {"7": 4}})
    signs = bitfold.prepare(_convolutional(), "bnn")
    with pytest.raises(RecipeError, match=r"3 has groups"):
        bitfold.convert(signs)


def test_a_layer_may_have_its_own_bits() -> None:
    model = bitfold.prepare(_convolutional(), "static", scheme="w4a16", options={"bits": {"5": 8}})
    assert model[5].weights.scheme.bits == 8
    assert model[0].weights.scheme.bits == 4
    assert isinstance(bitfold.convert(model)[0], QuantizedConv2d)
