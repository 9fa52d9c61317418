"""A job held against the engines that its result is meant for, before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from bitfold.errors import ExportError
from bitfold.export.fitting import Misfit, Planned, for_engines, misfits
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline.job import Job
from bitfold.pipeline.plan import Plan
from bitfold.recipe import Recipe

__all__ = ["fitted", "recipe_for", "refuse_whatever_the_bits"]


def recipe_for(recipe: Recipe, engines: Sequence[str]) -> Recipe:
    """The recipe with scales in the precision that the engines' formats store."""
    rules = tuple(
        rule.model_copy(update={"scheme": for_engines(rule.scheme, engines)})
        for rule in recipe.layers
    )
    scheme = for_engines(recipe.scheme, engines)
    return recipe.model_copy(update={"scheme": scheme, "layers": rules})


def fitted(job: Job, engines: Sequence[str]) -> Job:
    """The job with notes on what its result will cost there.

    Raises ExportError, all in one sentence, for what cannot go there.
    """
    planned = _planned(job.skeleton, job.plan)
    found = {engine: misfits(planned, engine) for engine in engines}
    _refuse(found)
    notes = [f"for {engine}: {misfit.clause}" for engine in engines for misfit in found[engine]]
    return replace(job, notes=tuple(dict.fromkeys([*job.notes, *notes])))


def refuse_whatever_the_bits(job: Job, engines: Sequence[str]) -> None:
    """Raises ExportError for what cannot go there whatever bits are found for the weights, before they are found."""
    planned = _planned(job.skeleton, job.plan)
    found = {engine: misfits(planned, engine) for engine in engines}
    _refuse({engine: [m for m in several if not m.of_weights] for engine, several in found.items()})


def _refuse(found: Mapping[str, Sequence[Misfit]]) -> None:
    stops = [
        (engine, misfit.clause)
        for engine, several in found.items()
        for misfit in several
        if misfit.stops
    ]
    if stops:
        only = stops[0][1] if len(stops) == 1 else ""
        listed = "; ".join(
            f"({i + 1}) {engine}: {clause}" for i, (engine, clause) in enumerate(stops)
        )
        raise ExportError(
            f"The result would not fit {' or '.join(dict.fromkeys(engine for engine, _ in stops))}: {only or listed}"
        )


def _planned(skeleton: Skeleton, plan: Plan) -> Planned:
    shapes = {
        name: (layer.out_features, layer.in_features)
        for name, layer in skeleton.model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    fused = [
        [f"{skeleton.block_name(index)}.{name}" for name in names]
        for index in range(len(skeleton.blocks))
        for names in skeleton.family.inputs
        if len(names) > 1
    ]
    return Planned(skeleton.checkpoint, plan.layout, shapes, fused)
