"""AffineQuant (Ma et al. 2024, arXiv 2403.12544), exact; and OmniQuant (arXiv 2308.13137) as its diagonal case.

    minimise over A, δ, clipping:   ‖ f(X) − f̂(X̂) ‖²  [ + ‖ f(X̂) − f̂(X̂) ‖² ]

f is the block, f̂ the block rewritten by a member of each site's group and rounded. A∘GM_e is optimised, not A: the mask
opens from the diagonal (epoch 0) to the full matrix (last epoch). Where this deviates from the paper, and why, is
listed in docs/affinequant.md.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bitfold.models.family import NormSite, QueryKey, Site
from bitfold.numerics import MapShape, to_groups
from bitfold.numerics.straight_through import fake_quantize_trainable
from bitfold.part import Need
from bitfold.transforms.block_transform import (
    BlockFit,
    BlockProblem,
    BlockTransform,
    Clipping,
    Terms,
)
from bitfold.transforms.groups import Heads, Transform, fold
from bitfold.transforms.keys import head_matrices, quantizes_keys
from bitfold.transforms.kronecker import factors_of
from bitfold.transforms.learned import Learned, MaskSettings, learned_at
from bitfold.transforms.outputs import restored

__all__ = ["Affine"]

# σ(4) ≈ 0.982: learned clipping starts near the whole range, as in OmniQuant.
CLIPPING_START = 4.0
# Of the loss at the end of an epoch, and of the choice of a precision.
_CHECK_WINDOWS = 16
_TRIAL_WINDOWS = 8
_LARGEST_CHANGE = 0.02


class Affine(BlockTransform):
    """epochs: passes over the calibration windows; 0 does nothing. batch: windows in a step.
    matrices: `full` per head where the group has them, or `diagonal` (OmniQuant). clipping, shifts: learn them.
    norms: `folded`, a diagonal behind each norm, which costs nothing; or `online`, a full matrix as in the paper's
    weight-only setting, whose inverse stays there and runs.
    kronecker: learn Kronecker products before all linear layers, and matrices on keys that are quantized, which run, in
    place of what folds there (FlatQuant).
    alpha: stability factor of the off-diagonal entries. gradual: open the mask epoch by epoch.
    dominance: keep the matrices diagonally dominant by at least `margin`, or leave them (`off`).
    scope: of the loss: the `block`'s output, or each `linear` layer's own.
    terms: of the loss, see `Terms`; `auto`: both where activations are quantized.
    precision: of A and its inverse; `mixed` is a float32 A and a float64 inverse.
    compute: of the block's matrix products while learning; `auto`: bfloat16 where that is quicker and changes the loss
    at the start by less than 2 %. A run in float64 stays in it.
    scale_rate, shift_rate, clip_rate: learning rates at the start; they fall to zero along a cosine."""

    needs = frozenset[Need]({"loss"})

    epochs: int = Field(default=5, ge=0)
    batch: int = Field(default=2, ge=1)
    matrices: Literal["full", "diagonal"] = "full"
    norms: Literal["folded", "online"] = "folded"
    kronecker: bool = False
    clipping: bool = True
    shifts: bool = True
    alpha: float = Field(default=0.1, gt=0, le=1)
    gradual: bool = True
    dominance: Literal["project", "off"] = "project"
    margin: float = Field(default=0.05, ge=0, lt=1)
    scope: Literal["block", "linear"] = "block"
    terms: Terms | Literal["auto"] = "auto"
    precision: Literal["float32", "float64", "mixed"] = "mixed"
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    scale_rate: float = Field(default=2e-2, gt=0)
    shift_rate: float = Field(default=5e-3, gt=0)
    clip_rate: float = Field(default=1e-1, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.norms == "online" and self.matrices == "diagonal":
            raise ValueError("norms=online is a full matrix: leave out matrices=diagonal")
        if self.norms == "online" and self.kronecker:
            raise ValueError("norms=online and kronecker both run behind norms: choose one")
        return self

    def online_map(self, site: Site, width: int, heads: Heads) -> MapShape | None:
        """See `BlockTransform.online_map`."""
        if self.kronecker and isinstance(site, QueryKey):
            return head_matrices(site, heads)
        if self.kronecker:
            return MapShape("kronecker", factors_of(width))
        behind_norm = self.norms == "online" and isinstance(site, NormSite)
        return MapShape("blocks", (1, width)) if behind_norm else None

    def fit(self, problem: BlockProblem) -> BlockFit:
        """See `BlockTransform.fit`."""
        settings = MaskSettings(
            self.epochs, self.alpha, self.gradual, self.dominance, self.margin, self.precision
        )
        full = self.matrices == "full"
        found = [
            learned_at(
                site,
                problem.weights,
                problem.heads,
                settings,
                full=full,
                shifts=self.shifts,
                online=self.norms == "online",
                kronecker=self.kronecker,
                keys=self.kronecker
                and isinstance(site, QueryKey)
                and head_matrices(site, problem.heads) is not None
                and quantizes_keys(site, problem.schemes),
            )
            for site in problem.sites
        ]
        state = _State(
            [one for one in found if one is not None],
            _clipping_parameters(problem) if self.clipping else {},
        )
        return _Descent(self, problem, state).run()


class _State:
    """Everything that is learned."""

    def __init__(self, sites: list[Learned], clipping: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.sites = sites
        self.clipping = clipping

    def groups(self, affine: Affine) -> list[dict[str, Any]]:
        """The optimiser's parameter groups."""
        scales = [p for site in self.sites for p in site.scales]
        shifts = [p for site in self.sites for p in site.shifts]
        clips = [p for pair in self.clipping.values() for p in pair]
        rates = (
            (scales, affine.scale_rate),
            (shifts, affine.shift_rate),
            (clips, affine.clip_rate),
        )
        return [{"params": p, "lr": rate, "start": rate} for p, rate in rates if p]

    @property
    def parameters(self) -> list[Tensor]:
        learned = [p for site in self.sites for p in (*site.scales, *site.shifts)]
        return learned + [p for pair in self.clipping.values() for p in pair]

    def copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def transforms(self) -> list[Transform]:
        """What the parameters stand for now, in the order of folding; differentiable."""
        return [site.transform() for site in self.sites]

    def rewritten(
        self, problem: BlockProblem, transforms: Iterable[Transform], *, clips: bool
    ) -> dict[str, Tensor]:
        """The block's weights, folded and rounded, with or without learned clipping; differentiable."""
        weights: dict[str, Tensor] = dict(problem.weights)
        for transform in transforms:
            weights = fold(weights, transform, problem.heads)
        for name, scheme in problem.schemes.items():
            if scheme.weight is not None:
                key = f"{name}.weight"
                clipping = self.clipping.get(name) if clips else None
                ratios = (
                    None if clipping is None else (clipping[0].sigmoid(), clipping[1].sigmoid())
                )
                weights[key] = fake_quantize_trainable(weights[key], scheme.weight, ratios)
        return weights


