"""A stored tensor that is trained: what it was, and by how much it moves."""

import torch
from torch import Tensor

from bitfold.numerics import TensorScheme
from bitfold.numerics.trainable_scale import as_stored, nearest_codes

__all__ = ["Trained", "TrainedCodes"]

_LEAST_REACH = 0.1
_FARTHEST = 0.9


class Trained:
    """start + reach · θ, rounded to the dtype of storage; θ, float32 at least, is what is learned, and starts at 0.

    reach is the size of each entry, so that one rate serves scales and gains of any magnitude; at least a tenth of the
    tensor's root mean square unless the tensor is `positive`: a scale, which stays so since |θ| ≤ 0.9.
    """

    def __init__(
        self, start: Tensor, *, positive: bool, scheme: TensorScheme | None = None
    ) -> None:
        """start: in the dtype of storage, floating point. scheme: of the weight whose scales they are."""
        self.start, self._scheme = start.clone(), scheme
        self._start = self.start.to(torch.promote_types(start.dtype, torch.float32))
        size = self._start.abs()
        least = 0.0 if positive else _LEAST_REACH * float(size.square().mean().sqrt())
        self._reach = size.clamp(min=least)
        self.theta = torch.zeros_like(self._start, requires_grad=True)

    def value(self) -> Tensor:
        """What will be stored, float32 at least; differentiable in θ."""
        return as_stored(self._start + self._reach * self.theta, self.start.dtype, self._scheme)

    @torch.no_grad()
    def stored(self) -> Tensor:
        """What will be stored, in the dtype of storage."""
        return self.value().to(self.start.dtype)

    @torch.no_grad()
    def bound(self) -> None:
        """Bring θ back into its bounds, after a step. What is not a number stays so."""
        self.theta.clamp_(-_FARTHEST, _FARTHEST)


class TrainedCodes:
    """Codes [out, in] that may move by one: start + θ is where a weight stands between the codes, |θ| ≤ 1."""

    def __init__(self, start: Tensor, scheme: TensorScheme) -> None:
        """start: codes of an integer grid."""
        self.start, self._scheme = start, scheme
        self.theta = torch.zeros(start.shape, device=start.device, requires_grad=True)

    def value(self) -> Tensor:
        """Positions, float32; differentiable in θ."""
        return self.start + self.theta

    @torch.no_grad()
    def stored(self) -> Tensor:
        """The codes, int8."""
        return nearest_codes(self.value(), self._scheme)

    @torch.no_grad()
    def bound(self) -> None:
        """Bring θ back into its bounds, after a step. What is not a number stays so."""
        self.theta.clamp_(-1, 1)
