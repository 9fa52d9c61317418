"""The shared training loop: what it computes, what it goes back to, and what a killed run gives."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfold.errors import OutputError, RecipeError
from bitfold.training.loop import Loop, LoopOptions, rate_at

ROWS = torch.linspace(-1, 1, 10)[:, None]


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(1, 1)


def loop(model: nn.Module, options: LoopOptions, **more: Any) -> Loop:
    def loss(x: Tensor) -> Tensor:
        return (model(x) - (3 * x + 1)).square().mean()

    more = {"loss": loss, "rows": ROWS} | more
    return Loop(model, dict(model.named_parameters()), options=options, **more)


def options(**more: Any) -> LoopOptions:
    return LoopOptions(**{"steps": 20, "batch": 4, "rate": 0.1, "precision": "float32"} | more)


def test_it_learns_and_leaves_the_model_as_it_was() -> None:
    model = linear().eval()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    result = loop(model, options(steps=300)).run()
    assert abs(float(model.weight) - 3) < 1e-2
    assert abs(float(model.bias) - 1) < 1e-2
    assert len(result.losses) == 300
    assert result.kept == 300
    assert not model.training
    assert model.weight.grad is None
    assert torch.equal(torch.rand(1), expected)  # what it draws is not the caller's


def test_a_step_is_adamw_of_the_whole_batch_clipped() -> None:
    """The reference: Loshchilov and Hutter 2017, algorithm 2, in float64, on the mean gradient of all pieces."""
    model = linear().double()
    rows = ROWS.double()
    weight, bias = (float(p.detach()) for p in model.parameters())
    rate, decay, clip = 0.1, 0.2, 0.5
    loop(
        model,
        options(steps=1, batch=10, accumulate=3, weight_decay=decay, clip=clip, warmup=0.0),
        rows=rows,
    ).run()
    error = [weight * x + bias - 3 * x - 1 for x in rows[:, 0].tolist()]
    gradient = [
        sum(2 * e * x for e, x in zip(error, rows[:, 0].tolist(), strict=True)) / 10,
        sum(2 * e for e in error) / 10,
    ]
    norm = math.hypot(*gradient)
    assert norm > clip
    for before, slope, parameter in zip((weight, bias), gradient, model.parameters(), strict=True):
        clipped = slope * clip / (norm + 1e-6)
        expected = before * (1 - rate * decay) - rate * clipped / (abs(clipped) + 1e-8)
        assert float(parameter) == pytest.approx(expected, rel=1e-9)


def test_pieces_of_unequal_size_are_one_batch() -> None:
    """10 rows in pieces of 4, 3 and 3; steps whose gradients differ, since Adam's first knows only their signs."""
    found = []
    for pieces in (1, 3):
        model = linear().double()
        asked = options(steps=5, batch=10, accumulate=pieces, clip=None)
        result = loop(model, asked, rows=ROWS.double()).run()
        found.append([*result.losses, *(float(p.detach()) for p in model.parameters())])
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_rates_of_single_parameters() -> None:
    model = linear()
    weight, bias = (p.detach().clone() for p in model.parameters())
    loop(model, options(steps=1, warmup=0.0), rates={"weight": 0.01}).run()
    assert float((model.weight - weight).abs()) == pytest.approx(0.001, rel=1e-3)
    assert float((model.bias - bias).abs()) == pytest.approx(0.1, rel=1e-3)


def test_the_rate_rises_and_falls() -> None:
    cosine = LoopOptions(steps=100, rate=2.0, warmup=0.1)
    assert rate_at(0, cosine) == pytest.approx(0.2)
    assert rate_at(9, cosine) == pytest.approx(2.0)
    assert rate_at(55, cosine) == pytest.approx(1.0)
    linear_ = LoopOptions(steps=100, rate=2.0, warmup=0.0, decay="linear")
    assert rate_at(25, linear_) == pytest.approx(1.5)


