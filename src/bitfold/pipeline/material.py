"""What a distillation learns from: the calibration windows, text of the original's own, and what it makes of both."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.data.data_free import marks_of, resampled_windows, write_windows
from bitfold.distillation import Distillation
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline.job import Job
from bitfold.pipeline.streams import Streams, last_hidden
from bitfold.runtime.device import has_fast_bfloat16
from bitfold.runtime.load import load

__all__ = ["Material", "gather"]

Report = Callable[[int, int, str], None]

# Tokens of a calibration window with which the original begins a window of its own.
BEGINNING = 16


@dataclass(frozen=True)
class Material:
    """tokens [windows, length]: ids, the calibration's first. original [windows, length, hidden]: what the original's
    last block gives for them. training, check: indices of the windows to train on, and of those to judge by, none of
    which, nor text made from them, is trained on."""

    tokens: Tensor
    original: Tensor
    training: Tensor
    check: Tensor


@torch.no_grad()
def gather(
    job: Job, streams: Streams, options: Distillation, seed: int, report: Report
) -> Material:
    """The calibration windows, split in two, and the own text that the options ask for.

    streams: after the last block.
    """
    given, original = job.stream_tokens, streams.original
    assert given is not None
    assert original is not None
    training, check = options.split(given.shape[0], seed)
    own = []
    if options.written:
        own.append(_written(job, given[training], options.written, report))
    if options.resampled:
        own.append(_resampled(job, given, original, training, options.resampled, seed))
    if own:
        more = torch.cat(own)
        training = torch.cat([training, torch.arange(len(more)) + len(given)])
        given = torch.cat([given, more])
        # By half precision's products where they are quicker: the text is the original's by chance anyway, and what is
        # kept is judged by real text.
        low = job.dtype != torch.float64 and has_fast_bfloat16(job.skeleton.device)
        mine = last_hidden(job.skeleton, more, job.dtype, low=low)
        original = torch.cat([original, mine])
    return Material(given, original, training, check)


def _written(job: Job, given: Tensor, count: int, report: Report) -> Tensor:
    """Windows that the original writes itself, beginning as those given do."""
    # Text may be drawn from bfloat16's probabilities as well: what is learned of it is another matter.
    dtype = job.dtype if job.dtype == torch.float64 else torch.bfloat16
    model = load(job.skeleton.checkpoint.path, device=job.skeleton.device, dtype=dtype)
    return write_windows(
        model,
        given.shape[1],
        job.plan.recipe.seed,
        lambda done, total: report(done, total, "the original writes text"),
        given[torch.arange(count) % given.shape[0], :BEGINNING],
    )


def _resampled(
    job: Job, given: Tensor, original: Tensor, training: Tensor, copies: int, seed: int
) -> Tensor:
    """Copies of the windows to train on, half of each drawn anew by the original."""
    skeleton = job.skeleton
    marks = marks_of(skeleton.config.vocab_size, skeleton.config)
    logits = _logits(skeleton, skeleton.load_outer(job.dtype), original, training)
    generator = torch.Generator().manual_seed(seed)
    return resampled_windows(given[training], logits, marks, copies, generator)


def _logits(
    skeleton: Skeleton, outer: dict[str, Tensor], original: Tensor, windows: Tensor
) -> Iterator[Tensor]:
    """The original's, window by window, [length, vocabulary]."""
    for window in windows.tolist():
        hidden = original[window : window + 1].to(skeleton.device)
        yield skeleton.head(outer, hidden.to(next(iter(outer.values())).dtype))[0]
