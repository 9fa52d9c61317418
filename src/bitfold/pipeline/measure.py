"""Statistics of what a block's linear layers are given, over the calibration stream."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from bitfold.models.skeleton import Skeleton
from bitfold.numerics import Scheme
from bitfold.part import Need
from bitfold.pipeline.hooks import InputQuantizer, quantizing, run_for_inputs
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.streams import Streams, batches
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
    statistics = {name: InputStatistics(needs, tokens) for name in names}
    exact: dict[str, Tensor] = {}

    def receiver(name: str) -> Callable[[Tensor], None]:
        return lambda x: statistics[name].update(x, exact.get(name))

    receivers = {name: receiver(name) for name in names}
    started = (
        batches(streams.original) if "cross" in needs and streams.original is not None else None
    )
    for batch in batches(stream):
        if started is not None:
            assert original is not None
            _keep_inputs(skeleton, index, original, next(started), names, exact)
        with _as_quantized(skeleton, index, plan, inputs):
            run_for_inputs(
                skeleton.blocks[index],
                receivers,
                partial(skeleton.run, index, weights, batch.to(skeleton.device)),
            )
    return statistics


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
