"""One step of the loop over blocks: quantize a block, and take the streams through it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bitfold.errors import CheckpointError
from bitfold.pipeline.block import QuantizedBlock, quantize_block, run_quantized
from bitfold.pipeline.job import Job
from bitfold.pipeline.streams import Streams, advance
from bitfold.runtime.device import quick_float32

__all__ = ["refuse_nonfinite", "step"]


def step(
    job: Job,
    index: int,
    streams: Streams,
    report: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> QuantizedBlock:
    """Quantize block `index`, and replace the streams before it by those after it.

    Raises CheckpointError where a block's output is not finite: at the block, not hours later at the logits.
    """
    skeleton = job.skeleton
    name = skeleton.block_name(index)
    # What the original gives is known first: a block is held against it, and nothing is fitted to what is not finite.
    following = streams.probe_original.clone()
    _advance_original(job, index, following)
    if streams.original is not None and "loss" in job.plan.recipe.needs:
        streams.ahead = streams.original.clone()
        with quick_float32():
            _advance_original(job, index, streams.ahead)
    refuse_nonfinite(following, f"{name} of the original model", job)

    block = quantize_block(skeleton, index, job.plan, streams, job.dtype, report)
    run = run_quantized(skeleton, index, block, job.dtype)
    advance(streams.probe_quantized, run, skeleton.device)
    refuse_nonfinite(streams.probe_quantized, f"{name} of the quantized model", job)
    streams.probe_original = following
    with quick_float32():
        if streams.quantized is not None:
            advance(streams.quantized, run, skeleton.device)
        if streams.ahead is not None:
            streams.original, streams.ahead = streams.ahead, None
        elif streams.original is not None:
            _advance_original(job, index, streams.original)
    return block


@torch.no_grad()
def _advance_original(job: Job, index: int, stream: Tensor) -> None:
    """Replace a stream by what the original's block makes of it, in place."""
    weights = job.skeleton.load_block(index, job.dtype)
    advance(stream, partial(job.skeleton.run, index, weights), job.skeleton.device)


def refuse_nonfinite(values: Tensor, what: str, job: Job) -> None:
    """Raises CheckpointError where `values`, the output of `what`, are not all finite."""
    if not torch.isfinite(values).all():
        dtype = str(job.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"The output of {what} ({job.model}) is not finite in {dtype}: "
            f"choose a wider --dtype{' or more bits' if 'quantized' in what else ''}."
        )
