"""Rewriting one block: every transform of the recipe fitted and folded in turn, and the whole checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitfold.errors import EquivalenceError
from bitfold.models.family import Site
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline.measure import input_statistics
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.problem import block_problem
from bitfold.pipeline.streams import Streams
from bitfold.statistics import InputStatistics, widened
from bitfold.transforms import BlockTransform, SiteTransform, fold
from bitfold.transforms.block_transform import Clipping
from bitfold.transforms.groups import Transform

__all__ = ["Rewritten", "fold_sites", "rewrite_block"]

# Relative change of a block's output by folding alone, above which it was no equivalence: float32 folds to
# about 1e-6, a matrix outside the group to more than 1e-2.
LARGEST_FOLDING_ERROR = {torch.float64: 1e-9, torch.float32: 1e-3}
LARGEST_FOLDING_ERROR_HALF = 5e-2


@dataclass
class Rewritten:
    """A block after its transforms: its weights by name; the transforms; learned clipping by layer; the relative change
    of the block's output by folding alone; the fits' own figures."""

    weights: dict[str, Tensor]
    transforms: list[Transform] = field(default_factory=list)
    clipping: dict[str, Clipping] = field(default_factory=dict)
    folding_error: float = 0.0
    fits: list[dict[str, Any]] = field(default_factory=list)


def rewrite_block(
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    streams: Streams,
    weights: Mapping[str, Tensor],
    report: Callable[[int, int, str], None],
) -> Rewritten:
    """Fit and fold the recipe's transforms.

    Raises EquivalenceError, naming the block and the error, where that changed what the block computes.
    """
    result = Rewritten(dict(weights))
    for part in plan.recipe.transforms:
        if isinstance(part, SiteTransform):
            fold_sites(part, skeleton, index, plan, streams, result, plan.sites)
        elif isinstance(part, BlockTransform):
            _fold_block(part, skeleton, index, plan, streams, result, report)
    _put_running(skeleton, index, plan, result)
    if plan.recipe.transforms:
        probe = streams.probe_original.to(skeleton.device)
        before = skeleton.run(index, weights, probe)
        added = (before - probe).norm()

        def change(rewritten: Mapping[str, Tensor]) -> float:
            return float((skeleton.run(index, rewritten, probe) - before).norm() / added)

        result.folding_error = change(result.weights)
        limit = LARGEST_FOLDING_ERROR.get(probe.dtype, LARGEST_FOLDING_ERROR_HALF)
        if not result.folding_error <= limit:
            culprit = _culprit(weights, result.transforms, plan, change, limit)
            raise EquivalenceError(
                f"Folding changed what {skeleton.block_name(index)} computes by {result.folding_error:.2e} (relative; "
                f"at most {limit:g} is rounding): what {plan.recipe.method} found at {culprit} is no equivalence."
            )
    return result


def _culprit(
    weights: Mapping[str, Tensor],
    transforms: Sequence[Transform],
    plan: Plan,
    change: Callable[[Mapping[str, Tensor]], float],
    limit: float,
) -> str:
    """The site whose transform, folded after those before it, first changes the block by more than the limit."""
    folded = {name: widened(value) for name, value in weights.items()}
    for transform in transforms:
        folded = fold(folded, transform, plan.heads, plan.storage)
        if not change(_as_run(folded, weights)) <= limit:
            return transform.site.name
    return "several sites together"


def fold_sites(
    part: SiteTransform,
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    streams: Streams,
    result: Rewritten,
    sites: Sequence[Site],
) -> None:
    """Fit and fold a part at some sites of block `index`, on top of what `result` has."""
    schemes = plan.block_schemes(skeleton.block_name(index))
    sites = [site for site in sites if part.wants(site, schemes)]
    if not sites:
        return
    names = tuple(dict.fromkeys(skeleton.family.measured_at(site) for site in sites))
    statistics = input_statistics(
        skeleton, index, plan, result.weights, streams, part.needs, names=names
    )
    # Fitted and folded in the statistics' precision, float32 at least, whatever the block runs in.
    weights = {name: widened(value) for name, value in result.weights.items()}
    for site in sites:
        of_input = statistics.get(skeleton.family.measured_at(site), InputStatistics(part.needs, 0))
        transform = part.fit(site, weights, of_input, schemes, plan.heads)
        if transform is not None:
            weights = fold(weights, transform, plan.heads, plan.storage)
            result.transforms.append(transform)
    result.weights = _as_run(weights, result.weights)


def _put_running(skeleton: Skeleton, index: int, plan: Plan, result: Rewritten) -> None:
    """What needs no fit and runs, at every site for which it was planned."""
    maps = plan.block_maps(skeleton.block_name(index))
    weights = {name: widened(value) for name, value in result.weights.items()}
    like = next(iter(weights.values()))
    for part in plan.recipe.transforms:
        for site in plan.sites:
            if not isinstance(part, SiteTransform) or site.runs_at not in maps:
                continue
            transform = part.running(site, maps[site.runs_at], like)
            if transform is not None:
                weights = fold(weights, transform, plan.heads, plan.storage)
                result.transforms.append(transform)
                for reader in site.readers:  # learned for rows that are other rows now
                    result.clipping.pop(reader, None)
    result.weights = _as_run(weights, result.weights)


def _fold_block(
    part: BlockTransform,
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    streams: Streams,
    result: Rewritten,
    report: Callable[[int, int, str], None],
) -> None:
    weights = {name: widened(value) for name, value in result.weights.items()}
    fit = part.fit(block_problem(skeleton, index, plan, weights, streams, report))
    for transform in fit.transforms:
        weights = fold(weights, transform, plan.heads, plan.storage)
    result.transforms.extend(fit.transforms)
    result.weights = _as_run(weights, result.weights)
    result.clipping |= fit.clipping
    result.fits.append(fit.report)


def _as_run(folded: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Folded weights in the dtype that those before were in, with what came to run."""
    dtype = next(iter(before.values())).dtype
    return {name: value.to(dtype) for name, value in folded.items()}