def test_every_row_once_before_any_again() -> None:
    seen: list[float] = []
    model = linear()

    def loss(x: Tensor) -> Tensor:
        seen.extend(x[:, 0].tolist())
        return model(x).square().mean()

    loop(model, options(steps=5, batch=4), loss=loss).run()
    assert sorted(seen[:10]) == sorted(ROWS[:, 0].tolist())
    assert sorted(seen[10:20]) == sorted(ROWS[:, 0].tolist())
    assert seen[:10] != seen[10:20]


class KilledError(Exception):
    pass


def test_a_killed_run_gives_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def run(model: nn.Module, **more: Any) -> Any:
        beside = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
        return loop(model, options(looks=4, keep="best"), beside=beside, **more).run()

    whole = make()
    expected = run(whole)

    def kill(step: int) -> None:
        if step == 13:
            raise KilledError

    state = tmp_path / "state.safetensors"
    with pytest.raises(KilledError):
        run(make(), state=state, after=kill, request="a")
    resumed = make()
    result = run(resumed, state=state, request="a")
    assert result.resumed == 10
    assert (result.losses, result.looks, result.kept) == (
        expected.losses,
        expected.looks,
        expected.kept,
    )
    for name, tensor in whole.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert run(make(), state=state, request="another").resumed == 0
    state.write_bytes(b"damaged")
    assert run(make(), state=state, request="a").resumed == 0


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_goes_back_to_the_best_state(bad: str) -> None:
    model, steps, states = linear(), [0], list[Tensor]()

    def loss(x: Tensor) -> Tensor:
        steps[0] += 1
        value = (model(x) - (3 * x + 1)).square().mean()
        if steps[0] == 8:
            # √0 is finite, and its slope is not
            return value * math.nan if bad == "loss" else value + (model.bias * 0).sqrt().sum()
        return value

    def after(step: int) -> None:
        states.append(model.weight.detach().clone())

    result = loop(model, options(looks=10), loss=loss, after=after).run()
    assert len(result.losses) == 7
    assert result.kept == 6
    assert torch.equal(model.weight, states[5])
    assert f"{bad} of step 8 was not finite" in result.notes[0]
    assert "step 6" in result.notes[0]


def test_the_best_state_is_kept_where_asked() -> None:
    figures = iter([5.0, 4.0, 1.0, 2.0, 3.0])
    model, states = linear(), list[Tensor]()

    def after(step: int) -> None:
        states.append(model.weight.detach().clone())

    more: Any = {"check": lambda: next(figures), "after": after}
    result = loop(model, options(looks=4, keep="best"), **more).run()
    assert result.kept == 10
    assert result.looks == ((0, 5.0), (5, 4.0), (10, 1.0), (15, 2.0), (20, 3.0))
    assert torch.equal(model.weight, states[9])


def test_nothing_is_trained_from_a_state_that_is_not_finite() -> None:
    model = linear()
    before = model.weight.detach().clone()
    result = loop(model, options(), check=lambda: math.nan).run()
    assert result.losses == ()
    assert "nothing was trained" in result.notes[0]
    assert torch.equal(model.weight, before)


def test_bfloat16_is_autocast() -> None:
    model, seen = linear(), set[torch.dtype]()

    def loss(x: Tensor) -> Tensor:
        y = model(x)
        seen.add(y.dtype)
        return y.float().square().mean()

    loop(model, options(steps=1, precision="bfloat16"), loss=loss).run()
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"accumulate": 9}, "pieces"),
        ({"rate": 0.0}, "rate"),
        ({"rate": math.nan}, "rate"),
        ({"warmup": 1.0}, "warmup"),
        ({"clip": 0.0}, "clip"),
        ({"decay": "step"}, "decay"),
    ],
)
def test_options_that_cannot_be(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        options(**bad)


def test_nothing_to_train() -> None:
    with pytest.raises(RecipeError, match="nothing to train"):
        Loop(linear(), {}, lambda x: x, ROWS, options()).run()


def test_a_state_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        loop(linear(), options(), state=tmp_path / "nowhere" / "state").run()
