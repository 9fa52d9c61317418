"""A block as the problem that a gradient method is given: its loss on calibration windows, as a function of weights."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from bitfold.models.skeleton import Skeleton
from bitfold.numerics import Scheme
from bitfold.numerics.straight_through import fake_quantize_trainable
from bitfold.pipeline.hooks import quantizing
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.streams import Streams, batches
from bitfold.transforms.block_transform import BlockProblem, Terms

__all__ = ["block_problem"]


def block_problem(
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    weights: Mapping[str, Tensor],
    streams: Streams,
    report: Callable[[int, int, str], None],
) -> BlockProblem:
    """The problem of block `index` with these weights (already rewritten by earlier transforms, not rounded).

    f(X), and f(X̂) when the loss asks for it, are computed once and kept.
    """
    assert streams.original is not None
    assert streams.quantized is not None
    given, device = streams.quantized, skeleton.device
    schemes = plan.block_schemes(skeleton.block_name(index))
    targets: dict[str, Tensor] = {}

    def target(term: str, stream: Tensor) -> Tensor:
        if term not in targets:
            outputs = [
                skeleton.run(index, weights, part.to(device)).cpu() for part in batches(stream)
            ]
            targets[term] = torch.cat(outputs)
        return targets[term]

    with torch.no_grad():
        added = target("original", streams.original) - streams.original
    power = added.square().mean().clamp(min=1e-30).to(device)

    def loss(rewritten: Mapping[str, Tensor], windows: Tensor, terms: Terms, low: bool) -> Tensor:
        with (
            _trainable(skeleton, index, plan, schemes),
            torch.autocast(device.type, torch.bfloat16, enabled=low),
        ):
            found = skeleton.run(index, rewritten, given[windows].to(device))
        total = torch.zeros((), device=device)
        for term, stream in (("original", streams.original), ("quantized", given)):
            if terms in (term, "both"):
                assert stream is not None
                with torch.no_grad():
                    wanted = target(term, stream)[windows].to(device)
                total = total + (found - wanted).square().mean() / power
        return total

    return BlockProblem(
        weights=weights,
        sites=plan.sites,
        schemes=schemes,
        heads=plan.heads,
        windows=given.shape[0],
        loss=loss,
        seed=plan.recipe.seed * 10_007 + index,
        report=report,
    )


def _trainable(
    skeleton: Skeleton, index: int, plan: Plan, schemes: Mapping[str, Scheme]
) -> AbstractContextManager[None]:
    """The block with quantized inputs, queries, keys and values that gradients pass through."""
    family = skeleton.family
    inputs = {
        name: _through(scheme) for name, scheme in schemes.items() if scheme.activation is not None
    }
    heads = plan.attention[f"{skeleton.block_name(index)}.{family.attention}"]
    return quantizing(
        skeleton.blocks[index], inputs, family.attention, heads, fake_quantize_trainable
    )


def _through(scheme: Scheme) -> Callable[[Tensor], Tensor]:
    activation = scheme.activation
    assert activation is not None

    def quantize(x: Tensor) -> Tensor:
        return fake_quantize_trainable(x, activation)

    return quantize
