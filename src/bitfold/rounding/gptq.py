"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns in order, each making up for the errors of those before it.

The layer's error is tr(Δ H Δᵀ) with Δ = W − Ŵ and H = E[xxᵀ]. With H = R Rᵀ, R upper triangular, it is ‖Δ R‖², whose
column j has Δ_1 … Δ_j in it and no more. So columns 1 … n in order have the least-squares optimum given all before them
in

    ŵ_j = Q( w_j + Σ_{i<j} Δ_i R_ij / R_jj )

The paper spreads each error over what is not rounded yet, by the Cholesky factor U of H⁻¹ = UᵀU. That is the same, as
U = R⁻¹ (Chee et al. 2023, arXiv 2307.13304, theorem 6), but takes an inverse, and writes all that follows at each step.
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

__all__ = ["Gptq", "MomentRoot", "groups_of_columns", "moment_root", "rounded_in_order"]

# Each failed factorization multiplies the damping by this.
_MORE_DAMPING = 10.0


class Gptq(Rounding):
    """damping: share of H's mean diagonal that is added to its diagonal.
    order: of the columns, by falling H_jj (`activation`) or as they come (`none`). Groups keep their columns and limits
    in either case. block: columns of which one product gathers the errors of all before.
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
        factor: "MomentRoot | None" = None,
    ) -> Rounded:
        """The same, given H [in, in]; with E[(x₀ − x)xᵀ], the original model's x₀, errors of earlier layers count.

        factor: `root_of(gram)`, where it is known.
        """
        factor = factor or self.root_of(gram)
        nearest = Nearest().solve(layers, scale_dtype).tensors
        tensors = {}
        for name, layer in layers.items():
            found = rounded_in_order(layer, scale_dtype, factor, self.block, cross)
            if self.keep_better:
                found = _better_rows(layer.weight, found, nearest[name], gram, cross)
            tensors[name] = self.improved(found, layer, factor, scale_dtype)
        return Rounded(tensors, self.notes_on(factor, layers))

    def root_of(self, gram: Tensor) -> "MomentRoot":
        """The factor of H [in, in] in the order of these options."""
        return moment_root(gram, self.damping, by_activation=self.order == "activation")

    def improved(
        self,
        found: QuantizedTensor,
        layer: Layer,
        factor: "MomentRoot",
        scale_dtype: torch.dtype,
    ) -> QuantizedTensor:
        """What is made of a layer's codes once all of them are there: nothing."""
        return found

    def notes_on(self, factor: "MomentRoot", layers: Iterable[str]) -> list[str]:
        """What the user should know of the factor."""
        if factor.damping == self.damping:
            return []
        return [
            f"the second moment of the input of {', '.join(layers)} is singular: damped by {factor.damping:g} "
            f"instead of {self.damping:g}"
        ]


@dataclass(frozen=True)
class MomentRoot:
    """order: the columns' [n]; damped: H in that order, with the damping that it took [n, n]; root: R upper triangular
    with damped = R Rᵀ."""

    order: Tensor
    damped: Tensor
    root: Tensor
    damping: float

    @property
    def moment(self) -> Tensor:
        """H, damped, its columns as they come [n, n]."""
        place = torch.argsort(self.order)
        return self.damped[place][:, place]


