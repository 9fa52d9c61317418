"""PACT: a learned clip of inputs (Choi et al. 2018, arXiv 1805.06085).

y = clamp(x, 0, α), or clamp(x, −α, α) where inputs have both signs; rounded to steps of α/(2^b − 1), or α/(2^(b−1) − 1)
dy/dα = 1 where x ≥ α, −1 where x ≤ −α, 0 between;   the loss has λ Σ α² added (`bitfold.training.penalty`)
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bitfold.errors import RecipeError
from bitfold.numerics import TensorScheme
from bitfold.training.estimators.estimator import InputEstimator
from bitfold.training.estimators.lsq import static_scheme
from bitfold.training.estimators.through import ALL, round_to_grid

__all__ = ["PactInput"]

_LEAST = 1e-5


class PactInput(InputEstimator):
    """clip: [1], α, learned; begins at the largest magnitude of the first batch."""

    unsigned: Tensor
    started: Tensor

    def __init__(self, scheme: TensorScheme, *, decay: float = 1e-4) -> None:
        """decay: λ."""
        super().__init__(scheme)
        self._decay = decay
        self.clip = nn.Parameter(torch.ones(1))
        self.register_buffer("unsigned", torch.zeros(1, dtype=torch.bool))
        self.register_buffer("started", torch.zeros(1, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """See `InputEstimator.forward`."""
        if not self.started:
            if not x.any():
                return x  # as the first state of an LSTM: it says nothing, and is on every grid
            self._start(x)
        scheme, scale, zero = self._grid()
        clip = self.clip.clamp(min=_LEAST).to(x.dtype)
        low = torch.zeros_like(clip) if zero is not None else -clip
        clipped = torch.clamp(x, low, clip)
        zero = None if zero is None else zero.to(x.dtype)
        limits = scheme.qmin, scheme.qmax
        return round_to_grid(clipped, scale.to(x.dtype), zero, limits, edge=ALL)

    @property
    def activation(self) -> TensorScheme:
        """See `InputEstimator.activation`."""
        if not self.started:
            raise RecipeError(
                "A learned clip of inputs begins with the first batch, and there was none: run the "
                "prepared model on one."
            )
        return self._grid()[0]

    def stored(self) -> dict[str, Tensor]:
        """See `InputEstimator.stored`."""
        _, scale, zero = self._grid()
        found = {"input_scale": scale}
        return found if zero is None else found | {"input_zero_point": zero.to(torch.int8)}

    def penalty(self) -> Iterable[Tensor]:
        """λ α²."""
        yield self._decay * self.clip.square().sum()

    @torch.no_grad()
    def _grid(self) -> tuple[TensorScheme, Tensor, Tensor | None]:
        unsigned = bool(self.unsigned)
        scheme = static_scheme(self.scheme, symmetric=not unsigned, narrow=not unsigned)
        steps = scheme.qmax - scheme.qmin if unsigned else scheme.qmax
        scale = self.clip.detach().clamp(min=_LEAST) / steps
        return scheme, scale, torch.full_like(scale, scheme.qmin) if unsigned else None

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        self.unsigned.fill_(bool((x >= 0).all()))
        self.clip.copy_(x.detach().float().abs().amax().clamp(min=_LEAST))
        self.started.fill_(True)
