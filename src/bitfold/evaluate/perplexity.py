"""Perplexity of a model on text, and its distance from the original on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitfold.data.text import default_sequence_length, read_text, tokenize
from bitfold.data.text import windows as cut_windows
from bitfold.errors import DataError
from bitfold.evaluate.models import (
    check_positions,
    evaluating,
    opened,
    tokenizer_of,
    vocab_size,
)
from bitfold.evaluate.statistics import (
    TokenStatistics,
    divergence_figures,
    join,
    perplexity_and_error,
    token_statistics,
)
from bitfold.runtime.device import quick_float32
from bitfold.runtime.load import load_tokenizer

__all__ = ["Evaluation", "TextEvaluation", "evaluate", "summed_up"]

LOGITS_PER_BATCH = 2**22
"""Elements; larger batches are no faster, and fall out of the allocator's reuse."""
LOGITS_PER_SLICE = 2**18
"""Elements worked on at once: fits a core's cache, and bounds what a large vocabulary needs."""

NOT_TEXT = (".jsonl", ".npy")


@dataclass(frozen=True)
class TextEvaluation:
    """The figures of one text. A figure is None where a logit it needs was not finite.

    tokens             predicted tokens: windows · (sequence_length − 1)
    nonfinite_tokens   those whose likelihood or divergence was no finite number
    *_se               standard errors, clustered by window; None with one window
    kl_*, top1_*       against the original, in nats per token and as a fraction; None without one
    """

    perplexity: float | None
    perplexity_se: float | None
    tokens: int
    windows: int
    sequence_length: int
    nonfinite_tokens: int
    compared: bool = False
    kl_mean: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_se: float | None = None
    top1_agreement: float | None = None
    top1_se: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and nulls; without kl_* and top1_* if there was nothing to compare with."""
        figures = asdict(self)
        if not figures.pop("compared"):
            return {k: v for k, v in figures.items() if not k.startswith(("kl_", "top1_"))}
        return figures


@dataclass(frozen=True)
class Evaluation:
    """The figures of every text, by its name."""

    texts: dict[str, TextEvaluation]

    def to_json(self) -> dict[str, Any]:
        """One text: its figures. Several: the figures of each under its name."""
        if len(self.texts) == 1:
            return next(iter(self.texts.values())).to_json()
        return {name: figures.to_json() for name, figures in self.texts.items()}


def evaluate(
    model: str | Path | PreTrainedModel,
    texts: Mapping[str, str | Path] | str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequence_length: int | None = None,
    against: str | Path | PreTrainedModel | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Perplexity on one text or several by name, and with `against` the distance from that model.

    The whole file is tokenized once without special tokens, cut in consecutive windows of
    `sequence_length` (the last partial one dropped), each window alone; perplexity is exp of the
    mean negative log-likelihood over the L−1 predicted tokens of every window. `against`, usually
    the original, gives KL(against ‖ model) and top-1 agreement over the same predictions. Both
    models run batch by batch: the logits of a text are never all in memory.

    model, against    directory, hub name or a loaded model
    tokenizer         needed with a loaded `model`, else the checkpoint's own
    sequence_length   default min(2048, the model's positions)
    device, dtype     of what is loaded here; a loaded model stays as it is
    windows           only the first so many windows of each text
    progress          called with (windows done, windows in all)

    Raises DataError for text that cannot be used and models that cannot be compared,
    CheckpointError for checkpoints. Logits that are not finite are counted, not raised.
    """
    if windows is not None and windows < 1:
        raise DataError(f"The number of windows must be at least 1, not {windows}: ask for more.")
    paths = _by_name(texts)
    contents = {name: read_text(path) for name, path in paths.items()}
    open_here = partial(opened, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = tokenizer_of(model, tokenizer, trust_remote_code=trust_remote_code)
    candidate = open_here(model)
    length = sequence_length
    if length is None:
        length = default_sequence_length(candidate.config)
    check_positions(candidate, length)
    size = vocab_size(candidate)
    tokens = {name: tokenize(text, tokenizer, vocab_size=size) for name, text in contents.items()}
    rows = {name: _cut(tokens[name], length, paths[name])[:windows] for name in paths}

    reference = None
    if against is not None:
        if isinstance(against, str | Path):
            other = load_tokenizer(against, trust_remote_code=trust_remote_code)
            _check_same_tokens(other, contents, tokens)
        reference = open_here(against)
        if vocab_size(reference) != size:
            raise DataError(
                f"Vocabularies of {size} and {vocab_size(reference)} tokens cannot be compared: "
                "evaluate against the model this one was made from."
            )
        check_positions(reference, length)

    total = sum(len(rows_nL) for rows_nL in rows.values())
    done = 0
    figures = {}
    with evaluating(candidate), evaluating(reference), torch.no_grad(), quick_float32():
        for name, rows_nL in rows.items():
            parts = []
            for batch_BL in rows_nL.split(max(1, LOGITS_PER_BATCH // (length * size))):
                parts.append(_batch_statistics(candidate, reference, batch_BL))
                done += len(batch_BL)
                if progress is not None:
                    progress(done, total)
            figures[name] = summed_up(join(parts), length)
    return Evaluation(figures)


# --- before anything runs ---


def _by_name(texts: Mapping[str, str | Path] | str | Path) -> dict[str, Path]:
    if isinstance(texts, str | Path):
        texts = {Path(texts).stem: texts}
    if not texts:
        raise DataError("There is no text to evaluate on: name at least one file.")
    for path in texts.values():
        if Path(path).suffix.lower() in NOT_TEXT:
            raise DataError(
                f"{path} is not plain text (UTF-8), which is what evaluation takes: convert it."
            )
    return {name: Path(path) for name, path in texts.items()}


def _cut(tokens_T: torch.Tensor, length: int, path: Path) -> torch.Tensor:
    rows_nL = cut_windows(tokens_T, length)
    if not len(rows_nL):
        raise DataError(
            f"{path} gives {tokens_T.numel()} tokens, but one window needs {length}: "
            "give more text or a shorter sequence length."
        )
    return rows_nL


def _check_same_tokens(
    other: PreTrainedTokenizerBase,
    contents: Mapping[str, str],
    tokens: Mapping[str, torch.Tensor],
) -> None:
    """Tokenizers are compared by what they do to these texts; their files may differ harmlessly."""
    for name, text in contents.items():
        if not torch.equal(tokenize(text, other), tokens[name]):
            raise DataError(
                f"The two models' tokenizers cut '{name}' into different tokens: "
                "evaluate against the model this one was made from."
            )


# --- running the models ---


def _batch_statistics(
    model: PreTrainedModel, reference: PreTrainedModel | None, batch_BL: torch.Tensor
) -> TokenStatistics:
    """Statistics [B, L−1] of a batch of windows, on the CPU."""
    logits_BLV = _logits(model, batch_BL)
    reference_BLV = _logits(reference, batch_BL) if reference is not None else None
    _, length, vocab_size = logits_BLV.shape
    step = max(1, LOGITS_PER_SLICE // vocab_size)
    parts = []
    for window, ids_L in enumerate(batch_BL):
        for start in range(0, length - 1, step):
            rows = slice(start, min(start + step, length - 1))
            logits_TV = logits_BLV[window, rows]
            reference_TV = None
            if reference_BLV is not None:
                reference_TV = reference_BLV[window, rows].to(logits_TV.device)
            next_T = ids_L[rows.start + 1 : rows.stop + 1].to(logits_TV.device)
            parts.append(token_statistics(logits_TV, reference_TV, next_T))
    shape = (len(batch_BL), length - 1)
    return join(parts, lambda values: values.reshape(shape).cpu())


def _logits(model: PreTrainedModel, batch_BL: torch.Tensor) -> torch.Tensor:
    return model(input_ids=batch_BL.to(model.device), use_cache=False).logits


# --- summing up ---


def summed_up(statistics: TokenStatistics, length: int) -> TextEvaluation:
    """Figures from the statistics [n, L−1] of all windows of a text."""
    finite = statistics.nll.isfinite()
    perplexity, perplexity_se = perplexity_and_error(statistics.nll)
    divergence: dict[str, Any] = {}
    if statistics.kl is not None and statistics.agree is not None:
        divergence = divergence_figures(statistics.kl, statistics.agree)
        finite &= statistics.kl.isfinite()
    return TextEvaluation(
        perplexity=perplexity,
        perplexity_se=perplexity_se,
        tokens=finite.numel(),
        windows=len(finite),
        sequence_length=length,
        nonfinite_tokens=int((~finite).sum()),
        **divergence,
    )
