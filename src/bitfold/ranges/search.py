"""What the searched ranges share: try shrinking the min-max range step by step, keep the best per group."""

from collections.abc import Callable

import torch
from torch import Tensor

from bitfold.numerics import TensorScheme, fake_quantize, scale_and_zero

__all__ = ["search_shrinkage"]


def search_shrinkage(
    groups: Tensor,
    scheme: TensorScheme,
    error: Callable[[Tensor], Tensor],
    *,
    smallest: float,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """The limits [..., 1] among `steps` shrinkages of min-max, from 1 down to `smallest`, of least error.

    error: takes the difference quantized − original [..., g] and gives one number per group [..., 1].
    A tie goes to the wider range, so that the result is never worse than min-max.
    """
    minimum, maximum = torch.aminmax(groups, dim=-1, keepdim=True)
    best_error = torch.full_like(minimum, torch.inf)
    best = torch.ones_like(minimum)
    for ratio in torch.linspace(1.0, smallest, steps).tolist():
        scale, zero = scale_and_zero(minimum * ratio, maximum * ratio, scheme)
        current = error(fake_quantize(groups, scale, zero, scheme) - groups)
        better = current < best_error
        best_error = torch.where(better, current, best_error)
        best = torch.where(better, torch.full_like(best, ratio), best)
    return minimum * best, maximum * best
