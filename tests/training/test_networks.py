"""Rewritings of convolutional networks change nothing, and ZeroQ needs no data."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.errors import DataError, FamilyError, RecipeError
from bitfold.training import (
    bits_within,
    convert,
    distilled_inputs,
    equalize,
    estimate_batch_norms,
    fold_batch_norms,
    prepare,
    sensitivities,
)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.BatchNorm2d(6, affine=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 5),
    ).double()
    # Statistics and gains as training leaves them; a gain may be negative.
    with torch.no_grad():
        for norm in (model[1], model[9]):
            norm.weight.normal_()
            norm.bias.normal_()
        for seed in range(30):
            model.train()(3 * _images(seed) + 1)
    return model.eval()


def _images(seed: int = 0, count: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 12, 12, generator=generator, dtype=torch.float64)


def _close(model: nn.Module, wanted: Tensor) -> bool:
    with torch.no_grad():
        return bool((model(_images(1)) - wanted).abs().max() < 1e-10 * wanted.abs().max())


def test_batch_norms_fold() -> None:
    model = _network()
    with torch.no_grad():
        wanted = model(_images(1))
    assert fold_batch_norms(model) == ["0", "3", "8"]
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
    assert _close(model, wanted)


@pytest.mark.parametrize("method", ["qat", "lsq", "binary", "xnor", "bnn", "twn"])
def test_batch_norms_fold_behind_training(method: str) -> None:
    """Into scales and biases: codes stay, and so does what the network computes."""
    model = _network().float()
    with torch.no_grad():
        for norm in (model[1], model[9]):
            norm.weight.abs_()
    prepare(model, method)
    model.train()
    model(_images(0).float())
    convert(model.eval())
    coded = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(_images(1).float())
    assert fold_batch_norms(model) == ["0", "3", "8"]
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
    with torch.no_grad():
        assert (model(_images(1).float()) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    for name, value in coded.state_dict().items():
        if name.endswith((".words", ".weight_shape")) or value.dtype == torch.int32:
            assert torch.equal(model.state_dict()[name], value)


def test_batch_norms_are_estimated_anew() -> None:
    """The mean over batches of each batch's statistics, and nothing else changes."""
    model = _network()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k}
    batches = [3 * _images(seed) - 2 for seed in (1, 2)]
    estimate_batch_norms(model, batches)
    first = [model[0](batch) for batch in batches]
    mean = torch.stack([one.mean(dim=(0, 2, 3)) for one in first]).mean(dim=0)
    assert torch.allclose(model[1].running_mean, mean)
    assert not any(module.training for module in model.modules())
    assert model[1].momentum == 0.1
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value) or "num_batches" in name
    with pytest.raises(DataError, match="no batches"):
        estimate_batch_norms(model, [])


def test_a_batch_norm_that_would_turn_signs_stays_behind_codes() -> None:
    model = _network().float()
    convert(prepare(model, "twn"))
    with torch.no_grad():
        wanted = model(_images(1).float())
    assert "0" not in fold_batch_norms(model)
    assert isinstance(model[1], nn.BatchNorm2d)
    with torch.no_grad():
        assert (model(_images(1).float()) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_equalization_changes_nothing_and_balances() -> None:
    model = _network()
    fold_batch_norms(model)
    with torch.no_grad():
        wanted = model(_images(1))
    assert equalize(model) == [("0", "3"), ("3", "8"), ("8", "11")]
    assert _close(model, wanted)
    for first, second in (("0", "3"), ("3", "8"), ("8", "11")):
        weight, reader = model.get_submodule(first).weight, model.get_submodule(second).weight
        own = weight.flatten(1).abs().amax(dim=1)
        read = reader.reshape(len(reader), len(own), -1).abs().amax(dim=(0, 2))
        assert torch.allclose(own, read, rtol=0.02)


def test_what_stands_in_the_way_is_left_alone() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            given = self.one(x)
            return self.last(self.norm(self.two(F.relu(given))) + given)

    model = Residual().eval()
    x = torch.randn(2, 4, 3, 3)
    wanted = model(x)
    assert fold_batch_norms(model) == ["two"]
    assert equalize(model) == []  # one's output is added, too; a sum is read by last
    assert torch.allclose(model(x), wanted, atol=1e-6)
    silu = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
    assert equalize(silu) == []
    with pytest.raises(FamilyError, match="before"):
        fold_batch_norms(prepare(_network(), "lsq"))


def test_inputs_are_distilled_towards_the_statistics() -> None:
    model = _network().float()
    kept = copy.deepcopy(model.state_dict())

    def distance(x: Tensor) -> float:
        total = []
        norms = [m for m in model if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        hooks = [
            norm.register_forward_pre_hook(
                lambda module, given: total.append(
                    (given[0].transpose(0, 1).flatten(1).mean(1) - module.running_mean)
                    .square()
                    .sum()
                )
            )
            for norm in norms
        ]
        with torch.no_grad():
            model(x)
        for hook in hooks:
            hook.remove()
        return float(torch.stack(total).sum())

    noise = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    found = distilled_inputs(model, (16, 3, 12, 12), steps=100)
    assert distance(found) < 0.1 * distance(noise)
    assert torch.equal(found, distilled_inputs(model, (16, 3, 12, 12), steps=100))
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name])
    assert not any(m._forward_pre_hooks for m in model)
    with pytest.raises(FamilyError, match="no batch norms"):
        distilled_inputs(nn.Linear(3, 3), (2, 3))


def test_bits_are_the_best_within_the_budget() -> None:
    model = _network().float()
    x, bits = _images().float(), (2, 4, 8)
    kept = copy.deepcopy(model.state_dict())
    measured = sensitivities(model, x, bits)
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name])
    assert set(measured) == {"0", "3", "8", "11"}
    assert all(row[2] > row[8] for row in measured.values())
    counts = {name: model.get_submodule(name).weight.numel() for name in measured}
    chosen = bits_within(model, measured, 4.5)

    def cost(choice: dict[str, int]) -> float:
        return sum(measured[name][b] for name, b in choice.items())

    def size(choice: dict[str, int]) -> int:
        return sum(counts[name] * b for name, b in choice.items())

    assert size(chosen) <= 4.5 * sum(counts.values())
    every = [
        dict(zip(measured, choice, strict=True)) for choice in itertools.product(bits, repeat=4)
    ]
    within = [choice for choice in every if size(choice) <= 4.5 * sum(counts.values())]
    assert cost(chosen) == pytest.approx(min(map(cost, within)))
    with pytest.raises(RecipeError, match=r"1\.5 bits a weight are not enough"):
        bits_within(model, measured, 1.5)
