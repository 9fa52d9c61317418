"""Statistics of what a block's linear layers are given, over the calibration stream.

Where the checkpoint is stored in half precision, as engines run it, the products of the block on the way to its
inputs are too, if that is quicker; sums are float32's. The streams themselves are exact.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from bitfold.models.skeleton import Skeleton
from bitfold.numerics import Scheme
from bitfold.part import Need
from bitfold.pipeline.hooks import (
    InputQuantizer,
    capturing_heads,
    quantizing,
    run_for_inputs,
)
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.streams import Streams, batches
from bitfold.runtime.attention import HeadName
from bitfold.runtime.device import has_fast_bfloat16
from bitfold.statistics import InputStatistics

__all__ = ["input_statistics"]


def input_statistics(
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    weights: Mapping[str, Tensor],
    streams: Streams,
    needs: frozenset[Need],
    *,
    inputs: Mapping[str, InputQuantizer] | None = None,
    original: Mapping[str, Tensor] | None = None,
    names: tuple[str, ...] | None = None,
) -> dict[str, InputStatistics]:
    """Statistics of the block's distinct inputs, by the name that stands for each; empty if nothing is needed.

    inputs: how layers' inputs are quantized; the statistics are then of what the layers multiply. original: weights
    with which the block computes what the original does, for `cross`. names: of the inputs, all of them if None.
    """
    stream = streams.original if plan.recipe.stream == "original" else streams.quantized
    if not needs or stream is None:
        return {}
    tokens = stream.shape[0] * stream.shape[1]
    names = names or tuple(shared[0] for shared in skeleton.family.inputs)
    if "heads" in needs:  # the attention has run when what it gives is there
        before, after = (shared[0] for shared in skeleton.family.inputs[:2])
        names = tuple(dict.fromkeys((*names, before, after)))
    statistics = {name: InputStatistics(needs, tokens) for name in names}
    exact: dict[str, Tensor] = {}

    def receiver(name: str) -> Callable[[Tensor], None]:
        def receive(x: Tensor) -> None:
            with torch.autocast(x.device.type, enabled=False):
                statistics[name].update(x, exact.get(name))

        return receive

    receivers = {name: receiver(name) for name in names}
    started = (
        batches(streams.original) if "cross" in needs and streams.original is not None else None
    )
    low = partial(
        torch.autocast,
        skeleton.device.type,
        torch.bfloat16,
        enabled=_may_be_low(skeleton, plan, stream),
    )
    for batch in batches(stream):
        if started is not None:
            assert original is not None
            with low():
                _keep_inputs(skeleton, index, original, next(started), names, exact)
        with (
            low(),
            _as_quantized(skeleton, index, plan, inputs),
            _looking_at_heads(skeleton, index, statistics, needs),
        ):
            run_for_inputs(
                skeleton.blocks[index],
                receivers,
                partial(skeleton.run, index, weights, batch.to(skeleton.device)),
            )
    return statistics


def _looking_at_heads(
    skeleton: Skeleton,
    index: int,
    statistics: Mapping[str, InputStatistics],
    needs: frozenset[Need],
) -> AbstractContextManager[None]:
    """Within this context the block's queries and keys add to the statistics of the input they are made of."""
    if "heads" not in needs:
        return nullcontext()
    of_input = statistics[skeleton.family.inputs[0][0]]

    def receive(name: HeadName, x: Tensor) -> None:
        if name != "value":
            with torch.autocast(x.device.type, enabled=False):
                of_input.update_heads(name, x)

    return capturing_heads(skeleton.blocks[index], skeleton.family.attention, receive)


def _may_be_low(skeleton: Skeleton, plan: Plan, stream: Tensor) -> bool:
    stored_low = plan.storage in (torch.bfloat16, torch.float16)
    return stored_low and stream.dtype == torch.float32 and has_fast_bfloat16(skeleton.device)


def _keep_inputs(
    skeleton: Skeleton,
    index: int,
    weights: Mapping[str, Tensor],
    batch: Tensor,
    names: tuple[str, ...],
    kept: dict[str, Tensor],
) -> None:
    def keeper(name: str) -> Callable[[Tensor], None]:
        def keep(x: Tensor) -> None:
            kept[name] = x

        return keep

    run_for_inputs(
        skeleton.blocks[index],
        {name: keeper(name) for name in names},
        partial(skeleton.run, index, weights, batch.to(skeleton.device)),
    )


@contextmanager
def _as_quantized(
    skeleton: Skeleton, index: int, plan: Plan, inputs: Mapping[str, InputQuantizer] | None
) -> Iterator[None]:
    """The block with quantized inputs, queries, keys and values; as it is where `inputs` is None."""
    family = skeleton.family
    heads = plan.attention[f"{skeleton.block_name(index)}.{family.attention}"]
    block = skeleton.blocks[index]
    with quantizing(block, inputs or {}, family.attention, Scheme() if inputs is None else heads):
        yield
