"""How much each candidate hurts: KL(original ‖ model) where one group of layers alone is rounded to it, measured.

The windows go through the original once. From the first block that a group touches on, one stream of them for every
candidate goes through the remaining blocks, all these streams together, so that a block's weights are read once for
all of them. Peak memory: a block, what stands outside the blocks, (groups that start at a block) · candidates streams,
and what the caller keeps to round a block. Only weights are rounded, by what the caller brings: inputs are quantized
alike whatever the choice.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.allocation.candidates import Candidate, LayerGroup
from bitfold.evaluate.statistics import token_statistics
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import TensorScheme

__all__ = ["Measured", "RoundedLayers", "Rounder", "measure"]

Measured = dict[str, dict[str, float]]
"""Name of the group → name of the candidate → mean KL in nats per token; a candidate whose logits are not finite is
not there."""

RoundedLayers = Callable[[Sequence[str], TensorScheme], dict[str, Tensor]]
"""Layers of a block by name, and a scheme → their weights once rounded, [out, in] each."""

Rounder = Callable[[int, Mapping[str, Tensor], Tensor], RoundedLayers]
"""A block's index, its weights, and what the original is given there [windows, length, hidden] → how its layers are
rounded."""

_TOKENS_PER_BATCH = 2048


@dataclass
class _Stream:
    """Hidden states [windows, length, hidden] of the model in which one group is rounded to one candidate."""

    group: LayerGroup
    candidate: Candidate
    hidden: Tensor


@torch.no_grad()
def measure(
    skeleton: Skeleton,
    choices: Mapping[LayerGroup, Sequence[Candidate]],
    tokens: Tensor,
    *,
    dtype: torch.dtype,
    rounder: Rounder,
    known: Measured | None = None,
    save: Callable[[Measured], None] = lambda measured: None,
    report: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Measured:
    """Mean KL to the original over the predicted tokens of windows [windows, length], for every candidate of every
    group.

    rounder: how layers are rounded. known: what an earlier run measured; save: is given all that is measured after
    every block. report: number of passes through a block done, of all, and what is being measured.
    """
    measured = dict(known or {})
    waiting: dict[int, list[LayerGroup]] = {}
    for group in choices:
        if group.name not in measured:
            waiting.setdefault(group.first, []).append(group)
    if not waiting:
        return measured
    count = len(skeleton.blocks)
    passes = {
        first: (count - first) * sum(len(_rounding(choices[group])) for group in groups)
        for first, groups in waiting.items()
    }
    outer = skeleton.load_outer(dtype)
    parts = [skeleton.embed(outer, part.to(skeleton.device)).cpu() for part in _batches(tokens)]
    before, last = torch.cat(parts), torch.cat(parts)
    for index in range(count):
        _advance(skeleton, index, skeleton.load_block(index, dtype), last)
    done, here = 0, 0
    for first, groups in sorted(waiting.items()):
        for index in range(here, first):
            _advance(skeleton, index, skeleton.load_block(index, dtype), before)
        here = first
        streams = [
            _Stream(group, candidate, before.clone())
            for group in groups
            for candidate in _rounding(choices[group])
        ]
        given = before
        for index in range(first, count):
            weights = skeleton.load_block(index, dtype)
            layers = rounder(index, weights, given) if _touched(groups, index) else None
            for stream in streams:
                report(done, sum(passes.values()), f"sensitivity of block {first + 1} of {count}")
                rounded = weights if layers is None else _rounded(weights, stream, index, layers)
                _advance(skeleton, index, rounded, stream.hidden)
                done += 1
            if any(_touched(groups, later) for later in range(index + 1, count)):
                given = given.clone()
                _advance(skeleton, index, weights, given)
        measured |= {
            group.name: {c.name: 0.0 for c in choices[group] if c.scheme is None}
            for group in groups
        }
        for stream, kl in zip(streams, _divergences(skeleton, outer, last, streams), strict=True):
            if math.isfinite(kl):
                measured[stream.group.name][stream.candidate.name] = kl
        save(measured)
    return measured


def _rounding(choices: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that change anything."""
    return [candidate for candidate in choices if candidate.scheme is not None]


def _touched(groups: Sequence[LayerGroup], index: int) -> bool:
    """Whether one of the groups has layers in a block."""
    return any(group.within(index) for group in groups)


def _rounded(
    weights: Mapping[str, Tensor], stream: _Stream, index: int, layers: RoundedLayers
) -> dict[str, Tensor]:
    """A block's weights, those of the group rounded."""
    scheme = stream.candidate.scheme
    assert scheme is not None
    values = layers(stream.group.within(index), scheme)
    return dict(weights) | {f"{name}.weight": value for name, value in values.items()}


def _advance(skeleton: Skeleton, index: int, weights: Mapping[str, Tensor], hidden: Tensor) -> None:
    """Replace hidden states by what a block makes of them, in place."""
    for part in _batches(hidden):
        part.copy_(skeleton.run(index, weights, part.to(skeleton.device)))


def _divergences(
    skeleton: Skeleton, outer: Mapping[str, Tensor], last: Tensor, streams: Sequence[_Stream]
) -> list[float]:
    """The mean KL of every stream, from the original's hidden states behind the last block; window by window, since
    logits are large, and the original's are made once for all streams."""
    sums = [0.0] * len(streams)
    predicted = last.shape[0] * (last.shape[1] - 1)
    for window in range(last.shape[0]):
        original = _logits(skeleton, outer, last[window])
        tokens = torch.zeros(len(original), dtype=torch.long, device=original.device)
        for index, stream in enumerate(streams):
            logits = _logits(skeleton, outer, stream.hidden[window])
            kl = token_statistics(logits, original, tokens).kl
            assert kl is not None
            # What is left of a rounding error may be below zero by the last digit.
            sums[index] += float(kl.clamp(min=0).sum())
    return [value / predicted for value in sums]


def _logits(skeleton: Skeleton, outer: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Logits [length − 1, vocabulary] of the positions that predict a token of the window."""
    return skeleton.head(outer, hidden.unsqueeze(0).to(skeleton.device))[0, :-1]


def _batches(windows: Tensor) -> Iterator[Tensor]:
    """Slices of [windows, length, …]; writing to one writes to the whole."""
    yield from windows.split(max(1, _TOKENS_PER_BATCH // windows.shape[1]))
