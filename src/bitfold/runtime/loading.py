"""What every way of loading through transformers shares: silence, complete weights, one sentence for whatever fails."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from transformers.utils import logging

from bitfold.errors import CheckpointError

__all__ = ["cannot_load", "check_report", "quiet"]

LAYER = re.compile(r"^(.*?)\.\d+\.")


def check_report(directory: Path, report: dict[str, Any], names: Collection[str]) -> None:
    """Every weight of the model came from the checkpoint, and none of its layers was left over."""
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise CheckpointError(
            f"{directory}: {name} has shape {list(found)}, but config.json makes it {list(expected)} "
            f"({len(mismatched)} of other shapes): weights and config.json are of different models; "
            "copy or download them again."
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{directory} has no weights for {missing[0]}, which config.json asks for ({len(missing)} missing): "
            "the checkpoint is incomplete or config.json is of another model; copy or download them again."
        )
    # Leftovers of other parts (a vision tower, say) are no harm; a layer's own weights, or a layer
    # that config.json does not count, would give another function than the one that was trained.
    layers = {found[1] for name in names if (found := LAYER.match(name))}
    left_over = sorted(
        name
        for name in report["unexpected_keys"]
        if (found := LAYER.match(name)) and found[1] in layers
    )
    if left_over:
        raise CheckpointError(
            f"{directory}: config.json has no place for {left_over[0]} ({len(left_over)} left over): "
            "weights and config.json are of different models; copy or download them again."
        )


def cannot_load(directory: Path, error: Exception, what: str = "") -> CheckpointError:
    """The error for whatever transformers raised over a checkpoint."""
    # Without a sentence of its own (KeyError: 'added_tokens') an error needs its name to be read.
    said = str(error) if " " in str(error) else f"{type(error).__name__} {error}"
    reason = textwrap.shorten(said, width=200, placeholder=" …")
    return CheckpointError(
        f"It is not possible to load {what}{directory} ({reason.rstrip('.')}): "
        "copy or download it again, all files of one model."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of the libraries below; everything as it was, afterwards.

    Errors are exceptions, so nothing that matters is lost with stderr, which is the only way to
    silence the bars of compressed-tensors.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
