"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns in order, each one's error spread over those that follow.

The layer's error is tr(Δ H Δᵀ) with Δ = W − Ŵ and H = E[xxᵀ]. With the Cholesky factor U of its inverse, H⁻¹ = UᵀU,
upper triangular, and columns 1 … n in order:

    e_j = (w_j − Q(w_j)) / U_jj        W_{:, j+1:} ← W_{:, j+1:} − e_j U_{j, j+1:}

which moves what is not rounded yet to the least-squares optimum given all that is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bitfold.numerics import QuantizedTensor, dequantize, quantize, scale_and_zero
from bitfold.numerics.quantize import code_dtype
from bitfold.part import Need
from bitfold.rounding.nearest import Nearest
from bitfold.rounding.rounding import Layer, Rounded, Rounding
from bitfold.statistics import InputStatistics

__all__ = ["Gptq", "InverseFactor", "groups_of_columns", "inverse_factor", "spread_error"]

# Each failed factorization multiplies the damping by this.
_MORE_DAMPING = 10.0


class Gptq(Rounding):
    """damping: share of H's mean diagonal that is added to its diagonal.
    order: of the columns, by falling H_jj (`activation`) or as they come (`none`). Groups keep their columns and limits
    in either case. block: columns between two updates of all that follow.
    keep_better: per row, nearest where that has the smaller error."""

    needs = frozenset[Need]({"gram"})

    damping: float = Field(default=0.01, gt=0)
    order: Literal["activation", "none"] = "activation"
    block: int = Field(default=128, ge=1)
    keep_better: bool = True

    def solve(
        self,
        layers: Mapping[str, Layer],
        scale_dtype: torch.dtype,
        statistics: InputStatistics | None = None,
    ) -> Rounded:
        """See `Rounding.solve`. The layers share H and its factor."""
        assert statistics is not None
        return self.solve_with(layers, scale_dtype, statistics.gram)

    def solve_with(
        self,
        layers: Mapping[str, Layer],
        scale_dtype: torch.dtype,
        gram: Tensor,
        cross: Tensor | None = None,
    ) -> Rounded:
        """The same, given H [in, in]; with E[(x₀ − x)xᵀ], the original model's x₀, errors of earlier layers count."""
        factor = inverse_factor(gram, self.damping, by_activation=self.order == "activation")
        nearest = Nearest().solve(layers, scale_dtype).tensors
        tensors = {}
        for name, layer in layers.items():
            found = spread_error(layer, scale_dtype, factor, self.block, cross)
            if self.keep_better:
                found = _better_rows(layer.weight, found, nearest[name], gram, cross)
            tensors[name] = self.improved(found, layer, factor, scale_dtype)
        return Rounded(tensors, self.notes_on(factor, layers))

    def improved(
        self,
        found: QuantizedTensor,
        layer: Layer,
        factor: "InverseFactor",
        scale_dtype: torch.dtype,
    ) -> QuantizedTensor:
        """What is made of a layer's codes once all of them are there: nothing."""
        return found

    def notes_on(self, factor: "InverseFactor", layers: Iterable[str]) -> list[str]:
        """What the user should know of the factor."""
        if factor.damping == self.damping:
            return []
        return [
            f"the second moment of the input of {', '.join(layers)} is singular: damped by {factor.damping:g} "
            f"instead of {self.damping:g}"
        ]


@dataclass(frozen=True)
class InverseFactor:
    """order: the columns' [n]; damped: H in that order, with the damping that it took [n, n]; upper: U of its inverse
    UᵀU."""

    order: Tensor
    damped: Tensor
    upper: Tensor
    damping: float

    @property
    def moment(self) -> Tensor:
        """H, damped, its columns as they come [n, n]."""
        place = torch.argsort(self.order)
        return self.damped[place][:, place]


def inverse_factor(
    gram: Tensor, damping: float, *, by_activation: bool, width: int = 1
) -> InverseFactor:
    """The Cholesky factor of the damped inverse of a second moment [n, n].

    width: so many adjacent columns stay together in the order. A column that no input reaches has H_jj = 0; it counts
    as the mean does, so that it is rounded to nearest.
    """
    size = gram.shape[0]
    diagonal = gram.diagonal()
    alive = diagonal > 0
    mean = diagonal[alive].mean() if alive.any() else torch.ones_like(diagonal[0])
    order = torch.arange(size, device=gram.device)
    if by_activation:
        power = diagonal.unflatten(0, (-1, width)).sum(dim=1)
        tiles = torch.argsort(power, descending=True, stable=True)
        order = order.unflatten(0, (-1, width))[tiles].flatten()
    turned = gram[order][:, order]
    turned.diagonal().add_(torch.where(alive, 0.0, mean)[order])
    added = damping
    while True:
        damped = turned + torch.eye(size, dtype=gram.dtype, device=gram.device) * (added * mean)
        upper, failed = _factor_of_inverse(damped)
        if not failed:
            return InverseFactor(order, damped, upper, added)
        added *= _MORE_DAMPING


