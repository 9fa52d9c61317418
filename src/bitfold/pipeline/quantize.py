"""The main job: a checkpoint and a recipe in, an artifact out, one block in memory at a time."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.errors import BitfoldError, CheckpointError, DataError, OutputError
from bitfold.evaluate.memory import peak_rss_mb
from bitfold.export.artifact import shard_name, tensor_sums
from bitfold.models.checkpoint import tensor_bytes
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline.block import QuantizedBlock, quantize_block, run_quantized
from bitfold.pipeline.estimate import Estimate, estimate
from bitfold.pipeline.job import Job, check_disk, prepare, start_streams
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.probe import Probe, probe_report
from bitfold.pipeline.publish import Quantization, already_finished, publish
from bitfold.pipeline.shards import block_tensors, check_shard
from bitfold.pipeline.streams import Streams, advance
from bitfold.pipeline.verify import verify_blocks
from bitfold.pipeline.workdir import Workdir, finished_request, refuse_foreign, writing
from bitfold.recipe import Recipe

__all__ = ["Progress", "Quantization", "quantize"]

Progress = Callable[[float, int, str], None]
"""Called with the number of blocks done (a fraction within one), the number of all, and what is being done."""


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: str | None = None,
    scheme: str | None = None,
    recipe: Recipe | Path | None = None,
    set: Sequence[str] = (),
    calibration: Sequence[str | Path] = (),
    samples: int = 128,
    sequence_length: int | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    ignore: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Quantization | Estimate:
    """Quantize a checkpoint into the directory `out`.

    model: a local directory, or a name on the hub. method, scheme, set, ignore, seed: as in `Recipe.make`; recipe: a
    finished `Recipe`, or a file. calibration: .txt, .jsonl or .npy files; without any the embedded text is used.
    dtype: in which the calibration and the simulation run (`auto`: float32 on the CPU). A killed run goes on where it
    was unless `resume` is false. With `dry_run` nothing is written and an `Estimate` comes back.

    >>> bitfold.quantize("llama-3.2-1b", "llama-w4", method="awq", scheme="w4a16g128")  # doctest: +SKIP

    Raises a BitfoldError, one clear sentence, for anything wrong with input, recipe or machine.
    """
    start = time.perf_counter()
    report = progress or (lambda done, total, what: None)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.make(method, scheme, file=recipe, set=set, ignore=ignore, seed=seed)
    elif method or scheme or set or ignore:
        raise DataError("Give a finished Recipe, or method, scheme, set and ignore, not both.")
    out = Path(out).expanduser().absolute()
    refuse_foreign(out)
    job = prepare(str(model), out, recipe, calibration, samples, sequence_length, device, dtype)
    with torch.no_grad():
        streams = start_streams(job) if dry_run else None
        if streams is not None:
            return estimate(job.skeleton, job.plan, streams, job.dtype)
        finished = finished_request(out)
        if finished is not None and not overwrite:
            if finished == job.request:
                return already_finished(job)
            raise OutputError(
                f"{out} holds an artifact of another recipe, checkpoint or calibration: "
                "add --overwrite to replace it, or choose another -o."
            )
        check_disk(job)
        workdir = Workdir(out)
        with workdir.opened(job.request, resume=resume):
            try:
                probe = _run(job, workdir, report)
            except OutputError:
                raise  # what is finished stays: with room on the disk the run goes on
            except BitfoldError:
                workdir.discard()
                raise
            total = len(job.skeleton.blocks)
            summary = publish(job, workdir, probe)
            report(total, total, "done")
    return Quantization(
        **summary,
        seconds=time.perf_counter() - start,
        resumed_blocks=workdir.resumed,
        peak_rss_mb=peak_rss_mb(),
        notes=job.notes,
    )


def _run(job: Job, workdir: Workdir, report: Progress) -> Probe:
    """Quantize every block that is not done yet, and verify the whole; returns the probe of the simulation."""
    skeleton, plan, dtype = job.skeleton, job.plan, job.dtype
    count = len(skeleton.blocks)
    with writing(workdir.path):
        if workdir.done and workdir.streams.is_file():
            streams = Streams.restore(workdir.streams)
        else:
            workdir.done, workdir.blocks, workdir.resumed = 0, [], 0
            streams = start_streams(job)
            workdir.write_tensors(shard_name(0, count + 1), _outer_tensors(skeleton))
    for index in range(workdir.done, count):
        here = f"block {index + 1} of {count}"
        report(index, count, here)
        block = quantize_block(
            skeleton, index, plan, streams, dtype, _within(report, index, count, here)
        )
        _advance_streams(skeleton, index, block, streams, dtype)
        name = shard_name(index + 1, count + 1)
        tensors = block_tensors(skeleton, index, plan, block)
        workdir.write_tensors(name, tensors)
        check_shard(workdir.path / name, skeleton, index, plan, block)
        with writing(workdir.streams):
            streams.save(workdir.streams)
        workdir.finish_block(_block_entry(skeleton, index, plan, block, name, tensors))
    outer = skeleton.load_outer(dtype)
    logits = skeleton.head(outer, streams.probe_quantized.to(skeleton.device))
    original = skeleton.head(outer, streams.probe_original.to(skeleton.device))
    if not torch.isfinite(logits).all():
        raise CheckpointError(
            f"The quantized model gives logits that are not finite in {dtype}: "
            "use a wider --dtype, or check that the original model gives finite ones."
        )
    workdir.write_text("probe.json", json.dumps(probe_report(job.probe, logits, original)))
    verify_blocks(
        workdir.path,
        skeleton,
        plan,
        outer,
        job.probe,
        logits,
        dtype,
        lambda done: report(count, count, f"verifying block {done + 1} of {count}"),
    )
    return Probe.of(job.probe, logits, dtype)


def _within(report: Progress, index: int, count: int, here: str) -> Callable[[int, int, str], None]:
    """Reports a fit's progress inside block `index` as part of the whole."""

    def inner(done: int, total: int, what: str) -> None:
        report(index + done / total, count, f"{here}, {what}")

    return inner


