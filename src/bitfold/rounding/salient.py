"""Salient input channels kept: what AWQ (Lin et al. 2023, arXiv 2306.00978) sets out from, before it scales instead.

The columns of a weight whose inputs have the largest mean magnitude stay in the dtype of the scales, the others are
rounded to nearest. It costs bits and a product of two kinds of columns, so it is here to be compared with.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field

from bitfold.numerics import TensorScheme
from bitfold.part import Need
from bitfold.rounding.nearest import Nearest
from bitfold.rounding.rounding import Layer, Rounded, Rounding
from bitfold.statistics import InputStatistics

__all__ = ["Salient"]


class Salient(Rounding):
    """share: of a layer's input channels that are kept, at least one."""

    needs = frozenset[Need]({"channels"})

    share: float = Field(default=0.01, gt=0, le=0.5)

    def stored_as(
        self, name: str, scheme: TensorScheme, shape: tuple[int, int], scale_dtype: torch.dtype
    ) -> TensorScheme:
        """See `Stores.stored_as`: the same with columns beside it."""
        scheme = super().stored_as(name, scheme, shape, scale_dtype)
        return scheme.model_copy(update={"kept": max(1, round(self.share * shape[1]))})

    def solve(
        self,
        layers: Mapping[str, Layer],
        scale_dtype: torch.dtype,
        statistics: InputStatistics | None = None,
    ) -> Rounded:
        """See `Rounding.solve`."""
        assert statistics is not None
        by_magnitude = statistics.absmean.argsort(descending=True, stable=True)
        tensors = {}
        for name, tensor in Nearest().solve(layers, scale_dtype).tensors.items():
            rows, width = tensor.shape
            scheme = self.stored_as(name, tensor.scheme, (rows, width), scale_dtype)
            columns = by_magnitude[: scheme.kept].sort().values
            kept = layers[name].weight[:, columns].to(scale_dtype)
            tensors[name] = replace(
                tensor, scheme=scheme, kept=kept, columns=columns.to(torch.int32)
            )
        return Rounded(tensors)
