"""The descent by itself, on a problem whose answer is known."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitfold.distillation import Distil, DistilProblem, Trained, TrainedCodes
from bitfold.numerics import Scheme


class Quadratic:
    """Windows ask for a common target, and each for a little noise of its own."""

    def __init__(
        self,
        windows: int = 32,
        breaks_at: int | None = None,
        written: int = 0,
        low_adds: float | None = None,
    ) -> None:
        """low_adds: to the loss of a pass in bfloat16, relative; None: all is exact."""
        generator = torch.Generator().manual_seed(0)
        self.one = Trained(torch.ones(4, 2), positive=True)
        self.wanted = 1.05 + 0.01 * torch.randn(windows, 4, 2, generator=generator)
        self.calls = 0
        self.breaks_at = breaks_at
        self.seen: set[int] = set()
        self.judged: set[int] = set()
        self.low_adds = low_adds or 0.0
        self.in_low: list[bool] = []
        self.passed = [0, 0]
        training, check = Distil().split(windows - written, seed=0)
        training = torch.cat([training, torch.arange(windows - written, windows)])
        self.problem = DistilProblem(
            [self.one], self.loss, self.gradient, training, check, 0,
            lambda done, total, what: None, exact=low_adds is None,
        )  # fmt: skip

    def _distance(self, windows: Tensor) -> Tensor:
        return (self.one.value() - self.wanted[windows]).square().mean()

    def loss(self, windows: Tensor) -> float:
        self.passed[1] += len(windows)
        self.judged.update(windows.tolist())
        with torch.no_grad():
            return float(self._distance(windows))

    def gradient(self, windows: Tensor, low: bool) -> float:
        self.calls += 1
        self.passed[0] += len(windows)
        self.seen.update(windows.tolist())
        self.in_low.append(low)
        if self.calls == self.breaks_at:
            return math.nan
        loss = self._distance(windows)
        loss.backward()
        return float(loss.detach()) * (1 + self.low_adds * low)


def test_the_loss_falls_and_the_best_state_is_kept() -> None:
    quadratic = Quadratic()
    found = Distil(rate=1e-2, epochs=8).fit(quadratic.problem)
    assert found.after < 0.2 * found.before
    assert found.held_back == 4
    assert found.training == 28
    held = torch.tensor(sorted(set(range(32)) - quadratic.seen))
    assert len(held) == 4  # and none of them was trained on
    assert quadratic.loss(held) == pytest.approx(found.after)


def test_what_does_not_help_changes_nothing_and_stops() -> None:
    quadratic = Quadratic()
    quadratic.wanted -= 0.05  # it is there already
    found = Distil(rate=0.5, epochs=20, patience=3).fit(quadratic.problem)
    if found.kept == 0:
        assert torch.equal(quadratic.one.stored(), torch.ones(4, 2))
    assert found.after <= found.before
    assert found.steps < 20 * 7


@pytest.mark.parametrize("breaks_at", [1, 8])
def test_a_loss_that_is_not_finite_goes_back_and_says_so(breaks_at: int) -> None:
    quadratic = Quadratic(breaks_at=breaks_at)
    found = Distil(rate=1e-2).fit(quadratic.problem)
    assert found.steps == breaks_at
    assert "not finite" in found.notes[0]
    assert found.after <= found.before
    assert torch.isfinite(quadratic.one.value()).all()


def test_the_same_seed_gives_the_same_state() -> None:
    states = []
    for _ in range(2):
        quadratic = Quadratic()
        Distil().fit(quadratic.problem)
        states.append(quadratic.one.stored())
    assert torch.equal(*states)


def test_two_windows_are_enough() -> None:
    found = Distil().fit(Quadratic(windows=2).problem)
    assert (found.held_back, found.training) == (1, 1)


def test_a_scale_stays_positive_and_an_untouched_tensor_as_it_was() -> None:
    start = torch.tensor([1.0, 1e-3, 2.0**-24]).half()
    scale = Trained(start, positive=True)
    assert torch.equal(scale.stored(), start)
    with torch.no_grad():
        scale.theta.fill_(-5)
    scale.bound()
    assert (scale.value()[:2] > 0).all()
    assert (scale.value() >= 0).all()
    gain = Trained(torch.tensor([0.0, 2.0]), positive=False)
    with torch.no_grad():
        gain.theta.fill_(0.1)
    assert gain.value()[0] > 0  # an entry of 0 can move


@pytest.mark.parametrize("windows", [2, 9, 32])
def test_what_it_takes_is_known_beforehand(windows: int) -> None:
    quadratic = Quadratic(windows)
    options = Distil(epochs=3, patience=1000)
    options.fit(quadratic.problem)
    gradients, losses = options.passes(windows)
    assert quadratic.passed == [gradients, losses]


def test_the_model_s_own_windows_are_trained_on_and_never_judged_by() -> None:
    quadratic = Quadratic(windows=24, written=8)
    Distil(epochs=2).fit(quadratic.problem)
    own = set(range(16, 24))
    assert own <= quadratic.seen
    assert not own & quadratic.judged
    assert not quadratic.seen & quadratic.judged


@pytest.mark.parametrize(("adds", "low"), [(None, False), (0.05, True), (0.2, False)])
def test_steps_are_in_bfloat16_where_that_changes_little(adds: float | None, low: bool) -> None:
    quadratic = Quadratic(low_adds=adds)
    Distil(epochs=1).fit(quadratic.problem)
    steps = quadratic.in_low[-7:]  # after what was tried
    assert steps == [low] * 7


def test_part_of_an_epoch() -> None:
    quadratic = Quadratic()
    assert Distil(epochs=1.5, patience=1000).fit(quadratic.problem).steps == 10  # of 7 each


def test_codes_move_by_one_at_most_and_stay_on_the_grid() -> None:
    scheme = Scheme.parse("w2a16").weight
    assert scheme is not None
    start = torch.tensor([[scheme.qmin, -1, 0, scheme.qmax]], dtype=torch.int8)
    codes = TrainedCodes(start, scheme)
    assert torch.equal(codes.stored(), start)
    for value, moved in ((0.4, 0), (0.6, 1), (7.0, 1), (-7.0, -1)):
        with torch.no_grad():
            codes.theta.fill_(value)
        codes.bound()
        expected = (start.int() + moved).clamp(scheme.qmin, scheme.qmax).to(torch.int8)
        assert torch.equal(codes.stored(), expected)


def test_codes_are_not_ended_early() -> None:
    quadratic = Quadratic()
    quadratic.wanted -= 0.05  # it is there already
    assert Distil(rate=0.5, epochs=5, patience=1, codes=True).fit(quadratic.problem).steps == 35


def test_a_start_that_is_not_finite_trains_nothing_and_says_so() -> None:
    quadratic = Quadratic()
    quadratic.wanted[:] = torch.nan
    found = Distil().fit(quadratic.problem)
    assert (found.steps, found.kept) == (0, 0)
    assert "nothing was trained" in found.notes[0]
    assert torch.equal(quadratic.one.stored(), torch.ones(4, 2))


def test_half_precision_is_not_tried_where_it_is_slow() -> None:
    slow = Quadratic(low_adds=0.01)
    Distil(epochs=2).fit(replace(slow.problem, low_is_quick=False))
    assert slow.in_low
    assert not any(slow.in_low)
