"""DoReFa-Net's weights of few bits (Zhou et al. 2016, arXiv 1606.06160, equations 9 and 5).

    r = tanh(w/m) / (2 max|tanh(w/m)|) + 1/2,   ŵ = m (2 round((2^b − 1) r)/(2^b − 1) − 1)

The gradient passes the rounding straight through, and the rest as it is. m = 1 is the paper's, where layers are trained
from the start behind batch norms; m = max|w| of the beginning leaves a trained layer its size.
"""

import torch
from torch import Tensor

from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.training.estimators.estimator import WeightEstimator
from bitfold.training.estimators.through import ALL, round_to_grid

__all__ = ["DorefaWeight", "dorefa_scheme"]


def dorefa_scheme(bits: int) -> TensorScheme:
    """2^b levels from −m to m at equal distances, without 0; one scale for the layer."""
    return TensorScheme(grid="shifted", bits=bits, granularity="tensor")


class DorefaWeight(WeightEstimator):
    """size: [1, 1], m, fixed."""

    size: Tensor

    def __init__(
        self,
        weight: Tensor,
        scheme: TensorScheme,
        storage: torch.dtype = torch.float32,
        *,
        paper: bool = False,
    ) -> None:
        """weight: [out, in]. paper: m = 1."""
        super().__init__(scheme, storage)
        largest = weight.detach().float().abs().amax().clamp(min=1e-8).reshape(1, 1)
        size = torch.ones_like(largest) if paper else largest
        self.register_buffer("size", size.to(storage).float())
        self._levels = 2**scheme.bits - 1

    def forward(self, weight: Tensor) -> Tensor:
        """See `WeightEstimator.forward`."""
        one, limits = torch.ones_like(self.size), (0, self._levels)
        codes = round_to_grid(self._place(weight), one, None, limits, edge=ALL)
        return codes * self._scale() - self.size

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """See `WeightEstimator.quantized`."""
        codes = self._place(weight).round().to(torch.uint8)
        scale, shift = self._scale().to(self.storage), -self.size.to(self.storage)
        return QuantizedTensor(codes, scale, None, self.scheme, shift=shift)

    def _scale(self) -> Tensor:
        return (2 * self.size / self._levels).to(self.storage).float()

    def _place(self, weight: Tensor) -> Tensor:
        """(2^b − 1) r, between 0 and 2^b − 1."""
        bent = torch.tanh(weight / self.size)
        return self._levels * (bent / (2 * bent.abs().amax().clamp(min=1e-12)) + 0.5)