def _advance_streams(
    skeleton: Skeleton, index: int, block: QuantizedBlock, streams: Streams, dtype: torch.dtype
) -> None:
    run = run_quantized(skeleton, index, block, dtype)
    original = skeleton.load_block(index, dtype)

    def run_original(hidden: Tensor) -> Tensor:
        return skeleton.run(index, original, hidden)

    advance(streams.probe_quantized, run, skeleton.device)
    advance(streams.probe_original, run_original, skeleton.device)
    if streams.quantized is not None:
        advance(streams.quantized, run, skeleton.device)
    if streams.original is not None:
        advance(streams.original, run_original, skeleton.device)


def _outer_tensors(skeleton: Skeleton) -> dict[str, Tensor]:
    """Embeddings, final norm, head: as stored, under the names transformers expects."""
    return skeleton.load_outer()


def _block_entry(
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    block: QuantizedBlock,
    shard: str,
    tensors: dict[str, Tensor],
) -> dict[str, Any]:
    """What the report says of a block."""
    prefix = skeleton.block_name(index)
    layers = [
        {
            "name": f"{prefix}.{name}",
            "scheme": plan.schemes[f"{prefix}.{name}"].notation,
            "relative_error": error,
            "bits_per_weight": block.tensors[name].bits_per_weight
            if name in block.tensors
            else None,
        }
        for name, error in block.errors.items()
    ]
    return {
        "shard": shard,
        "sums": tensor_sums(tensors),
        "bytes": tensor_bytes(tensors),
        "bits": sum(tensor.bits for tensor in block.tensors.values()),
        "weights": sum(tensor.codes.numel() for tensor in block.tensors.values()),
        "folding_error": block.folding_error,
        "fits": block.fits,
        "layers": layers,
    }
