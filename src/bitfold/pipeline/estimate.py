"""What a run would take: disk from the formats, time and memory from trials on the first block."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from bitfold.distillation import split_windows
from bitfold.evaluate.memory import peak_rss_mb
from bitfold.export.artifact import tensor_sums
from bitfold.pipeline.block import run_quantized
from bitfold.pipeline.disk import artifact_bytes, working_bytes
from bitfold.pipeline.job import Job
from bitfold.pipeline.shards import block_from_tensors, block_tensors
from bitfold.pipeline.step import step
from bitfold.pipeline.streams import Streams
from bitfold.statistics import ROWS
from bitfold.transforms.spinquant import CHECKS

__all__ = ["Estimate", "estimate"]

# What reading, hashing and writing files of the page cache take together, beside all else.
BYTES_PER_SECOND = 3e8


@dataclass(frozen=True)
class Estimate:
    """seconds: the whole run; peak_rss_mb: resident memory; size_bytes: the artifact; disk_bytes: while it grows."""

    seconds: float
    peak_rss_mb: float
    size_bytes: int
    disk_bytes: int
    blocks: int
    quantized_layers: int
    format: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def estimate(job: Job, start: float) -> Estimate:
    """Take the first block through all that the loop does, with few windows and with twice as many, and extend the
    line through both times. start: when preparing began, on the clock of `time.perf_counter`."""
    streams = job.start_streams()
    prepared = time.perf_counter()
    windows, length = (0, 1) if job.stream_tokens is None else job.stream_tokens.shape
    # Solvers look at no more than ROWS inputs: only beyond as many tokens does time grow evenly.
    few = min(windows, -(-ROWS // length))
    more = min(windows, 2 * few)
    cold, short, long = (_trial(job, streams, count) for count in (few, few, more))
    slope = max(0.0, long - short) / max(1, more - few)
    per_block = short + slope * (windows - few)
    blocks = len(job.skeleton.blocks)
    size = artifact_bytes(job)
    return Estimate(
        # The first block also pays for what is made once.
        seconds=(prepared - start)
        + max(0.0, cold - short)
        + per_block * blocks
        + _training(job, streams)
        + (job.skeleton.checkpoint.nbytes + size) / BYTES_PER_SECOND,
        peak_rss_mb=peak_rss_mb(),
        size_bytes=size,
        disk_bytes=size + working_bytes(job),
        blocks=blocks,
        quantized_layers=len(job.plan.layout.linears),
        format=str(job.plan.format.config(job.plan.layout, job.plan.choice)["quant_method"]),
        notes=job.notes,
    )


def _training(job: Job, streams: Streams) -> float:
    """Seconds that what trains the whole model takes if it does not stop before, from a window through the first block
    as it is and through the head: learned rotations, distillation."""
    options, windows = job.plan.recipe.distillation, streams.quantized
    rotation = job.plan.recipe.learned_rotation
    if windows is None or (options is None and rotation is None):
        return 0.0
    skeleton, blocks = job.skeleton, len(job.skeleton.blocks)
    start = time.perf_counter()
    weights = skeleton.load_block(0, job.dtype)
    turned = time.perf_counter() - start
    outer = skeleton.load_outer(job.dtype)
    window = windows[:1].to(skeleton.device)
    start = time.perf_counter()
    skeleton.run(0, weights, window)
    block = time.perf_counter() - start
    skeleton.head(outer, window).log_softmax(dim=-1)
    head = time.perf_counter() - start - block
    seconds = 0.0
    if options is not None:
        learning, checking = options.passes(windows.shape[0])
        seconds += _passes(learning, checking, blocks * block, head)
    if rotation is not None:
        checks = CHECKS + 1
        _, held_back = split_windows(windows.shape[0], rotation.held_back, seed=0)
        learning = rotation.steps * rotation.batch
        seconds += _passes(learning, checks * len(held_back), blocks * block, head)
        # All windows go through the original, once for statistics; a step turns weights forward, again, and back.
        seconds += 2 * windows.shape[0] * blocks * block
        seconds += (4 * rotation.steps + checks) * blocks * turned
    return seconds


def _passes(learning: int, checking: int, blocks: float, head: float) -> float:
    """Seconds of so many windows: forward, and where they are learned from once more with a graph, and twice that back;
    the head is run for the original too."""
    return learning * 4 * (blocks + head) + checking * (blocks + 2 * head)


def _trial(job: Job, streams: Streams, windows: int) -> float:
    """Seconds that the first block takes with so many windows, reading it back and verifying it included."""
    few = Streams(
        streams.probe_original.clone(),
        streams.probe_quantized.clone(),
        None if streams.original is None else streams.original[:windows].clone(),
        None if streams.quantized is None else streams.quantized[:windows].clone(),
    )
    start = time.perf_counter()
    block = step(job, 0, few)
    tensors = block_tensors(job.skeleton, 0, job.plan, block)
    tensor_sums(tensors)
    block_from_tensors(job.skeleton, 0, job.plan, tensors)
    again = block_from_tensors(job.skeleton, 0, job.plan, tensors)
    run_quantized(job.skeleton, 0, again, job.dtype)(few.probe_quantized.to(job.skeleton.device))
    return time.perf_counter() - start
