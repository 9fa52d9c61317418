"""A run before its first block: everything that is settled once, and every check that can be made at once."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitfold.data import Calibration, default_sequence_length, load_calibration
from bitfold.errors import DataError, OutputError
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline.estimate import artifact_bytes
from bitfold.pipeline.plan import Plan, make_plan
from bitfold.pipeline.request import request_hash
from bitfold.pipeline.streams import PROBE_LENGTH, PROBE_WINDOWS, Streams
from bitfold.recipe import Recipe
from bitfold.runtime.checkpoint import find_checkpoint
from bitfold.runtime.device import resolve_device, resolve_dtype
from bitfold.runtime.load import load_tokenizer

__all__ = ["Job", "check_disk", "prepare", "start_streams"]


@dataclass(frozen=True)
class Job:
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


def prepare(
    model: str,
    out: Path,
    recipe: Recipe,
    calibration: Sequence[str | Path],
    samples: int,
    sequence_length: int | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
) -> Job:
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
    return Job(
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


def start_streams(job: Job) -> Streams:
    recipe = job.plan.recipe
    tokens = job.calibration.tokens if job.calibration is not None and recipe.calibrates else None
    outer = job.skeleton.load_outer(job.dtype)
    keep_original = recipe.stream == "original" or "loss" in recipe.needs
    return Streams.start(job.skeleton, outer, tokens, job.probe, keep_original=keep_original)


def check_disk(job: Job) -> None:
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
