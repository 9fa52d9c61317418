"""Before the first block: everything a run needs is found, checked and settled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.data import (
    GENERATE,
    RANDOM,
    Calibration,
    check_samples,
    check_sequence_length,
    default_sequence_length,
    generated_windows,
    load_calibration,
    random_windows,
)
from bitfold.errors import DataError, OutputError, RecipeError
from bitfold.methods import methods_with_efforts
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline.plan import Plan, make_plan
from bitfold.pipeline.request import request_hash
from bitfold.pipeline.streams import (
    DATA_FREE_PROBE_LENGTH,
    PROBE_LENGTH,
    PROBE_WINDOWS,
    Streams,
)
from bitfold.pipeline.turned import settled, skeleton_for
from bitfold.recipe import Recipe
from bitfold.runtime.checkpoint import find_checkpoint
from bitfold.runtime.device import resolve_device, resolve_dtype
from bitfold.runtime.load import load, load_tokenizer

__all__ = ["Job", "prepare", "read_calibration", "with_allocation"]


@dataclass(frozen=True)
class Job:
    """What a run has settled before its first block.

    model: as the user named it; source: its directory. probe: token ids [windows, length] of the probe. dtype: in
    which calibration and simulation run. request: all that the artifact's bytes depend on, hashed. allocation: how the
    bits of each layer were found, as it is reported; None where the recipe gives them.
    """

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
    allocation: dict[str, Any] | None = None

    @property
    def keeps_original(self) -> bool:
        """Whether the original model's activations of the calibration windows are needed."""
        recipe = self.plan.recipe
        return recipe.stream == "original" or not recipe.needs.isdisjoint({"loss", "cross"})

    @property
    def stream_tokens(self) -> Tensor | None:
        """Token ids [windows, length] of the calibration streams; None where the recipe needs none."""
        if self.calibration is None or not self.plan.recipe.calibrates:
            return None
        return self.calibration.tokens

    def start_streams(self) -> Streams:
        """The activation streams before the first block."""
        outer = self.skeleton.load_outer(self.dtype)
        return Streams.start(
            self.skeleton,
            outer,
            self.stream_tokens,
            self.probe,
            keep_original=self.keeps_original,
        )


