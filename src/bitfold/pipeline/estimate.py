"""What a run would take: disk from the schemes, time and memory from a trial on the first block."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from bitfold.evaluate.memory import peak_rss_mb
from bitfold.pipeline.block import quantize_block, run_quantized
from bitfold.pipeline.disk import artifact_bytes, working_bytes
from bitfold.pipeline.job import Job
from bitfold.pipeline.streams import Streams, advance

__all__ = ["Estimate", "estimate"]

TRIAL_WINDOWS = (1, 4)


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(job: Job) -> Estimate:
    """Quantize the first block with few windows, twice, and extend the line through both times."""
    blocks = len(job.skeleton.blocks)
    streams = job.start_streams()
    windows = 0 if streams.quantized is None else streams.quantized.shape[0]
    trials = [min(count, windows) for count in TRIAL_WINDOWS]
    _trial(job, streams, trials[0])  # the first one also pays for what is made once
    seconds = [_trial(job, streams, count) for count in trials]
    slope = (seconds[1] - seconds[0]) / max(1, trials[1] - trials[0])
    per_block = seconds[0] + max(0.0, slope) * max(0, windows - trials[0])
    size = artifact_bytes(job)
    return Estimate(
        seconds=per_block * blocks + job.skeleton.checkpoint.nbytes / 1e9,
        peak_rss_mb=peak_rss_mb(),
        size_bytes=size,
        disk_bytes=size + working_bytes(job),
        blocks=blocks,
        quantized_layers=len(job.plan.layout.linears),
        format=str(job.plan.format.config(job.plan.layout, job.plan.choice)["quant_method"]),
    )


def _trial(job: Job, streams: Streams, windows: int) -> float:
    """Seconds that the first block takes with so many windows."""
    few = Streams(
        streams.probe_original,
        streams.probe_quantized.clone(),
        None if streams.original is None else streams.original[:windows].clone(),
        None if streams.quantized is None else streams.quantized[:windows].clone(),
    )
    start = time.perf_counter()
    block = quantize_block(job.skeleton, 0, job.plan, few, job.dtype)
    if few.quantized is not None:
        run = run_quantized(job.skeleton, 0, block, job.dtype)
        advance(few.quantized, run, job.skeleton.device)
    return time.perf_counter() - start
