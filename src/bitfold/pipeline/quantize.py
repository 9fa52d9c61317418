"""The main job: a checkpoint and a recipe in, an artifact out, one block in memory at a time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitfold.allocation import Budget, Mixed
from bitfold.errors import BitfoldError, OutputError, RecipeError
from bitfold.export.artifact import shard_name, tensor_sums
from bitfold.export.fitting import check_engines, usual_scheme
from bitfold.models.checkpoint import tensor_bytes
from bitfold.pipeline.allocate import allocate
from bitfold.pipeline.asked import resolve_recipe, several
from bitfold.pipeline.bases import take_bases
from bitfold.pipeline.block import QuantizedBlock
from bitfold.pipeline.disk import check_disk
from bitfold.pipeline.distill import learn, put_in
from bitfold.pipeline.estimate import Estimate, estimate
from bitfold.pipeline.fitted import fitted, recipe_for, refuse_whatever_the_bits
from bitfold.pipeline.job import Job, prepare
from bitfold.pipeline.outer import outer_tensors, outer_weights
from bitfold.pipeline.probe import Probe, probe_report
from bitfold.pipeline.publish import publish
from bitfold.pipeline.result import Quantization, read_result
from bitfold.pipeline.sensitivity import Store
from bitfold.pipeline.shards import block_tensors, check_shard
from bitfold.pipeline.step import refuse_nonfinite, step
from bitfold.pipeline.streams import Streams
from bitfold.pipeline.taught import Taught, stored_tensors
from bitfold.pipeline.turned import TurnedSkeleton
from bitfold.pipeline.verify import verify_blocks
from bitfold.pipeline.workdir import Workdir, finished_request, refuse_foreign
from bitfold.recipe import Recipe

__all__ = ["Progress", "Quantization", "quantize"]

Progress = Callable[[float, int, str], None]
"""Called with the number of blocks done (a fraction within one), the number of all, and what is being done."""


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: str | None = None,
    effort: str | None = None,
    scheme: str | None = None,
    recipe: Recipe | str | Path | None = None,
    set: str | Sequence[str] = (),
    calibration: str | Path | Sequence[str | Path] = (),
    samples: int = 128,
    sequence_length: int | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    ignore: str | Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    bits: float | None = None,
    fit: str | int | None = None,
    latency: float | None = None,
    mixed: Mixed | None = None,
    meant_for: str | Sequence[str] = (),
    taught: Taught | None = None,
    progress: Progress | None = None,
) -> Quantization | Estimate:
    """Quantize a checkpoint into the directory `out`.

    model: a local directory, or a name on the hub. method, effort, scheme, set, ignore, seed: as in `Recipe.make`;
    recipe: a finished `Recipe`, or a file. calibration: .txt, .jsonl or .npy files; without any the embedded text is
    used; `generate` lets the model write its own, `random` draws tokens.
    dtype: in which the calibration and the simulation run (`auto`: float32 on the CPU). A killed run goes on where it
    was unless `resume` is false. With `dry_run` nothing is written and an `Estimate` comes back.

    bits, fit, latency: find the bits of every layer that hurt least within a budget: mean bits per weight, size of the
    whole artifact (`3.5GB`), seconds by a table; they replace those of the scheme's weights. mixed: how
    they are looked for.

    meant_for: engines and formats that the result will be taken to (`export.fitting.ENGINES`): what does not fit them
    is said before anything is computed, scales are in the precision that they store, and without a scheme it is
    the one that suits them.

    taught: weights that were trained elsewhere (`bitfold.train_qat`), which take the place of what is rounded.

    >>> bitfold.quantize("llama-3.2-1b", "llama-w4", method="awq", scheme="w4a16g128")  # doctest: +SKIP

    Raises a BitfoldError, one clear sentence, for anything wrong with input, recipe or machine.
    """
    start = time.perf_counter()
    engines = several(meant_for)
    check_engines(engines)
    usual = usual_scheme(engines)
    if usual is not None and scheme is None and recipe is None:
        scheme, set = usual[0], (*usual[1], *several(set))
    recipe = recipe_for(resolve_recipe(recipe, method, scheme, set, ignore, seed, effort), engines)
    budget = Budget.make(bits, fit, latency)
    if budget is None and mixed is not None:
        raise RecipeError("Bits are looked for within a budget: give --bits, --fit or --latency.")
    out = Path(out).expanduser().absolute()
    refuse_foreign(out)
    files = [Path(file) for file in several(calibration)]
    report = progress or (lambda done, total, what: None)
    job = prepare(
        str(model),
        out,
        recipe,
        calibration=files,
        samples=samples,
        sequence_length=sequence_length,
        device=device,
        dtype=dtype,
        report=report,
    )
    if budget is not None:
        if uniform := sorted({"gptq", "awq"}.intersection(engines)):
            raise RecipeError(
                f"{uniform[0]} has one scheme for all layers: leave the budget out, or {uniform[0]}."
            )
        refuse_whatever_the_bits(job, engines)
        job = allocate(job, budget, mixed or Mixed(), files, keep=not dry_run, report=report)
    job = fitted(job, engines)
    if taught is not None:
        job = replace(job, request=taught.request(job.request))
    finished = finished_request(out)
    if finished not in (None, job.request) and not overwrite:
        raise OutputError(
            f"{out} holds an artifact of another recipe, checkpoint or calibration: "
            "add --overwrite to replace it, or choose another -o."
        )
    if dry_run:
        with torch.no_grad():
            return estimate(job, start)
    workdir = Workdir(out)
    if finished and not overwrite:
        workdir.tidy()
        return read_result(job, seconds=0.0, resumed_blocks=None, finished_before=True)
    check_disk(job)
    with torch.no_grad(), workdir.opened(job.request):
        try:
            resumed = _run(job, workdir, resume, report, taught)
        except OutputError:
            raise  # what is finished stays: with room on the disk the run goes on
        except BitfoldError:
            workdir.discard()
            raise
    if budget is not None:
        Store(out).discard()
    return read_result(job, seconds=time.perf_counter() - start, resumed_blocks=resumed)


def _run(
    job: Job, workdir: Workdir, resume: bool, report: Progress, taught: Taught | None = None
) -> int:
    """Quantize every block that is not done yet, verify the whole and publish it; returns how many were done."""
    skeleton, plan, dtype = job.skeleton, job.plan, job.dtype
    count = len(skeleton.blocks)
    if not resume:
        workdir.restart()
    take_bases(
        job, workdir, lambda done, total, what: report(0, count, f"{what} ({done} of {total})")
    )
    streams = _resumed_streams(workdir)
    if streams is None:
        workdir.restart(keep_bases=True)
        streams = job.start_streams()
    resumed = len(workdir.blocks)
    workdir.write_tensors(shard_name(0, count + 1), outer_tensors(skeleton, plan))
    for index in range(resumed, count):
        here = f"block {index + 1} of {count}"
        report(index, count, here)
        block = step(job, index, streams, _within(report, index, count, here))
        name = shard_name(index + 1, count + 1)
        tensors = block_tensors(skeleton, index, plan, block)
        workdir.write_tensors(name, tensors)
        check_shard(workdir.path / name, skeleton, index, plan, block)
        workdir.finish_block(_block_entry(job, index, block, name, tensors), streams.save)
    learned = _distil(job, workdir, streams, report, taught)
    # Embeddings and head are the largest tensors of many models: no name keeps them while others are read.
    logits = skeleton.head(
        outer_weights(plan, outer_tensors(skeleton, plan, learned), dtype),
        streams.probe_quantized.to(skeleton.device),
    )
    original = skeleton.head(skeleton.load_outer(dtype), streams.probe_original.to(skeleton.device))
    refuse_nonfinite(original, "the original model", job)
    refuse_nonfinite(logits, "the quantized model", job)
    if isinstance(skeleton, TurnedSkeleton):
        skeleton.check(job.probe, original, dtype)
    verify_blocks(
        job,
        workdir.path,
        logits,
        lambda done: report(count, count, f"verifying block {done + 1} of {count}"),
    )
    distance = probe_report(job.probe, logits, original)
    publish(job, workdir, Probe.of(job.probe, logits, dtype), distance, learned)
    report(count, count, "done")
    return resumed


def _distil(
    job: Job, workdir: Workdir, streams: Streams, report: Progress, taught: Taught | None
) -> dict[str, Tensor]:
    """Distil the model in the shards where the recipe asks for it, or take what was taught, unless a killed run did;
    returns the tensors that were learned and put into the shards. The streams of calibration windows are let go."""
    if job.plan.recipe.distillation is None and taught is None:
        return {}
    count = len(job.skeleton.blocks)

    def say(done: int, total: int, what: str) -> None:
        report(count, count, f"{what} ({done} of {total})")

    if workdir.distilled is None and taught is not None:
        tensors = stored_tensors(job, taught)
        workdir.finish_distillation({**taught.entry, "sums": tensor_sums(tensors)}, tensors)
    elif workdir.distilled is None:
        learn(job, workdir, streams, say)
    streams.original = streams.quantized = None
    learned = {name: value.clone() for name, value in load_file(workdir.learned).items()}
    streams.probe_quantized = put_in(job, workdir, learned, say)
    return learned


def _resumed_streams(workdir: Workdir) -> Streams | None:
    """The streams where a killed run of the same request stopped; None unless all that it recorded is intact."""
    if not workdir.blocks:
        return None
    learned = {} if workdir.distilled is None else workdir.distilled["sums"]
    try:
        if workdir.distilled is not None and tensor_sums(load_file(workdir.learned)) != learned:
            return None
        for entry in workdir.blocks:
            sums = entry["sums"]
            new = sums | {name: learned[name] for name in sums if name in learned}
            if tensor_sums(load_file(workdir.path / entry["shard"])) not in (sums, new):
                return None
        return Streams.restore(workdir.streams)
    except (OSError, SafetensorError, KeyError):
        return None


def _within(report: Progress, index: int, count: int, here: str) -> Callable[[int, int, str], None]:
    """Reports a fit's progress inside block `index` as part of the whole."""

    def inner(done: int, total: int, what: str) -> None:
        report(index + done / total, count, f"{here}, {what}")

    return inner


def _block_entry(
    job: Job, index: int, block: QuantizedBlock, shard: str, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What state and report say of a block."""
    prefix = job.skeleton.block_name(index)
    layers = [
        {
            "name": f"{prefix}.{name}",
            "scheme": job.plan.schemes[f"{prefix}.{name}"].notation,
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
        "weights": sum(tensor.shape.numel() for tensor in block.tensors.values()),
        "folding_error": block.folding_error,
        "fits": block.fits,
        "notes": [f"{prefix}: {note}" for note in block.notes],
        "layers": layers,
    }
