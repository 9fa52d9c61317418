"""Every estimator's values and gradients are its paper's formulas, computed here one number at a time in float64."""

import math

import pytest
import torch
from torch import Tensor

from bitfold.numerics import TensorScheme, to_groups
from bitfold.training.estimators import (
    BinaryConnectWeight,
    DorefaWeight,
    LearnedTernaryWeight,
    LsqInput,
    LsqWeight,
    MinMaxWeight,
    MovingAverageInput,
    ObservedInput,
    PactInput,
    SignInput,
    TwnWeight,
    WeightEstimator,
    XnorWeight,
    binary_scheme,
    dorefa_scheme,
    ternary_scheme,
)

STATIC = TensorScheme(bits=4, granularity="tensor", static=True)


def _weight(rows: int = 6, columns: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _with_gradient(estimator: WeightEstimator, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, the gradient that came from above, and the one on the weight."""
    weight = weight.clone().requires_grad_()
    values = estimator(weight)
    above = torch.randn(
        values.shape, generator=torch.Generator().manual_seed(9), dtype=values.dtype
    )
    values.backward(above)
    assert weight.grad is not None
    return values.detach(), above, weight.grad


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_is_the_papers_formula(bits: int) -> None:
    weight, scheme = _weight(), TensorScheme(bits=bits)
    lsq = LsqWeight(weight, scheme, torch.float64).double()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    with torch.no_grad():
        wanted = 2 * weight.abs().mean(dim=1) / math.sqrt(high)
        assert torch.allclose(lsq.step.flatten(), wanted.float().double())
        lsq.step *= 0.6  # some of the weights are to be clipped
    values, above, on_weight = _with_gradient(lsq, weight)
    for row in range(len(weight)):
        step, on_step = float(lsq.step[row].detach()), 0.0
        for column in range(weight.shape[1]):
            u = float(weight[row, column]) / step
            code = min(max(round(u), low), high)
            inside = low < u < high
            assert float(values[row, column]) == pytest.approx(code * step, abs=1e-12)
            from_above = float(above[row, column])
            assert float(on_weight[row, column]) == (from_above if inside else 0.0)
            on_step += from_above * (code - u if inside else code)
        factor = 1 / math.sqrt(weight.shape[1] * high)
        assert lsq.step.grad is not None
        assert float(lsq.step.grad[row]) == pytest.approx(on_step * factor, rel=1e-9)


def test_lsq_begins_at_the_scales_it_is_given() -> None:
    weight, scheme = (
        _weight().float(),
        TensorScheme(bits=2, symmetric=False, granularity="group", group_size=8),
    )
    start = MinMaxWeight(scheme).quantized(weight)
    lsq = LsqWeight(weight, scheme, start=start)
    assert torch.equal(lsq(weight), start.dequantize())


def test_lsq_keeps_a_step_positive() -> None:
    weight = _weight().float()
    lsq = LsqWeight(weight, TensorScheme(bits=4))
    with torch.no_grad():
        lsq.step.neg_()
    lsq.bound(weight)
    assert bool((lsq.step > 0).all())


@pytest.mark.parametrize("unsigned", [True, False])
def test_lsq_of_inputs_counts_from_zero_where_they_are_not_negative(unsigned: bool) -> None:
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(1))
    x = x.relu() if unsigned else x
    lsq = LsqInput(STATIC)
    values = lsq(x)
    largest = 15 if unsigned else 7
    step = 2 * x.abs().mean() / math.sqrt(largest)
    assert float(lsq.step.detach()) == pytest.approx(float(step), rel=1e-6)
    codes = values / lsq.step
    low = 0 if unsigned else -8
    assert torch.equal(codes.round().clamp(low, largest), codes.round())
    assert torch.allclose(codes, (x / lsq.step).round().clamp(low, largest), atol=1e-4)
    assert lsq.activation.symmetric is not unsigned
    above = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    values.backward(above)
    u = (x / lsq.step.detach()).double()
    inside = (u > low) & (u < largest)
    each = torch.where(inside, u.clamp(low, largest).round() - u, u.clamp(low, largest).round())
    wanted = (above * each).sum() / math.sqrt(16 * largest)
    assert lsq.step.grad is not None
    assert float(lsq.step.grad) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("unsigned", [True, False])
def test_pact_is_the_papers_formula(unsigned: bool) -> None:
    x = 2 * torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    x = x.relu() if unsigned else x
    pact = PactInput(STATIC, decay=0.25)
    pact(x)
    assert float(pact.clip) == float(x.abs().max())
    with torch.no_grad():
        pact.clip.fill_(1.5)
    x.requires_grad_()
    values = pact(x)
    steps = 15 if unsigned else 7
    low = 0.0 if unsigned else -1.5
    wanted = (x.detach().clamp(low, 1.5) * steps / 1.5).round() * 1.5 / steps
    assert torch.allclose(values, wanted, atol=1e-6)
    above = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    values.backward(above)
    on_clip = above[x >= 1.5].sum() - (0 if unsigned else above[x <= -1.5].sum())
    assert pact.clip.grad is not None
    assert float(pact.clip.grad) == pytest.approx(float(on_clip), rel=1e-5)
    assert x.grad is not None
    inside = (x > low) & (x < 1.5)
    assert torch.equal(x.grad[inside], above[inside])
    assert not x.grad[x > 1.5].any()
    assert float(sum(pact.penalty())) == pytest.approx(0.25 * 1.5**2)


def test_minmax_passes_every_gradient_and_has_the_range_of_the_weight() -> None:
    weight, scheme = _weight(), TensorScheme(bits=3, symmetric=False)
    values, above, on_weight = _with_gradient(MinMaxWeight(scheme, torch.float64), weight)
    assert torch.equal(on_weight, above)
    assert (values - weight).abs().max() <= (weight.amax(1) - weight.amin(1)).max() / 7
    for row in values:
        assert len(row.unique()) <= 8


def test_a_narrower_range_gives_no_gradient_to_what_it_clips() -> None:
    weight = _weight()
    weight[:, 0] = 40.0
    estimator = MinMaxWeight(TensorScheme(bits=3), torch.float64, range="mse")
    _, above, on_weight = _with_gradient(estimator, weight)
    assert not on_weight[:, 0].any()
    assert torch.equal(on_weight[:, 1:], above[:, 1:])


def test_binaryconnect_is_the_sign_and_draws_in_training() -> None:
    weight = torch.tensor([[0.0, -0.5, 0.5, 2.0, -3.0]]).repeat(4000, 1)
    fixed = BinaryConnectWeight(weight, binary_scheme())
    assert fixed(weight)[0].tolist() == [1, -1, 1, 1, -1]
    drawn = BinaryConnectWeight(weight, binary_scheme(), stochastic=True)
    torch.manual_seed(0)
    shares = (drawn(weight) > 0).float().mean(dim=0)
    assert torch.allclose(shares, torch.tensor([0.5, 0.25, 0.75, 1.0, 0.0]), atol=0.03)
    drawn.eval()
    assert torch.equal(drawn(weight), fixed(weight))
    _, above, on_weight = _with_gradient(fixed, weight[:3])
    assert torch.equal(on_weight, above)
    fixed.bound(weight)
    assert weight.abs().max() == 1


def test_bnn_masks_the_gradient() -> None:
    weight = torch.tensor([[0.0, -1.0, 0.5, 2.0, -3.0]])
    values, above, on_weight = _with_gradient(
        BinaryConnectWeight(weight, binary_scheme(), masked=True), weight
    )
    assert values[0].tolist() == [1, -1, 1, 1, -1]
    assert torch.equal(on_weight, above * torch.tensor([[1, 1, 1, 0, 0]]))


def test_signs_of_inputs() -> None:
    x = torch.tensor([[0.0, -0.25, 1.0, -1.5]], requires_grad=True)
    with pytest.warns(UserWarning, match="never negative"):
        SignInput(binary_scheme("tensor"))(x.detach().abs())
    signs = SignInput(binary_scheme("tensor"))(x)
    signs.backward(torch.full_like(x, 3.0))
    assert signs.tolist() == [[1, -1, 1, -1]]
    assert x.grad is not None
    assert x.grad.tolist() == [[3, 3, 3, 0]]


def test_xnor_scales_by_the_mean_and_learns_through_it() -> None:
    weight = _weight()
    values, above, on_weight = _with_gradient(XnorWeight(binary_scheme(), torch.float64), weight)
    size = weight.abs().mean(dim=1, keepdim=True)
    sign = torch.where(weight >= 0, 1.0, -1.0).double()
    assert torch.allclose(values, size * sign)
    # Least squares: no other scale for these signs is nearer (equation 6).
    nearest = (weight - values).square().sum()
    assert (weight - values * 1.01).square().sum() > nearest
    assert (weight - values * 0.99).square().sum() > nearest
    for row in range(len(weight)):
        shared = sum(float(a * s) for a, s in zip(above[row], sign[row], strict=True)) / len(
            sign[0]
        )
        for column in range(len(weight[0])):
            passed = float(size[row] * above[row, column]) if abs(weight[row, column]) <= 1 else 0.0
            wanted = float(sign[row, column]) * shared + passed
            assert float(on_weight[row, column]) == pytest.approx(wanted, rel=1e-9)


def test_twn_has_the_papers_threshold_and_the_best_scale_for_it() -> None:
    weight = _weight()
    values, above, on_weight = _with_gradient(TwnWeight(ternary_scheme(), torch.float64), weight)
    for given, found in zip(weight, values, strict=True):
        threshold = 0.7 * given.abs().mean()
        kept = given.abs() > threshold
        assert torch.allclose(found[kept], given[kept].sign() * given[kept].abs().mean())
        assert not found[~kept].any()
    assert torch.equal(on_weight, above)


def test_learned_ternary_gradients_are_the_formulas() -> None:
    weight = _weight()
    learned = LearnedTernaryWeight(weight, ternary_scheme(), torch.float64).double()
    assert torch.allclose(
        learned(weight), TwnWeight(ternary_scheme(), torch.float64)(weight).float().double()
    )
    values, above, on_weight = _with_gradient(learned, weight)
    size, threshold = learned.size.detach().flatten(1), learned.threshold.detach().flatten(1)
    codes = values / size
    inside = (weight.abs() < 2 * threshold).double()
    factor = 1 / math.sqrt(weight.shape[1])
    assert torch.allclose(on_weight, above * inside * size / (2 * threshold))
    assert learned.size.grad is not None
    assert learned.threshold.grad is not None
    assert torch.allclose(learned.size.grad.flatten(), (above * codes).sum(1) * factor)
    wanted = -(above * inside * size * weight / (2 * threshold.square())).sum(1) * factor
    assert torch.allclose(learned.threshold.grad.flatten(), wanted)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_dorefa_has_even_levels_and_the_gradient_of_tanh(bits: int) -> None:
    weight = _weight()
    estimator = DorefaWeight(weight, dorefa_scheme(bits), torch.float64, paper=True).double()
    estimator.storage = torch.float64
    values, above, on_weight = _with_gradient(estimator, weight)
    levels = 2**bits - 1
    bent = torch.tanh(weight)
    share = bent / (2 * bent.abs().max()) + 0.5
    assert torch.allclose(values, 2 * (share * levels).round() / levels - 1, atol=1e-6)
    free = weight.clone().requires_grad_()
    smooth = torch.tanh(free)
    (smooth / smooth.abs().max()).backward(above)
    assert torch.allclose(on_weight, free.grad, rtol=1e-5)


WEIGHTS = {
    "minmax": lambda w: MinMaxWeight(TensorScheme(bits=4, symmetric=False)),
    "minmax-groups": lambda w: MinMaxWeight(TensorScheme(bits=2, granularity="group", group_size=8)),
    "lsq": lambda w: LsqWeight(w, TensorScheme(bits=3)),
    "lsq-groups": lambda w: LsqWeight(w, TensorScheme(bits=2, symmetric=False, granularity="group", group_size=8)),
    "lsq-tensor": lambda w: LsqWeight(w, TensorScheme(bits=4, granularity="tensor")),
    "lsq-bfloat16": lambda w: LsqWeight(w, TensorScheme(bits=4), torch.bfloat16),
    "dorefa": lambda w: DorefaWeight(w, dorefa_scheme(3)),
    "binaryconnect": lambda w: BinaryConnectWeight(w, binary_scheme()),
    "xnor": lambda w: XnorWeight(binary_scheme()),
    "xnor-groups": lambda w: XnorWeight(binary_scheme("group", 8)),
    "twn": lambda w: TwnWeight(ternary_scheme()),
    "twn-groups": lambda w: TwnWeight(ternary_scheme("group", 8)),
    "learned": lambda w: LearnedTernaryWeight(w, ternary_scheme()),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_trained_is_what_is_stored(name: str) -> None:
    weight = _weight().float()
    estimator = WEIGHTS[name](weight)
    tensor = estimator.quantized(weight)
    assert torch.equal(estimator(weight).detach(), tensor.dequantize())
    low, high = tensor.scheme.qmin, tensor.scheme.qmax
    if tensor.scheme.grid == "shifted":
        low, high = 0, 2**tensor.scheme.bits - 1
    assert int(tensor.codes.min()) >= low
    assert int(tensor.codes.max()) <= high
    assert tensor.scale.shape == to_groups(weight, tensor.scheme)[..., :1].flatten(1).shape


def test_a_moving_average_follows_in_training_and_stays_in_use() -> None:
    one = MovingAverageInput(STATIC, momentum=0.5)
    one.train()
    one(torch.tensor([-1.0, 3.0]))
    one(torch.tensor([-3.0, 5.0]))
    assert one.limits.tolist() == [-2, 4]
    one.eval()
    one(torch.tensor([-100.0, 100.0]))
    assert one.limits.tolist() == [-2, 4]


@pytest.mark.parametrize("range_", ["minmax", "moving_average", "percentile", "mse", "kl"])
def test_observed_ranges(range_: str) -> None:
    one = ObservedInput(STATIC, range=range_)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    x[0] = 10.0
    one.observing = True
    assert torch.equal(one(x), x)
    one(x[1:])
    one.finish()
    high = float(one.limits[1])
    if range_ == "minmax":
        assert high == 10
    elif range_ == "moving_average":
        assert high == pytest.approx(9 + 0.1 * float(x[1:].max()), rel=1e-5)
    else:
        # One value in 4,000 says less than all the others.
        assert high < 10
    assert len(one(x).unique()) <= 16


@pytest.mark.parametrize("kind", [LsqInput, PactInput])
def test_zeros_start_nothing(kind: type[LsqInput | PactInput]) -> None:
    """The first state of an LSTM has no sign and no size; and a step that training pushed below 0 is brought back."""
    inputs = kind(STATIC)
    assert torch.equal(inputs(torch.zeros(3, 4)), torch.zeros(3, 4))
    x = torch.tensor([[-1.0, 0.5, 2.0, -0.2]])
    assert (inputs(x) < 0).any()
    with torch.no_grad():
        next(inputs.parameters()).fill_(-0.5)
    inputs.train()(x)
    assert inputs.stored()["input_scale"] > 0
    inputs.eval()
    assert (inputs(x) / inputs.stored()["input_scale"]).round().abs().max() <= 8
