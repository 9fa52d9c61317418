"""What an attention's queries, keys and values need of calibration text: static ranges, and codebooks of values.

Both are found on the stream through the quantized block, after its weights. Codebooks are product quantization per KV
head: a run of `dim` dimensions of a head has one of its own; a value is the indices of its nearest entries, with no
scale beside them (Jégou et al. 2011, IEEE TPAMI 33).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitfold.models.skeleton import Skeleton
from bitfold.numerics import CodebookShape, Scheme, TensorScheme, scale_and_zero
from bitfold.pipeline.hooks import InputQuantizer, capturing_heads, quantizing
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.streams import Streams, batches
from bitfold.rounding.kmeans import first_entries, kmeans
from bitfold.runtime.attention import HEAD_TENSORS, VALUE_CODEBOOK, HeadName
from bitfold.statistics import widened

__all__ = ["calibrated_heads"]

_TOKENS = 16384
_STEPS = 20


@dataclass
class _Seen:
    """Of queries, keys or values a sample [tokens, heads, head_dim], evenly spaced, and the extremes of all
    [heads, head_dim]."""

    every: int
    rows: list[Tensor] = field(default_factory=list)
    minimum: Tensor | None = None
    maximum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x: [batch, heads, tokens, head_dim]"""
        rows = widened(x.transpose(1, 2).flatten(0, 1))
        self.rows.append(rows[:: self.every])
        low, high = rows.amin(dim=0), rows.amax(dim=0)
        self.minimum = low if self.minimum is None else torch.minimum(self.minimum, low)
        self.maximum = high if self.maximum is None else torch.maximum(self.maximum, high)


@torch.no_grad()
def calibrated_heads(
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    heads: Scheme,
    weights: Mapping[str, Tensor],
    streams: Streams,
    inputs: Mapping[str, InputQuantizer],
) -> dict[str, Tensor]:
    """The tensors of block `index` that `runtime.attention.head_tensors` names, in the dtype of storage.

    weights: of the quantized block. Ranges and entries are found from about `_TOKENS` tokens, evenly spaced over the
    quantized stream; ranges that do not clip see the extremes of all.
    """
    schemes: dict[HeadName, TensorScheme] = {
        name: part
        for name in HEAD_TENSORS
        if (part := getattr(heads, name)) is not None and (part.static or part.codebook is not None)
    }
    if not schemes:
        return {}
    seen = _look(skeleton, index, weights, streams, inputs)
    found: dict[str, Tensor] = {}
    for name, scheme in schemes.items():
        if scheme.codebook is not None:
            rows = torch.cat(seen[name].rows).flatten(1)
            found[VALUE_CODEBOOK] = _codebook(rows, scheme.codebook).to(plan.storage)
        else:
            found |= _static(name, seen[name], scheme, plan)
    return found


def _look(
    skeleton: Skeleton,
    index: int,
    weights: Mapping[str, Tensor],
    streams: Streams,
    inputs: Mapping[str, InputQuantizer],
) -> dict[HeadName, _Seen]:
    """Queries, keys and values of the block, none of them quantized."""
    stream, family = streams.quantized, skeleton.family
    assert stream is not None
    every = max(1, stream.shape[0] * stream.shape[1] // _TOKENS)
    seen = {name: _Seen(every) for name in HEAD_TENSORS}
    block = skeleton.blocks[index]
    for part in batches(stream):
        with (
            quantizing(block, inputs, family.attention, Scheme()),
            capturing_heads(block, family.attention, lambda name, x: seen[name].add(x)),
        ):
            skeleton.run(index, weights, part.to(skeleton.device))
    return seen


def _static(name: HeadName, seen: _Seen, scheme: TensorScheme, plan: Plan) -> dict[str, Tensor]:
    """Scale and zero-point of what shares one, in shapes that broadcast over [batch, heads, tokens, head_dim]."""
    assert seen.minimum is not None
    assert seen.maximum is not None
    # The sample decides the range; the extremes of the whole stream are added for ranges that do not clip.
    values = torch.cat([*seen.rows, seen.minimum[None], seen.maximum[None]])
    if scheme.granularity == "channel":
        groups = values.permute(1, 2, 0)[:, None]
    elif scheme.granularity == "head":
        groups = values.transpose(0, 1).flatten(1)[:, None, None]
    else:
        groups = values.flatten()[None, None, None]
    low, high = plan.recipe.activation_range.limits(groups.contiguous(), scheme)
    scale, zero = scale_and_zero(low, high, scheme, plan.storage)
    found = {f"{name}_scale": scale.squeeze(-1).to(plan.storage)}
    if zero is not None:
        found[f"{name}_zero_point"] = zero.squeeze(-1).to(torch.int8)
    return found


def _codebook(rows: Tensor, shape: CodebookShape) -> Tensor:
    """The codebook [books, entries, dim] of values [tokens, heads · head_dim], as `quantize_values` takes it."""
    points = rows.unflatten(1, (-1, shape.dim)).transpose(0, 1).contiguous()
    eye = torch.eye(shape.dim, dtype=points.dtype, device=points.device)
    first = first_entries(points, shape.books, shape.entries)
    ones = points.new_ones(points.shape[1])
    return kmeans(points, eye.expand(len(points), -1, -1), ones, first, _STEPS)