def prepare(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    calibration: Sequence[Path],
    samples: int,
    sequence_length: int | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
    report: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Job:
    """Find the checkpoint and the text, and hold everything against everything before weights are read.

    report(0, blocks, what): progress where the model writes its own calibration.

    Raises a BitfoldError, one clear sentence, for the first thing that cannot be.
    """
    source = find_checkpoint(model)
    if source.resolve() == out.resolve():
        raise OutputError(f"The output {out} is the model itself: choose another -o.")
    device = resolve_device(device)
    skeleton = skeleton_for(Checkpoint(source), recipe, device)
    recipe, notes = settled(recipe, skeleton)
    plan = make_plan(skeleton, recipe)
    resolved = resolve_dtype(dtype, device)
    compute = plan.storage if resolved == "auto" else resolved
    length = _window_length(skeleton, sequence_length)
    check_samples(samples)
    data = None
    if recipe.calibrates or calibration:
        blocks = len(skeleton.blocks)

        def say(done: int, total: int) -> None:
            report(0, blocks, f"the model writes its calibration ({done} of {total} tokens)")

        data = read_calibration(skeleton, calibration, samples, length, recipe.seed, compute, say)
        _check_windows(recipe, data)
    _check_trained(skeleton, plan)
    return Job(
        source=source,
        model=model,
        out=out,
        skeleton=skeleton,
        plan=plan,
        calibration=data,
        probe=_probe_tokens(skeleton, data),
        dtype=compute,
        request=request_hash(skeleton.checkpoint, recipe, data, compute, device),
        notes=notes + plan.notes + (data.notes if data else ()),
    )


def read_calibration(
    skeleton: Skeleton,
    files: Sequence[Path],
    samples: int,
    length: int,
    seed: int,
    dtype: torch.dtype,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Windows of calibration text, cut by the tokenizer of the checkpoint; or, for `generate` and `random` in place of
    files, of the model's own text or of none. DataError where there are none to be had.

    dtype: in which the model writes, whole in memory; report(done, total): how far it is.
    """
    words = [str(file) for file in files if str(file) in (GENERATE, RANDOM)]
    if words and len(files) > 1:
        raise DataError(
            f"--calibration {words[0]} stands for itself: leave the other calibration files out."
        )
    if words == [RANDOM]:
        return random_windows(samples, length, skeleton.config.vocab_size, seed)
    if words == [GENERATE]:
        model = load(skeleton.checkpoint.path, device=skeleton.device, dtype=dtype)
        return generated_windows(model, samples, length, seed, report)
    needs_tokenizer = not files or any(file.suffix.lower() != ".npy" for file in files)
    return load_calibration(
        files,
        load_tokenizer(skeleton.checkpoint.path) if needs_tokenizer else None,
        samples=samples,
        sequence_length=length,
        seed=seed,
        vocab_size=skeleton.config.vocab_size,
    )


def with_allocation(job: Job, recipe: Recipe, allocation: dict[str, Any]) -> Job:
    """The same job by a recipe in which bits were found for every layer; notes of the plan are the new one's, those of
    the choice come last."""
    data = job.calibration
    others = [note for note in job.notes if note not in job.plan.notes]
    plan = make_plan(job.skeleton, recipe)
    checkpoint, device = job.skeleton.checkpoint, job.skeleton.device
    return replace(
        job,
        plan=plan,
        request=request_hash(checkpoint, recipe, data, job.dtype, device, allocation),
        notes=tuple(dict.fromkeys([*plan.notes, *others, *allocation["notes"]])),
        allocation=allocation,
    )


def _check_windows(recipe: Recipe, data: Calibration) -> None:
    """Raises DataError where too few windows are there to hold some back."""
    if data.tokens.shape[0] > 1:
        return
    one = f"The calibration ({data.source}) is one window"
    easier = "--effort low" if recipe.method in methods_with_efforts() else None
    if recipe.learned_rotation is not None:
        raise DataError(
            f"{one}, and rotations are learned on some and judged by others: "
            f"give more --samples, more text, or {easier or '--set rotation.steps=0'}."
        )
    if recipe.distillation is not None:
        raise DataError(
            f"{one}, and distillation trains on some and is judged by others: "
            f"give more --samples, more text, or {easier or 'leave out distil'}."
        )


def _check_trained(skeleton: Skeleton, plan: Plan) -> None:
    """Raises RecipeError where a distillation would have nothing to train."""
    options = plan.recipe.distillation
    if options is None or any(scheme.weight is not None for scheme in plan.schemes.values()):
        return
    names = skeleton.block_parameters(0)
    linears = {f"{name}.bias" for name in skeleton.family.linears}
    has_biases = any(name in linears for name in names)
    if not (options.norms or (options.biases and has_biases)):
        raise RecipeError(
            f"{plan.recipe.method} has nothing to train: the scheme {plan.recipe.scheme.notation} has no scales of "
            "weights, so leave distil.norms at true, or leave out distil."
        )


def _window_length(skeleton: Skeleton, asked: int | None) -> int:
    """Tokens of a calibration window; DataError for a length that cannot be, needed by the recipe or not."""
    if asked is None:
        return default_sequence_length(skeleton.config)
    check_sequence_length(asked)
    positions = getattr(skeleton.config, "max_position_embeddings", None)
    if positions is not None and asked > positions:
        raise DataError(
            f"A sequence length of {asked} is more than the {positions} positions of the model: "
            f"choose at most {positions}."
        )
    return asked


def _probe_tokens(skeleton: Skeleton, calibration: Calibration | None) -> Tensor:
    """Token ids [windows, length] of the probe: the first calibration windows, or random ones without text.

    For a calibration without data a window of real text and one of its own: the report tells one from the other.
    """
    if calibration is not None and calibration.data_free:
        own = calibration.tokens[:1, :DATA_FREE_PROBE_LENGTH]
        real = read_calibration(skeleton, [], 1, own.shape[1], 0, torch.float32)
        return torch.cat([real.tokens, own])
    if calibration is not None:
        return calibration.tokens[:PROBE_WINDOWS, :PROBE_LENGTH].clone()
    limit = getattr(skeleton.config, "max_position_embeddings", PROBE_LENGTH)
    shape = (PROBE_WINDOWS, min(PROBE_LENGTH, limit))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, skeleton.config.vocab_size, shape, generator=generator)
