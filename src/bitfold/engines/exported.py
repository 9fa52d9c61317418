"""What is exported, in its engine, held against the simulation: what `verify_gguf` and `verify_onnx` share."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitfold.data.text import read_text, tokenize, windows
from bitfold.pipeline.probe import Probe
from bitfold.runtime.load import load, load_tokenizer

__all__ = ["Engine", "ExportVerification", "TextComparison", "compare_text", "probe_difference"]


class Engine(Protocol):
    """What runs a model."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [length, vocabulary] float32 behind every token id of one window [length]."""


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


def probe_difference(engine: Engine, probe: Probe) -> float:
    """Root mean square of the probe's logits' differences, over their standard deviation."""
    found = probe.pick(torch.stack([engine.logits(tokens) for tokens in probe.tokens]))
    return float((found - probe.logits).square().mean().sqrt() / probe.logits.std())


def compare_text(
    opened: Callable[[int], AbstractContextManager[Engine]],
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
