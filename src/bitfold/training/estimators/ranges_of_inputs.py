"""Inputs in ranges that are not learned: of each token, of a moving average, or observed on calibration batches."""

import torch
from torch import Tensor

from bitfold.errors import DataError, RecipeError
from bitfold.numerics import TensorScheme, scale_and_zero
from bitfold.numerics.straight_through import fake_quantize_trainable
from bitfold.ranges import RANGES
from bitfold.training.estimators.estimator import InputEstimator
from bitfold.training.estimators.lsq import static_scheme
from bitfold.training.estimators.through import round_to_grid

__all__ = ["DynamicInput", "MovingAverageInput", "ObservedInput"]

_SAMPLE = 2**16
"""Values of a batch that ranges other than min-max see."""
_SAMPLES = 2**20
"""And of all batches."""


class DynamicInput(InputEstimator):
    """Each token in the range of its own values (of a convolution: each row of the image)."""

    def forward(self, x: Tensor) -> Tensor:
        """See `InputEstimator.forward`."""
        return fake_quantize_trainable(x, self.scheme)

    @property
    def activation(self) -> TensorScheme:
        """See `InputEstimator.activation`."""
        return self.scheme

    def stored(self) -> dict[str, Tensor]:
        """Nothing: it is found as the model runs."""
        return {}


class _StaticInput(InputEstimator):
    """limits: [2], lower and upper; seen: batches so far."""

    limits: Tensor
    seen: Tensor

    def __init__(self, scheme: TensorScheme) -> None:
        super().__init__(scheme)
        self.register_buffer("limits", torch.zeros(2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @property
    def activation(self) -> TensorScheme:
        """See `InputEstimator.activation`."""
        if not self.seen:
            raise RecipeError(
                "A static range of inputs comes from batches, and there was none: `bitfold.calibrate` the model, or "
                "train it."
            )
        return static_scheme(self.scheme, symmetric=self.scheme.symmetric)

    def stored(self) -> dict[str, Tensor]:
        """See `InputEstimator.stored`."""
        scale, zero = self._grid()
        found = {"input_scale": scale}
        return found if zero is None else found | {"input_zero_point": zero.to(torch.int8)}

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        low, high = self.limits[:1], self.limits[1:]
        return scale_and_zero(low, high, self.activation)

    def _rounded(self, x: Tensor) -> Tensor:
        scale, zero = self._grid()
        zero = None if zero is None else zero.to(x.dtype)
        limits = self.scheme.qmin, self.scheme.qmax
        return round_to_grid(x, scale.to(x.dtype), zero, limits)


class MovingAverageInput(_StaticInput):
    """Lower and upper limit as exponential moving averages of the batches' (Jacob et al., arXiv 1712.05877); what a
    batch has beyond them is clipped, and gets no gradient. They stay when the model is not in training."""

    def __init__(self, scheme: TensorScheme, *, momentum: float = 0.1) -> None:
        """momentum: the share of the newest batch."""
        super().__init__(scheme)
        self._momentum = momentum

    def forward(self, x: Tensor) -> Tensor:
        """See `InputEstimator.forward`."""
        if self.training:
            self._see(x.detach())
        return self._rounded(x) if self.seen else x

    @torch.no_grad()
    def _see(self, x: Tensor) -> None:
        limits = torch.stack([x.amin(), x.amax()]).float()
        share = self._momentum if self.seen else 1.0
        self.limits.lerp_(limits, share)
        self.seen += 1


class ObservedInput(_StaticInput):
    """The range that one of `bitfold.ranges` finds for what was seen while `observing`; nothing is rounded then."""

    def __init__(self, scheme: TensorScheme, *, range: str = "minmax") -> None:
        """range: minmax, percentile, mse or kl; or `moving_average` of the batches' min-max, a tenth for each."""
        super().__init__(scheme)
        self._range = range
        self.observing = False
        self._kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """See `InputEstimator.forward`."""
        if self.observing:
            self._see(x.detach())
            return x
        return self._rounded(x) if self.seen else x

    @torch.no_grad()
    def _see(self, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise DataError(
                "An input of a calibration batch is not finite: look for NaN or infinity in the data or the weights."
            )
        low, high = x.amin().float(), x.amax().float()
        if self._range == "moving_average":
            self.limits.lerp_(torch.stack([low, high]), 0.1 if self.seen else 1.0)
        elif self.seen:
            self.limits[0].clamp_(max=low)
            self.limits[1].clamp_(min=high)
        else:
            self.limits.copy_(torch.stack([low, high]))
        self.seen += 1
        if self._range in ("minmax", "moving_average"):
            return
        values = x.flatten().float()
        kept = sum(part.numel() for part in self._kept)
        if kept < _SAMPLES:
            # Every nth value, and the ends, which a range must know.
            part = values[:: max(1, values.numel() // _SAMPLE)]
            self._kept.append(torch.cat([part, low[None], high[None]]).cpu())

    @torch.no_grad()
    def finish(self) -> None:
        """The range of all that was seen; observing ends."""
        self.observing = False
        if not self._kept:
            return
        scheme = static_scheme(self.scheme, symmetric=self.scheme.symmetric)
        found = RANGES[self._range]().limits(torch.cat(self._kept)[None], scheme)
        limits = [one.reshape(1).to(self.limits) for one in found]
        self.limits.copy_(torch.cat(limits))
        self._kept = []
