"""One step of the loop over blocks: quantize a block, and take the streams through it."""

from collections.abc import Callable

import torch
from torch import Tensor

from bitfold.errors import CheckpointError
from bitfold.pipeline.block import QuantizedBlock, quantize_block, run_quantized
from bitfold.pipeline.job import Job
from bitfold.pipeline.streams import Streams, advance

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

    def run_original(hidden: Tensor) -> Tensor:
        return skeleton.run(index, original, hidden)

    if streams.original is not None and "loss" in job.plan.recipe.needs:
        original = skeleton.load_block(index, job.dtype)
        streams.ahead = streams.original.clone()
        with torch.no_grad():
            advance(streams.ahead, run_original, skeleton.device)
        del original
    block = quantize_block(skeleton, index, job.plan, streams, job.dtype, report)
    run = run_quantized(skeleton, index, block, job.dtype)
    original = skeleton.load_block(index, job.dtype)

    advance(streams.probe_quantized, run, skeleton.device)
    advance(streams.probe_original, run_original, skeleton.device)
    if streams.quantized is not None:
        advance(streams.quantized, run, skeleton.device)
    if streams.ahead is not None:
        streams.original, streams.ahead = streams.ahead, None
    elif streams.original is not None:
        advance(streams.original, run_original, skeleton.device)
    name = skeleton.block_name(index)
    refuse_nonfinite(streams.probe_original, f"{name} of the original model", job)
    refuse_nonfinite(streams.probe_quantized, f"{name} of the quantized model", job)
    return block


def refuse_nonfinite(values: Tensor, what: str, job: Job) -> None:
    """Raises CheckpointError where `values`, the output of `what`, are not all finite."""
    if not torch.isfinite(values).all():
        dtype = str(job.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"The output of {what} ({job.model}) is not finite in {dtype}: "
            f"choose a wider --dtype{' or more bits' if 'quantized' in what else ''}."
        )