class _Descent:
    """Adam with falling rates; the best state seen is kept, and a loss that is not finite goes back to it."""

    def __init__(self, affine: Affine, problem: BlockProblem, state: _State) -> None:
        self.affine, self.problem, self.state = affine, problem, state
        self.optimizer = _adam(state, affine)
        self.terms: Terms = _terms(affine, problem)
        self.halvings = 0
        self.notes: list[str] = []
        self.losses: list[float] = []
        generator = torch.Generator().manual_seed(problem.seed)
        self.generator = generator
        count = min(problem.windows, _CHECK_WINDOWS)
        self.check = torch.randperm(problem.windows, generator=generator)[:count]
        exact_run = any(w.dtype == torch.float64 for w in problem.weights.values())
        self.low = affine.compute == "bfloat16" and not exact_run
        if affine.compute == "auto" and problem.low_is_quick and not exact_run:
            exact = self._checked(windows=_TRIAL_WINDOWS)
            self.low = True
            found = self._checked(windows=_TRIAL_WINDOWS)
            self.low = abs(found - exact) <= _LARGEST_CHANGE * exact

    def run(self) -> BlockFit:
        affine, state = self.affine, self.state
        nothing, start = self._checked(clips=False), self._checked()
        best, best_loss, best_epoch = state.copy(), nothing, None
        if affine.epochs and start < nothing:
            best_loss, best_epoch = start, 0
        steps = affine.epochs * math.ceil(self.problem.windows / affine.batch)
        done = 0
        for epoch in range(affine.epochs):
            for site in state.sites:
                site.start_epoch(epoch)
            for windows in torch.randperm(self.problem.windows, generator=self.generator).split(
                affine.batch
            ):
                self._set_rates(done / steps)
                if not self._step(windows):
                    self._back_to(best, epoch)
                done += 1
                self.problem.report(done, steps, f"epoch {epoch + 1} of {affine.epochs}")
            loss = self._checked()
            self.losses.append(loss)
            if not math.isfinite(loss):
                self._back_to(best, epoch)
            elif loss < best_loss:
                best, best_loss, best_epoch = state.copy(), loss, epoch + 1
        # The best epoch's mask is the one its matrices were measured with.
        for site in state.sites:
            site.start_epoch(max((best_epoch or 0) - 1, 0))
        state.restore(best)
        return self._result(nothing, best_loss, best_epoch)

    def _step(self, windows: Tensor) -> bool:
        """One step of descent; False, and no step, where the loss or a gradient is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = self._loss()(windows)
            if not torch.isfinite(loss):
                return False
            loss.backward()
        sums = [p.grad.sum() for p in self.state.parameters if p.grad is not None]
        if not torch.isfinite(torch.stack(sums)).all():  # a sum is finite only if all is
            return False
        self.optimizer.step()
        for site in self.state.sites:
            site.after_step()
        return True

    def _loss(self, *, clips: bool = True) -> Callable[[Tensor], Tensor]:
        """The loss of the state as it is now, as a function of windows."""
        problem, terms, low = self.problem, self.terms, self.low
        try:
            transforms = self.state.transforms()
        except torch.linalg.LinAlgError:  # a singular matrix: as bad as a loss can be
            return lambda windows: torch.tensor(math.nan)
        weights = self.state.rewritten(problem, transforms, clips=clips)
        if self.affine.scope == "block":
            return lambda windows: problem.loss(weights, windows, terms, low)

        def restore(name: str, output: Tensor) -> Tensor:
            for transform in transforms:
                output = restored(transform, name, output, problem.heads)
            return output

        return lambda windows: problem.linear_loss(weights, windows, terms, low, restore)

    @torch.no_grad()
    def _checked(self, *, clips: bool = True, windows: int = _CHECK_WINDOWS) -> float:
        """The loss on the windows that are set apart for it, or the first so many of them."""
        loss, check = self._loss(clips=clips), self.check[:windows]
        parts = check.split(self.affine.batch)
        return sum(float(loss(part)) * len(part) for part in parts) / len(check)

    def _back_to(self, best: list[Tensor], epoch: int) -> None:
        self.state.restore(best)
        self.optimizer = _adam(self.state, self.affine)
        self.halvings += 1
        self.notes.append(
            f"a loss in epoch {epoch + 1} was not finite: went back to the best state and halved the step"
        )

    def _set_rates(self, progress: float) -> None:
        factor = 0.5 * (1 + math.cos(math.pi * progress)) * 0.5**self.halvings
        for group in self.optimizer.param_groups:
            group["lr"] = group["start"] * factor

    @torch.no_grad()
    def _result(self, nothing: float, best: float, epoch: int | None) -> BlockFit:
        """The best state, of epoch 0 where that is the start; without one doing nothing was best."""
        report: dict[str, Any] = {
            "start": nothing,
            "best": best,
            "best_epoch": epoch,
            "losses": self.losses,
            "compute": "bfloat16" if self.low else "float32",
            "notes": self.notes,
        }
        if epoch is None:
            return BlockFit([], {}, report)
        transforms = self.state.transforms()
        report["sites"] = [
            {"site": transform.site.name, **site.report()}
            for site, transform in zip(self.state.sites, transforms, strict=True)
        ]
        clipping = {
            name: Clipping(lower.sigmoid(), upper.sigmoid())
            for name, (lower, upper) in self.state.clipping.items()
        }
        return BlockFit(transforms, clipping, report)


def _adam(state: _State, affine: Affine) -> torch.optim.Optimizer:
    return torch.optim.Adam(state.groups(affine), betas=(0.9, 0.99), fused=True)


def _terms(affine: Affine, problem: BlockProblem) -> Terms:
    if affine.terms != "auto":
        return affine.terms
    quantized = any(scheme.activation is not None for scheme in problem.schemes.values())
    return "both" if quantized else "original"


def _clipping_parameters(problem: BlockProblem) -> dict[str, tuple[Tensor, Tensor]]:
    """γ of the lower and upper limit of every group of every weight of an integer grid, [out, groups, 1]: through the
    range of another grid goes no gradient."""
    parameters = {}
    for name, scheme in problem.schemes.items():
        if (
            scheme.weight is not None
            and scheme.weight.grid == "int"
            and scheme.weight.granularity != "tensor"
        ):
            weight = problem.weights[f"{name}.weight"]
            shape = (*to_groups(weight, scheme.weight).shape[:-1], 1)
            lower, upper = (weight.new_full(shape, CLIPPING_START) for _ in range(2))
            parameters[name] = (lower.requires_grad_(), upper.requires_grad_())
    return parameters
