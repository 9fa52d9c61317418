"""A GGUF file held against the simulation: its bytes against their sums, llama.cpp's logits against those recorded."""

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfold.data.text import read_text, tokenize, windows
from bitfold.engines.llama_cpp import LlamaCpp
from bitfold.errors import CheckpointError, MissingExtraError, VerificationError
from bitfold.export.artifact import tensor_sum
from bitfold.pipeline.probe import Probe
from bitfold.runtime.load import load, load_tokenizer

__all__ = ["GgufVerification", "TextComparison", "verify_gguf"]

# Of the logits' standard deviation, root mean square. llama.cpp rounds what a weight in few bits is multiplied with to
# 8 bits, in blocks of 32 or 256: that was 0.01 to 0.05 here. Rows in a wrong order, or a wrong zero-point, give 0.5.
TOLERANCE = 0.15


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
class GgufVerification:
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


def verify_gguf(
    file: Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    window_count: int = 16,
    progress: Callable[[str], None] = lambda what: None,
) -> GgufVerification:
    """Load a file in llama.cpp, and compare it with the simulation that was recorded when the artifact was made.

    against, text: an artifact and a text on which both are compared too, on so many windows of at most 512 tokens.
    Raises VerificationError naming the tensor that was changed, or the difference; CheckpointError for a file that
    cannot be read; MissingExtraError without llama.cpp.
    """
    progress("checking tensors")
    count, probe = _read(file)
    difference, positions = None, 0
    if probe is not None:
        progress("comparing logits in llama.cpp")
        with LlamaCpp(file, context=probe.tokens.shape[1]) as engine:
            logits = torch.stack([engine.logits(tokens) for tokens in probe.tokens])
        found = probe.pick(logits)
        difference = float((found - probe.logits).square().mean().sqrt() / probe.logits.std())
        positions = probe.logits.shape[0] * probe.logits.shape[1]
        if not difference <= TOLERANCE:
            raise VerificationError(
                f"{file} gives logits in llama.cpp that differ from the simulation by {difference:.2f} of their "
                f"spread (at most {TOLERANCE:g} is the engine's rounding): export it again."
            )
    compared = None
    if against is not None and text is not None:
        progress("running the text in both")
        compared = _compare(file, against, text, window_count)
    return GgufVerification(
        str(file), "llama.cpp", count, positions, difference, TOLERANCE, compared
    )


def _read(file: Path) -> tuple[int, Probe | None]:
    """How many tensors are what was written, and the probe, if there is one."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            "GGUF files are read with the package gguf: pip install 'bitfold[gguf]'."
        ) from error
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: reader.get_field(name) for name in ("bitfold.sums", "bitfold.verification")}
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        read = {name: None if field is None else field.contents() for name, field in fields.items()}
    except (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"{file} is no GGUF file, or damaged ({' '.join(str(error).split())}): export it again."
        ) from error
    if read["bitfold.sums"] is None:
        raise VerificationError(
            f"{file} was not written by bitfold: there is nothing to verify it against."
        )
    sums = dict(line.split(" ") for line in read["bitfold.sums"])
    if odd := sorted(set(sums).symmetric_difference(tensors)):
        was = "is missing from" if odd[0] in sums else "was added to"
        raise VerificationError(f"{odd[0]} {was} {file}: export it again.")
    for name, data in tensors.items():
        raw = torch.from_numpy(np.array(data).view(np.uint8))
        if tensor_sum(raw) != sums[name]:
            raise VerificationError(
                f"{name} in {file} is not what was written: the file was changed or damaged; export it again."
            )
    recorded = read["bitfold.verification"]
    return len(sums), None if recorded is None else Probe.load(io.BytesIO(bytes(recorded)))


def _compare(
    file: Path, against: str | Path, text: str | Path, window_count: int
) -> TextComparison:
    model, tokenizer = load(against, device="cpu", dtype="float32"), load_tokenizer(against)
    length = min(512, model.config.get_text_config().max_position_embeddings)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = tokenize(read_text(Path(text)), tokenizer, vocab_size=vocabulary)
    rows = windows(tokens, length)[:window_count]
    parts = []
    with LlamaCpp(file, context=length) as engine, torch.no_grad():
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