def moment_root(gram: Tensor, damping: float, *, by_activation: bool, width: int = 1) -> MomentRoot:
    """The triangular root of a damped second moment [n, n].

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
        damped = turned.clone()
        damped.diagonal().add_(added * mean)
        # With rows and columns backwards a lower triangular factor is an upper triangular one.
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not info.item() and torch.isfinite(lower).all():
            return MomentRoot(order, damped, lower.flip(0, 1), added)
        added *= _MORE_DAMPING


def rounded_in_order(
    layer: Layer,
    scale_dtype: torch.dtype,
    factor: MomentRoot,
    block: int,
    cross: Tensor | None = None,
    *,
    settled: int = 0,
) -> QuantizedTensor:
    """Codes of one weight, column after column in the factor's order.

    cross: E[(x₀ − x)xᵀ] [in, in]; with it each step also makes up for what earlier layers did to the column (GPTAQ).
    settled: of the first so many columns the others know the error already.
    """
    scheme, order, root = layer.scheme, factor.order.tolist(), factor.root
    scales, zeros, width = groups_of_columns(layer, scale_dtype)
    scales, zeros = scales.T.contiguous(), None if zeros is None else zeros.T.contiguous()
    # One row for each column, so that what a step reads and writes lies together. What a column is rounded from at
    # last; what it should have become, less what it did.
    wanted = layer.weight.to(root.dtype).T[factor.order]
    missing = torch.empty_like(wanted)
    drift = None if cross is None else _drift(cross, factor)
    codes = torch.empty(wanted.shape, dtype=code_dtype(scheme), device=wanted.device)
    for start in range(0, len(order), block):
        stop = min(start + block, len(order))
        pulled = root[:start, start:stop].T @ missing[:start]
        if drift is not None:
            wanted[start:stop] += drift[:start, start:stop].T @ wanted[:start]
        for j in range(start, stop):
            if drift is not None:
                wanted[j] += drift[start:j, j] @ wanted[start:j]
            aim = wanted[j].clone()
            wanted[j] += (pulled[j - start] + root[start:j, j] @ missing[start:j]) / root[j, j]
            group = order[j] // width
            zero_j = None if zeros is None else zeros[group]
            code = quantize(wanted[j], scales[group], zero_j, scheme)
            codes[order[j]] = code
            if j < settled:
                missing[j] = 0
            else:
                missing[j] = aim - dequantize(code, scales[group], zero_j, scheme)
    scale, zero = scale_and_zero(*layer.limits, scheme, scale_dtype)
    return QuantizedTensor.from_codes(codes.T.contiguous(), scale, zero, scheme, scale_dtype)


def groups_of_columns(layer: Layer, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None, int]:
    """Scales and zero-points [out, groups] as they will be stored, and how many columns share one."""
    scale, zero = scale_and_zero(*layer.limits, layer.scheme, scale_dtype)
    rows, columns = layer.weight.shape
    scales = scale.reshape(-1, scale.shape[-2]).expand(rows, -1)
    zeros = None if zero is None else zero.reshape(-1, scale.shape[-2]).expand(rows, -1)
    return scales, zeros, columns // scales.shape[1]


def _drift(cross: Tensor, factor: MomentRoot) -> Tensor:
    """P = ((C L) ⊙ M) Lᵀ with L = R⁻ᵀ, H⁻¹ = L Lᵀ, and M strictly upper triangular; in the factor's order."""
    turned = cross[factor.order][:, factor.order]
    solved = torch.linalg.solve_triangular(factor.root.T, turned, upper=False, left=False)
    return torch.linalg.solve_triangular(
        factor.root, solved.triu(diagonal=1), upper=True, left=False
    )


def _better_rows(
    weight: Tensor,
    found: QuantizedTensor,
    nearest: QuantizedTensor,
    gram: Tensor,
    cross: Tensor | None,
) -> QuantizedTensor:
    """Per row the codes of smaller error δ H δᵀ + 2 w C δᵀ: ‖w x₀ − ŵ x‖² up to a constant. The scales are the same.

    With a and b the two δ, a H aᵀ − b H bᵀ = (a + b) H (a − b)ᵀ: one product tells which is smaller.
    """
    first, second = (weight - tensor.dequantize(weight.dtype) for tensor in (found, nearest))
    slope = (first + second) @ gram.to(weight.dtype)
    if cross is not None:
        slope += 2 * weight @ cross.to(weight.dtype)
    excess = (slope * (first - second)).sum(dim=1, keepdim=True)
    return replace(found, codes=torch.where(excess <= 0, found.codes, nearest.codes))
