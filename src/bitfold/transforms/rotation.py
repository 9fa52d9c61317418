"""A random rotation of the residual stream, folded: QuaRot's (Ashkboos et al. 2024, arXiv 2404.00456), nothing of which
runs.

In a random basis no channel of the stream is an outlier: every reader's input and every writer's rows are mixtures of
all. Nothing of it runs, so any orthogonal matrix serves; a Hadamard matrix with random signs has entries of one size.
"""

import torch
from scipy.linalg import hadamard
from torch import Tensor

from bitfold.transforms.stream_transform import StreamTransform

__all__ = ["Rotation"]


class Rotation(StreamTransform):
    """Hadamard with random signs where the size is a power of two, else uniformly random."""

    def matrix(self, size: int, *, keeps_ones: bool, seed: int) -> Tensor:
        """See `StreamTransform.matrix`."""
        generator = torch.Generator().manual_seed(seed)
        if not keeps_ones:
            return _orthogonal(size, generator)
        # The reflection that swaps the first axis and the direction of ones, around a rotation of all other axes.
        axis = torch.full((size,), -(size**-0.5), dtype=torch.float64)
        axis[0] += 1
        reflection = torch.eye(size, dtype=torch.float64)
        if float(axis.norm()) > 0:
            axis = axis / axis.norm()
            reflection -= 2 * torch.outer(axis, axis)
        inner = torch.eye(size, dtype=torch.float64)
        inner[1:, 1:] = _orthogonal(size - 1, generator)
        return reflection @ inner @ reflection


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    if size and size & (size - 1) == 0:
        signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
        return signs[:, None] * torch.from_numpy(hadamard(size)).double() / size**0.5
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()  # uniform over the group
