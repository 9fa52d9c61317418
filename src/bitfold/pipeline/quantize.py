"""The main job: a checkpoint and a recipe in, an artifact out, one block in memory at a time."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.data import Calibration, default_sequence_length, load_calibration
from bitfold.errors import BitfoldError, CheckpointError, DataError, OutputError
from bitfold.evaluate.memory import peak_rss_mb
from bitfold.export.artifact import (
    copy_companions,
    index_json,
    model_card,
    package_versions,
    shard_name,
    tensor_sums,
)
from bitfold.models.checkpoint import Checkpoint, sha256_of, tensor_bytes
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline.block import QuantizedBlock, quantize_block, run_quantized
from bitfold.pipeline.estimate import Estimate, artifact_bytes, estimate
from bitfold.pipeline.plan import Plan, make_plan
from bitfold.pipeline.probe import PROBE_FILE, Probe, probe_report
from bitfold.pipeline.request import request_hash
from bitfold.pipeline.shards import block_tensors, check_shard
from bitfold.pipeline.streams import PROBE_LENGTH, PROBE_WINDOWS, Streams, advance
from bitfold.pipeline.verify import verify_blocks
from bitfold.pipeline.workdir import MARKER, Workdir, finished_request, refuse_foreign, writing
from bitfold.recipe import Recipe
from bitfold.runtime.checkpoint import find_checkpoint
from bitfold.runtime.device import resolve_device, resolve_dtype
from bitfold.runtime.load import load_tokenizer
from bitfold.version import VERSION

__all__ = ["Progress", "Quantization", "quantize"]

Progress = Callable[[int, int, str], None]
"""Called with the number of steps done, the number of all steps, and what is being done."""


@dataclass(frozen=True)
class Quantization:
    """What a run made and what it cost. `finished_before`: it was there already, nothing was done."""

    out: Path
    seconds: float
    resumed_blocks: int
    peak_rss_mb: float
    bits_per_weight: float
    size_bytes: int
    original_bytes: int
    method: str
    scheme: str
    format: str
    probe: dict[str, Any]
    layers: list[dict[str, Any]]
    notes: tuple[str, ...] = ()
    finished_before: bool = False
    usage: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {
            "out": str(self.out),
            "notes": list(self.notes),
            "usage": list(self.usage),
        }


@dataclass(frozen=True)
class _Job:
    """Everything a run has settled before its first block."""

    source: Path
    model: str
    out: Path
    skeleton: Skeleton
    plan: Plan
    calibration: Calibration | None
    probe: Tensor
    dtype: torch.dtype
    request: str
    notes: tuple[str, ...]


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
    job = _prepare(str(model), out, recipe, calibration, samples, sequence_length, device, dtype)
    with torch.no_grad():
        streams = _start_streams(job) if dry_run else None
        if streams is not None:
            return estimate(job.skeleton, job.plan, streams, job.dtype)
        finished = finished_request(out)
        if finished is not None and not overwrite:
            if finished == job.request:
                return _finished(job)
            raise OutputError(
                f"{out} holds an artifact of another recipe, checkpoint or calibration: "
                "add --overwrite to replace it, or choose another -o."
            )
        _check_disk(job)
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
            summary = _publish(job, workdir, probe)
            report(2 * total, 2 * total, "done")
    return Quantization(
        **summary,
        seconds=time.perf_counter() - start,
        resumed_blocks=workdir.resumed,
        peak_rss_mb=peak_rss_mb(),
        notes=job.notes,
    )


# -- before the first block --------------------------------------------------------------------------


def _prepare(
    model: str,
    out: Path,
    recipe: Recipe,
    calibration: Sequence[str | Path],
    samples: int,
    sequence_length: int | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
) -> _Job:
    source = find_checkpoint(model)
    if source.resolve() == out.resolve():
        raise OutputError(f"The output {out} is the model itself: choose another -o.")
    device = resolve_device(device)
    checkpoint = Checkpoint(source)
    skeleton = Skeleton(checkpoint, device)
    plan = make_plan(skeleton, recipe)
    resolved = resolve_dtype(dtype, device)
    compute = plan.storage if resolved == "auto" else resolved
    limit = getattr(skeleton.config, "max_position_embeddings", None)
    if sequence_length is not None and limit is not None and sequence_length > limit:
        raise DataError(
            f"A sequence length of {sequence_length} is more than the {limit} positions of the model: "
            f"choose at most {limit}."
        )
    length = (
        default_sequence_length(skeleton.config) if sequence_length is None else sequence_length
    )
    data: Calibration | None = None
    if recipe.calibrates or calibration:
        files = [Path(file) for file in calibration]
        needs_tokenizer = not files or any(file.suffix != ".npy" for file in files)
        data = load_calibration(
            files,
            load_tokenizer(source) if needs_tokenizer else None,
            samples=samples,
            sequence_length=length,
            seed=recipe.seed,
            vocab_size=skeleton.config.vocab_size,
        )
    notes = plan.notes + (data.notes if data else ())
    request = request_hash(checkpoint, recipe, data, compute, device)
    return _Job(
        source,
        model,
        out,
        skeleton,
        plan,
        data,
        _probe_tokens(skeleton, data),
        compute,
        request,
        notes,
    )


def _probe_tokens(skeleton: Skeleton, calibration: Calibration | None) -> Tensor:
    """Token ids [windows, length] of the probe: the first calibration windows, or random ones without text."""
    if calibration is not None:
        return calibration.tokens[:PROBE_WINDOWS, :PROBE_LENGTH].clone()
    limit = getattr(skeleton.config, "max_position_embeddings", PROBE_LENGTH)
    shape = (PROBE_WINDOWS, min(PROBE_LENGTH, limit))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, skeleton.config.vocab_size, shape, generator=generator)


def _start_streams(job: _Job) -> Streams:
    recipe = job.plan.recipe
    tokens = job.calibration.tokens if job.calibration is not None and recipe.calibrates else None
    outer = job.skeleton.load_outer(job.dtype)
    keep_original = recipe.stream == "original" or "loss" in recipe.needs
    return Streams.start(job.skeleton, outer, tokens, job.probe, keep_original=keep_original)


def _check_disk(job: _Job) -> None:
    needed = artifact_bytes(job.skeleton, job.plan)
    if job.calibration is not None and job.plan.recipe.calibrates:
        hidden = job.calibration.tokens.numel() * job.skeleton.config.hidden_size
        needed += 4 * hidden * job.dtype.itemsize
    parent = job.out.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"The run needs {needed / 1e9:.2f} GB of disk at {parent}, and {free / 1e9:.2f} GB are free: "
            "make room, or choose an -o on another disk."
        )


# -- block by block ----------------------------------------------------------------------------------


def _run(job: _Job, workdir: Workdir, report: Progress) -> Probe:
    """Quantize every block that is not done yet, and verify the whole; returns the probe of the simulation."""
    skeleton, plan, dtype = job.skeleton, job.plan, job.dtype
    count = len(skeleton.blocks)
    with writing(workdir.path):
        if workdir.done and workdir.streams.is_file():
            streams = Streams.restore(workdir.streams)
        else:
            workdir.done, workdir.blocks, workdir.resumed = 0, [], 0
            streams = _start_streams(job)
            workdir.write_tensors(shard_name(0, count + 1), _outer_tensors(skeleton))
    for index in range(workdir.done, count):
        report(index, 2 * count, f"block {index + 1} of {count}")
        block = quantize_block(skeleton, index, plan, streams, dtype)
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
    job.plan.recipe  # noqa: B018
    workdir.write_text("probe.json", json.dumps(probe_report(job.probe, logits, original)))
    verify_blocks(
        workdir.path,
        skeleton,
        plan,
        outer,
        job.probe,
        logits,
        dtype,
        lambda done: report(count + done, 2 * count, f"verifying block {done + 1} of {count}"),
    )
    return Probe.of(job.probe, logits, dtype)


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
        "layers": layers,
    }


# -- after the last block ----------------------------------------------------------------------------


def _publish(job: _Job, workdir: Workdir, probe: Probe) -> dict[str, Any]:
    """Write what stands beside the weights, give the artifact its name, and sum up."""
    skeleton, plan = job.skeleton, job.plan
    path, blocks = workdir.path, workdir.blocks
    total = len(blocks) + 1
    outer = skeleton.load_outer()
    shards = {shard_name(0, total): list(outer)} | {b["shard"]: list(b["sums"]) for b in blocks}
    weights_bytes = tensor_bytes(outer) + sum(block["bytes"] for block in blocks)
    probe_numbers = json.loads((path / "probe.json").read_text())
    (path / "probe.json").unlink()
    quantized = sum(block["weights"] for block in blocks)
    report = {
        "method": plan.recipe.method,
        "scheme": plan.recipe.scheme.notation,
        "bits_per_weight": sum(block["bits"] for block in blocks) / quantized
        if quantized
        else 16.0,
        "probe": probe_numbers,
        "folding_errors": [block["folding_error"] for block in blocks],
        "layers": [layer for block in blocks for layer in block["layers"]],
        "notes": list(job.notes),
    }
    quantization = plan.format.config(plan.layout, plan.choice)
    config = job.skeleton.checkpoint.config
    config = (
        config
        | plan.format.extra_config(plan.layout, config)
        | {"quantization_config": quantization}
    )
    usage = _usage(job.out, quantization["quant_method"])
    sums = {**tensor_sums(outer), **{n: s for block in blocks for n, s in block["sums"].items()}}
    workdir.write_text("config.json", _json(config))
    workdir.write_text("model.safetensors.index.json", index_json(shards, weights_bytes))
    workdir.write_text("recipe.yaml", plan.recipe.to_yaml())
    workdir.write_text("report.json", _json(report))
    workdir.write_text("checksums.json", _json(sums))
    workdir.write_text("README.md", _card(job, report, usage))
    with writing(path / PROBE_FILE):
        copy_companions(job.source, path)
        probe.save(path / PROBE_FILE)
    workdir.write_text(MARKER, _json(_provenance(job)))
    workdir.publish()
    return _summary(job, report, usage)


def _summary(job: _Job, report: dict[str, Any], usage: tuple[str, ...]) -> dict[str, Any]:
    config = json.loads((job.out / "config.json").read_text())
    return {
        "out": job.out,
        "bits_per_weight": report["bits_per_weight"],
        "size_bytes": sum(file.stat().st_size for file in job.out.iterdir() if file.is_file()),
        "original_bytes": sum(
            file.stat().st_size for file in job.source.iterdir() if file.is_file()
        ),
        "method": report["method"],
        "scheme": report["scheme"],
        "format": config["quantization_config"]["quant_method"],
        "probe": report["probe"],
        "layers": report["layers"],
        "usage": usage,
    }


def _finished(job: _Job) -> Quantization:
    report = json.loads((job.out / "report.json").read_text())
    method = json.loads((job.out / "config.json").read_text())["quantization_config"][
        "quant_method"
    ]
    return Quantization(
        **_summary(job, report, _usage(job.out, method)),
        seconds=0.0,
        resumed_blocks=len(report["folding_errors"]),
        peak_rss_mb=peak_rss_mb(),
        notes=job.notes,
        finished_before=True,
    )


def _provenance(job: _Job) -> dict[str, Any]:
    """What the artifact was made from. No times and no measurements of the machine: the same request gives the same
    bytes, whether or not the run was interrupted."""
    files = job.skeleton.checkpoint.files
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(sha256_of, files))
    calibration = job.calibration
    return {
        "bitfold": {"version": VERSION, "request": job.request},
        "packages": package_versions(),
        "source": {
            "model": job.model,
            "files": {file.name: digest for file, digest in zip(files, sums, strict=True)},
            "config": hashlib.sha256((job.source / "config.json").read_bytes()).hexdigest(),
        },
        "calibration": None
        if calibration is None
        else {
            "source": calibration.source,
            "sha256": calibration.sha256,
            "samples": calibration.tokens.shape[0],
            "sequence_length": calibration.tokens.shape[1],
        },
        "seed": job.plan.recipe.seed,
        "dtype": str(job.dtype).removeprefix("torch."),
        "device": job.skeleton.device.type,
    }


def _usage(out: Path, quant_method: str) -> tuple[str, ...]:
    """Lines that show how to use the result."""
    loading = f'AutoModelForCausalLM.from_pretrained("{out}")'
    if quant_method == "compressed-tensors":
        return (
            f"from transformers import AutoModelForCausalLM; model = {loading}",
            f"vllm serve {out}",
            f'bitfold generate {out} --prompt "Once upon a time"',
        )
    return (
        f"import bitfold; from transformers import AutoModelForCausalLM; model = {loading}",
        f'bitfold generate {out} --prompt "Once upon a time"',
    )


def _card(job: _Job, report: dict[str, Any], usage: tuple[str, ...]) -> str:
    lines = "\n".join(line.replace(str(job.out), ".") for line in usage)
    return model_card(job.model, report["scheme"], report["method"], report, f"```\n{lines}\n```")


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
