"""Codebooks of an attention's values: product quantization per KV head, learned on the calibration stream.

A run of `dim` dimensions of a head has a codebook of its own, static and stored; a value is the indices of its nearest
entries, with no scale beside them (Jégou et al. 2011, IEEE TPAMI 33).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from bitfold.models.skeleton import Skeleton
from bitfold.numerics import CodebookShape, Scheme
from bitfold.pipeline.hooks import InputQuantizer, capturing_values, quantizing
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.streams import Streams, batches
from bitfold.rounding.kmeans import first_entries, kmeans
from bitfold.statistics import widened

__all__ = ["learned_values"]

_TOKENS = 16384
_STEPS = 20


@torch.no_grad()
def learned_values(
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    shape: CodebookShape,
    weights: Mapping[str, Tensor],
    streams: Streams,
    inputs: Mapping[str, InputQuantizer],
) -> Tensor:
    """The codebook [books, entries, dim] of the values of block `index`, as `quantize_values` takes it, in the dtype of
    storage.

    weights: of the quantized block. It learns from about `_TOKENS` tokens, evenly spaced over the quantized stream.
    """
    family = skeleton.family
    stream = streams.quantized
    assert stream is not None
    every = max(1, stream.shape[0] * stream.shape[1] // _TOKENS)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> None:
        kept.append(widened(x.transpose(1, 2).flatten(0, 1).flatten(1)[::every]))

    block = skeleton.blocks[index]
    for part in batches(stream):
        with (
            quantizing(block, inputs, family.attention, Scheme()),
            capturing_values(block, family.attention, keep),
        ):
            skeleton.run(index, weights, part.to(skeleton.device))
    points = torch.cat(kept).unflatten(1, (-1, shape.dim)).transpose(0, 1).contiguous()
    eye = torch.eye(shape.dim, dtype=points.dtype, device=points.device)
    first = first_entries(points, shape.books, shape.entries)
    ones = points.new_ones(points.shape[1])
    books = kmeans(points, eye.expand(len(points), -1, -1), ones, first, _STEPS)
    return books.to(plan.storage)