def _factor_of_inverse(matrix: Tensor) -> tuple[Tensor, bool]:
    """U upper triangular with matrix⁻¹ = UᵀU, and whether it could not be found."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    if info.item():
        return lower, True
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper, bool(info.item()) or not bool(torch.isfinite(upper).all())


def spread_error(
    layer: Layer,
    scale_dtype: torch.dtype,
    factor: InverseFactor,
    block: int,
    cross: Tensor | None = None,
    *,
    settled: int = 0,
) -> QuantizedTensor:
    """Codes of one weight, column after column in the factor's order.

    cross: E[(x₀ − x)xᵀ] [in, in]; with it each step also makes up for what earlier layers did to the column (GPTAQ).
    settled: of the first so many columns the others know the error already.
    """
    scheme = layer.scheme
    scales, zeros, width = groups_of_columns(layer, scale_dtype)
    rows, columns = layer.weight.shape
    rest = layer.weight[:, factor.order].to(factor.upper.dtype)
    drift = None if cross is None else _drift(cross, factor)
    codes = torch.empty(rows, columns, dtype=code_dtype(scheme), device=rest.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        current = rest[:, start:stop]
        upper = factor.upper[start:stop, start:stop]
        errors = torch.empty_like(current)
        for j in range(stop - start):
            original = int(factor.order[start + j])
            group = original // width
            column, step = current[:, j], scales[:, group]
            zero_j = None if zeros is None else zeros[:, group]
            code = quantize(column, step, zero_j, scheme)
            codes[:, original] = code
            errors[:, j] = (column - dequantize(code, step, zero_j, scheme)) / upper[j, j]
            if start + j < settled:
                errors[:, j] = 0
            current[:, j + 1 :] -= errors[:, j, None] * upper[j, j + 1 :]
            if drift is not None:
                current[:, j + 1 :] += column[:, None] * drift[start + j, start + j + 1 : stop]
        rest[:, stop:] -= errors @ factor.upper[start:stop, stop:]
        if drift is not None:
            rest[:, stop:] += current @ drift[start:stop, stop:]
    scale, zero = scale_and_zero(*layer.limits, scheme, scale_dtype)
    return QuantizedTensor.from_codes(codes, scale, zero, scheme, scale_dtype)


def groups_of_columns(layer: Layer, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None, int]:
    """Scales and zero-points [out, groups] as they will be stored, and how many columns share one."""
    scale, zero = scale_and_zero(*layer.limits, layer.scheme, scale_dtype)
    rows, columns = layer.weight.shape
    scales = scale.reshape(-1, scale.shape[-2]).expand(rows, -1)
    zeros = None if zero is None else zero.reshape(-1, scale.shape[-2]).expand(rows, -1)
    return scales, zeros, columns // scales.shape[1]


def _drift(cross: Tensor, factor: InverseFactor) -> Tensor:
    """P = ((C L) ⊙ M) Lᵀ with L = Uᵀ, H⁻¹ = L Lᵀ, and M strictly upper triangular; in the factor's order."""
    turned = cross[factor.order][:, factor.order]
    return (turned @ factor.upper.T).triu(diagonal=1) @ factor.upper


def _better_rows(
    weight: Tensor,
    found: QuantizedTensor,
    nearest: QuantizedTensor,
    gram: Tensor,
    cross: Tensor | None,
) -> QuantizedTensor:
    """Per row the codes of smaller error δ H δᵀ + 2 w C δᵀ: ‖w x₀ − ŵ x‖² up to a constant. The scales are the same."""
    pulled = None if cross is None else 2 * weight @ cross.to(weight.dtype)

    def error(tensor: QuantizedTensor) -> Tensor:
        difference = weight - tensor.dequantize(weight.dtype)
        product = difference @ gram.to(weight.dtype)
        if pulled is not None:
            product += pulled
        return (product * difference).sum(dim=1, keepdim=True)

    codes = torch.where(error(found) <= error(nearest), found.codes, nearest.codes)
    return replace(found, codes=codes)
