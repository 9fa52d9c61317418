"""What is exported, in its engine, held against the simulation: what all `verify_…` of this package share."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitfold.data.text import read_text, tokenize, windows
from bitfold.errors import VerificationError
from bitfold.pipeline.probe import Probe
from bitfold.runtime.load import load, load_tokenizer

__all__ = [
    "Engine",
    "ExportVerification",
    "TextComparison",
    "compare_text",
    "probe_difference",
    "verify_export",
]


class Engine(Protocol):
    """What runs a model."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [length, vocabulary] float32 behind every token id of one window [length]."""


Opened = Callable[[int], AbstractContextManager[Engine]]


@dataclass(frozen=True)
class TextComparison:
    """On a text: perplexity in the engine and in PyTorch, their mean KL in nats, and the logits' difference, largest
    and root mean square, over their standard deviation."""

    tokens: int
    perplexity_engine: float
    perplexity_simulation: float
    kl_mean: float
    largest_difference: float
    difference: float


@dataclass(frozen=True)
class ExportVerification:
    """difference: root mean square of the probe's logits' differences, over their standard deviation; None for a file
    that has no probe. text: where one was given."""

    out: str
    engine: str
    tensors: int
    positions: int
    difference: float | None
    tolerance: float
    text: TextComparison | None
    ok: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def verify_export(
    out: Path,
    name: str,
    tensors: int,
    probe: Probe | None,
    tolerance: float,
    opened: Opened,
    texts: tuple[str | Path | None, str | Path | None],
    window_count: int,
    progress: Callable[[str], None],
) -> ExportVerification:
    """Run an export whose `tensors` are what was written in its engine, on the probe and on a text.

    name: of the engine. opened: the engine for windows of so many tokens. texts: an artifact and a text, if both are to
    be compared on it. Raises VerificationError where the logits are not what was simulated.
    """
    difference, positions = None, 0
    if probe is not None:
        progress(f"comparing logits in {name}")
        with opened(probe.tokens.shape[1]) as engine:
            difference = probe_difference(engine, probe)
        positions = probe.logits.shape[0] * probe.logits.shape[1]
        if not difference <= tolerance:
            raise VerificationError(
                f"{out} gives logits in {name} that differ from the simulation by {difference:.2g} of their spread (at "
                f"most {tolerance:g} is rounding): export it again."
            )
    against, text = texts
    compared = None
    if against is not None and text is not None:
        progress("running the text in both")
        compared = compare_text(opened, against, text, window_count)
    return ExportVerification(str(out), name, tensors, positions, difference, tolerance, compared)


def probe_difference(engine: Engine, probe: Probe) -> float:
    """Root mean square of the probe's logits' differences, over their standard deviation."""
    found = probe.pick(torch.stack([engine.logits(tokens) for tokens in probe.tokens]))
    return float((found - probe.logits).square().mean().sqrt() / probe.logits.std())


def compare_text(
    opened: Opened,
    against: str | Path,
    text: str | Path,
    window_count: int,
) -> TextComparison:
    """An engine and PyTorch on a text, so many windows of at most 512 tokens. opened: the engine for that length."""
    model, tokenizer = load(against, device="cpu", dtype="float32"), load_tokenizer(against)
    length = min(512, model.config.get_text_config().max_position_embeddings)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = tokenize(read_text(Path(text)), tokenizer, vocab_size=vocabulary)
    rows = windows(tokens, length)[:window_count]
    parts = []
    with opened(length) as engine, torch.no_grad():
        for row in rows:
            theirs, ours = engine.logits(row), model(row[None]).logits[0].float()
            parts.append(_window(theirs, ours, row))
    kl, nll, ours_nll, square, variance, largest = torch.tensor(parts).double().T
    spread = variance.mean().sqrt()
    return TextComparison(
        tokens=len(rows) * (length - 1),
        perplexity_engine=float(nll.mean().exp()),
        perplexity_simulation=float(ours_nll.mean().exp()),
        kl_mean=float(kl.mean()),
        largest_difference=float(largest.max() / spread),
        difference=float(square.mean().sqrt() / spread),
    )


def _window(theirs: Tensor, ours: Tensor, tokens: Tensor) -> list[float]:
    """Of one window: KL(simulation ‖ engine), both mean negative log-likelihoods, and what differences are made of."""
    log_q, log_p = theirs.log_softmax(dim=-1), ours.log_softmax(dim=-1)
    following = tokens[1:, None]
    figures = (
        (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean(),
        -log_q[:-1].gather(1, following).mean(),
        -log_p[:-1].gather(1, following).mean(),
        (theirs - ours).square().mean(),
        ours.var(),
        (theirs - ours).abs().max(),
    )
    return [float(figure) for figure in figures]
