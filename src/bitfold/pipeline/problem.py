"""A block as the problem that a gradient method is given: its loss on calibration windows, as a function of weights."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from bitfold.models.skeleton import Skeleton
from bitfold.numerics import TensorScheme
from bitfold.numerics.straight_through import fake_quantize_trainable
from bitfold.pipeline.hooks import InputQuantizer, capturing_outputs, quantizing
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.streams import Streams, batches
from bitfold.runtime.device import has_fast_bfloat16
from bitfold.statistics import widened
from bitfold.transforms.block_transform import BlockProblem, Restore, Terms

__all__ = ["block_problem", "quantizing_trainably"]


def block_problem(
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    weights: Mapping[str, Tensor],
    streams: Streams,
    report: Callable[[int, int, str], None],
    inputs: Mapping[str, InputQuantizer] | None = None,
) -> BlockProblem:
    """The problem of block `index` with these weights (already rewritten by earlier transforms, not rounded).

    inputs: how the layers' inputs will be quantized, where that is known already: of clipped ranges the shares.

    f(X) is what the original gives; it, and f(X̂) when the loss asks for it, are computed once and kept.
    """
    assert streams.original is not None
    assert streams.quantized is not None
    given, device = streams.quantized, skeleton.device
    given_weights = {name: value.to(given.dtype) for name, value in weights.items()}
    schemes = plan.block_schemes(skeleton.block_name(index))
    targets: dict[str, Tensor] = {} if streams.ahead is None else {"original": streams.ahead}

    def target(term: str, stream: Tensor) -> Tensor:
        if term not in targets:
            outputs = [
                skeleton.run(index, given_weights, part.to(device)).cpu()
                for part in batches(stream)
            ]
            targets[term] = torch.cat(outputs)
        return targets[term]

    with torch.no_grad():
        added = target("original", streams.original) - streams.original
        measured = widened(added[:0]).dtype  # what a loss is summed in
    power = added.to(measured).square().mean().clamp(min=1e-30).to(device)

    def quantized_run(rewritten: Mapping[str, Tensor], windows: Tensor, low: bool) -> Tensor:
        cast = {name: value.to(given.dtype) for name, value in rewritten.items()}
        with (
            quantizing_trainably(skeleton, index, plan, inputs),
            torch.autocast(device.type, torch.bfloat16, enabled=low),
        ):
            return skeleton.run(index, cast, given[windows].to(device))

    def terms_of(terms: Terms) -> list[tuple[str, Tensor]]:
        both = (("original", streams.original), ("quantized", given))
        return [
            (term, stream)
            for term, stream in both
            if stream is not None and terms in (term, "both")
        ]

    def loss(rewritten: Mapping[str, Tensor], windows: Tensor, terms: Terms, low: bool) -> Tensor:
        found = quantized_run(rewritten, windows, low).to(measured)
        total = torch.zeros((), dtype=measured, device=device)
        for term, stream in terms_of(terms):
            with torch.no_grad():
                wanted = target(term, stream)[windows].to(device)
            total = total + (found - wanted.to(measured)).square().mean() / power
        return total

    def linear_loss(
        rewritten: Mapping[str, Tensor], windows: Tensor, terms: Terms, low: bool, restore: Restore
    ) -> Tensor:
        block, names = skeleton.blocks[index], list(schemes)
        with capturing_outputs(block, names) as found:
            quantized_run(rewritten, windows, low)
        total = torch.zeros((), dtype=measured, device=device)
        for _, stream in terms_of(terms):
            with torch.no_grad(), capturing_outputs(block, names) as wanted:
                skeleton.run(index, given_weights, stream[windows].to(device))
            for name in names:
                exact = wanted[name].to(measured)
                difference = restore(name, found[name].to(measured)) - exact
                total = total + difference.square().mean() / exact.square().mean().clamp(min=1e-30)
        return total / len(names)

    return BlockProblem(
        weights=weights,
        sites=plan.sites,
        schemes=schemes,
        heads=plan.heads,
        windows=given.shape[0],
        loss=loss,
        linear_loss=linear_loss,
        seed=plan.recipe.seed * 10_007 + index,
        report=report,
        low_is_quick=has_fast_bfloat16(device),
    )


def quantizing_trainably(
    skeleton: Skeleton, index: int, plan: Plan, known: Mapping[str, InputQuantizer] | None = None
) -> AbstractContextManager[None]:
    """Within this context block `index` runs with quantized inputs, queries, keys and values that gradients pass
    through; ranges are of the moment. known: quantizers of inputs, of which clipped ranges take their shares."""
    family = skeleton.family
    schemes = plan.block_schemes(skeleton.block_name(index))
    through = _Shared()
    inputs = {
        name: partial(through, scheme=scheme.activation, share=_share((known or {}).get(name)))
        for name, scheme in schemes.items()
        if scheme.activation is not None
    }
    heads = plan.attention[f"{skeleton.block_name(index)}.{family.attention}"]
    return quantizing(
        skeleton.blocks[index], inputs, family.attention, heads, fake_quantize_trainable
    )


def _share(quantizer: InputQuantizer | None) -> Tensor | None:
    clipped = quantizer is not None and quantizer.scheme.clipped
    return quantizer.scale if clipped and quantizer is not None else None


class _Shared:
    """Fake quantization, done once for layers that read the same tensor by the same scheme one after another."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, TensorScheme, Tensor] | None = None

    def __call__(self, x: Tensor, *, scheme: TensorScheme, share: Tensor | None) -> Tensor:
        if self._last is None or self._last[0] is not x or self._last[1] != scheme:
            ratios = None if share is None else (share, share)
            self._last = (x, scheme, fake_quantize_trainable(x, scheme, ratios))
        return self._last[2]
