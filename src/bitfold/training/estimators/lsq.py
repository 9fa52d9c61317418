"""LSQ: learned step size quantization (Esser et al. 2020, arXiv 1902.08153).

x̂ = s · (clamp(round(x/s + z), qmin, qmax) − z), with the gradient of s that `through.py` has, times 1/√(N · Qp): N
numbers share the step, and Qp is its largest code. A step begins as 2 · mean|x| / √Qp. Zero-points, where a scheme has
them, are found at the start and stay.
"""

import math

import torch
from torch import Tensor, nn

from bitfold.errors import RecipeError
from bitfold.numerics import (
    QuantizedTensor,
    TensorScheme,
    from_groups,
    quantize,
    scale_and_zero,
    to_groups,
)
from bitfold.numerics.trainable_scale import as_stored
from bitfold.ranges import RANGES
from bitfold.training.estimators.estimator import InputEstimator, WeightEstimator
from bitfold.training.estimators.through import round_to_grid

__all__ = ["LsqInput", "LsqWeight", "largest_code", "static_scheme"]

_LEAST = 1e-8
# Of half a step: codes that training begins with are not left by the last bit of a product.
_INSIDE = 0.49


def largest_code(scheme: TensorScheme) -> int:
    """Qp, the largest code counted from 0 or from the zero-point at the grid's lower end."""
    return scheme.qmax if scheme.symmetric else scheme.qmax - scheme.qmin


class LsqWeight(WeightEstimator):
    """step: [out, groups, 1] ([1, 1] per tensor), learned; zero: the same shape, whole numbers, or None."""

    zero: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scheme: TensorScheme,
        storage: torch.dtype = torch.float32,
        *,
        start: QuantizedTensor | None = None,
    ) -> None:
        """weight: [out, in]. start: a result of the same scheme, whose scales and zero-points training begins with."""
        super().__init__(scheme, storage)
        groups = to_groups(weight.detach().float(), scheme)
        shape = (*groups.shape[:-1], 1)
        zero: Tensor | None = None
        if start is not None:
            step = start.scale.float().reshape(shape)
            zero = None if start.zero is None else start.zero.float().reshape(shape)
        elif scheme.symmetric:
            mean = groups.abs().mean(dim=-1, keepdim=True)
            step = 2 * mean / math.sqrt(largest_code(scheme))
        else:
            # Of a range with two ends the paper says nothing: that of the least square error.
            limits = RANGES["mse"]().limits(groups, scheme)
            step, zero = scale_and_zero(*limits, scheme)
        self.step = nn.Parameter(step.clamp(min=_LEAST))
        self.register_buffer("zero", zero)
        self._factor = 1 / math.sqrt(groups.shape[-1] * largest_code(scheme))

    def forward(self, weight: Tensor) -> Tensor:
        """See `WeightEstimator.forward`."""
        groups = to_groups(weight, self.scheme)
        step = as_stored(self.step, self.storage)
        limits = self.scheme.qmin, self.scheme.qmax
        rounded = round_to_grid(groups, step, self.zero, limits, factor=self._factor)
        return from_groups(rounded, weight.shape)

    @torch.no_grad()
    def settled(self, weight: Tensor, start: QuantizedTensor) -> Tensor:
        """The weight [out, in] moved as little as it takes to round to the codes of what training begins with."""
        groups, codes = (to_groups(one.float(), self.scheme) for one in (weight, start.codes))
        step = as_stored(self.step, self.storage)
        zero = 0 if self.zero is None else self.zero
        inside = torch.clamp(groups / step + zero, codes - _INSIDE, codes + _INSIDE)
        return from_groups((inside - zero) * step, weight.shape).to(weight.dtype)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """See `WeightEstimator.quantized`."""
        groups, step = to_groups(weight, self.scheme), as_stored(self.step, self.storage)
        codes = from_groups(quantize(groups, step, self.zero, self.scheme), weight.shape)
        return QuantizedTensor.from_codes(codes, step, self.zero, self.scheme, self.storage)

    @torch.no_grad()
    def bound(self, weight: Tensor) -> None:
        """A step stays positive."""
        self.step.clamp_(min=_LEAST)


class LsqInput(InputEstimator):
    """One step for all inputs, static; begins with the first batch, whose sign says whether codes begin at 0."""

    unsigned: Tensor
    started: Tensor

    def __init__(self, scheme: TensorScheme) -> None:
        super().__init__(scheme)
        self.step = nn.Parameter(torch.ones(1))
        self.register_buffer("unsigned", torch.zeros(1, dtype=torch.bool))
        self.register_buffer("started", torch.zeros(1, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """See `InputEstimator.forward`."""
        if not self.started:
            if not x.any():
                return x  # as the first state of an LSTM: it says nothing, and is on every grid
            self._start(x)
        if self.training:
            self.step.data.clamp_(min=_LEAST)
        scheme, zero = self._grid()
        features = x[0].numel() if x.dim() == 4 else x.shape[-1]
        factor = 1 / math.sqrt(features * largest_code(scheme))
        step = as_stored(self.step, torch.float32).to(x.dtype)
        zero = None if zero is None else zero.to(x.dtype)
        return round_to_grid(x, step, zero, (scheme.qmin, scheme.qmax), factor=factor)

    @property
    def activation(self) -> TensorScheme:
        """See `InputEstimator.activation`."""
        if not self.started:
            raise RecipeError(
                "A learned step of inputs begins with the first batch, and there was none: run the "
                "prepared model on one."
            )
        return self._grid()[0]

    def stored(self) -> dict[str, Tensor]:
        """See `InputEstimator.stored`."""
        _, zero = self._grid()
        found = {"input_scale": self.step.detach().clamp(min=_LEAST)}
        return found if zero is None else found | {"input_zero_point": zero.to(torch.int8)}

    def _grid(self) -> tuple[TensorScheme, Tensor | None]:
        """Static, and symmetric where inputs have both signs; else the zero-point is the lowest code."""
        unsigned = bool(self.unsigned)
        scheme = static_scheme(self.scheme, symmetric=not unsigned)
        zero = torch.full_like(self.step.detach(), scheme.qmin) if unsigned else None
        return scheme, zero

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        self.unsigned.fill_(bool((x >= 0).all()))
        scheme, _ = self._grid()
        step = 2 * x.detach().float().abs().mean() / math.sqrt(largest_code(scheme))
        self.step.copy_(step.clamp(min=_LEAST))
        self.started.fill_(True)


def static_scheme(scheme: TensorScheme, *, symmetric: bool, narrow: bool = False) -> TensorScheme:
    """One scale for all inputs in the bits of a scheme."""
    return TensorScheme(
        bits=scheme.bits, symmetric=symmetric, narrow=narrow, granularity="tensor", static=True
    )
