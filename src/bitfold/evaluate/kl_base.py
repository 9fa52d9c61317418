"""Comparison by llama.cpp's file of log-probabilities: a GGUF there and an artifact here, against the same logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitfold.data.text import read_text, tokenize
from bitfold.data.text import windows as cut_windows
from bitfold.errors import DataError
from bitfold.evaluate.logits_file import (
    LogitsFile,
    check_place,
    decode_rows,
    encode_rows,
    read_logits_file,
    writing_logits_file,
)
from bitfold.evaluate.models import (
    check_positions,
    evaluating,
    last_logits,
    opened,
    positions,
    tokenizer_of,
    vocab_size,
)
from bitfold.evaluate.perplexity import (
    LOGITS_PER_BATCH,
    LOGITS_PER_SLICE,
    TextEvaluation,
    summed_up,
)
from bitfold.evaluate.statistics import (
    TokenStatistics,
    at_least_float32,
    join,
    perplexity_and_error,
    token_statistics,
)
from bitfold.runtime.device import quick_float32

__all__ = ["KlBaseEvaluation", "KlBaseFile", "evaluate_kl_base", "write_kl_base"]

DEFAULT_LENGTH = 512
"""llama-perplexity's own, so that it reads the file without -c."""
COUNTED_ABOVE = -16.0
"""A log-probability that is not above it takes no part in the divergence: llama.cpp's rule, codes end about there."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class KlBaseFile:
    """What was written.

    figures   perplexity of the model over the positions in the file: the second half of each window
    """

    path: Path
    bytes: int
    figures: TextEvaluation

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, and the path."""
        return {"path": str(self.path), "bytes": self.bytes} | self.figures.to_json()


@dataclass(frozen=True)
class KlBaseEvaluation:
    """A model against the logits of a file, over the second half of each window.

    figures        perplexity of the model, and its distance from the file's logits
    base_*         perplexity of the file's logits
    perplexity_ratio*   the model's over the file's; the standard error is of the paired difference
    """

    figures: TextEvaluation
    base_perplexity: float | None
    base_perplexity_se: float | None
    perplexity_ratio: float | None
    perplexity_ratio_se: float | None

    def to_json(self) -> dict[str, Any]:
        """All figures in one object."""
        return self.figures.to_json() | {
            "base_perplexity": self.base_perplexity,
            "base_perplexity_se": self.base_perplexity_se,
            "perplexity_ratio": self.perplexity_ratio,
            "perplexity_ratio_se": self.perplexity_ratio_se,
        }


def write_kl_base(
    model: str | Path | PreTrainedModel,
    text: str | Path,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequence_length: int | None = None,
    windows: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> KlBaseFile:
    """Write the logits of a model, usually the original, as `llama-perplexity --kl-divergence-base` would.

    The text is tokenized once, after a BOS where the tokenizer puts one, and cut in windows. For every second token of
    the text two bytes are written for each token of the vocabulary. The file gets its name when it is whole.

    sequence_length   default 512, llama.cpp's, or the model's positions if fewer
    windows           only the first so many
    The rest as `evaluate` has it.

    Raises DataError for text or logits that cannot be used, OutputError for a place that is taken or full.
    """
    path = Path(path).expanduser()
    check_place(path)
    content = read_text(Path(text))
    _check_windows(windows)
    tokenizer = tokenizer_of(model, tokenizer, trust_remote_code=trust_remote_code)
    model = opened(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    length = sequence_length or min(DEFAULT_LENGTH, positions(model) or DEFAULT_LENGTH)
    check_positions(model, length)
    if length < 3:
        raise DataError(f"Windows of {length} tokens have no second half: choose at least 3.")
    start = _start_token(tokenizer)
    tokens_T = tokenize(content, tokenizer, vocab_size=vocab_size(model))
    if start is not None:
        tokens_T = torch.cat([torch.tensor([start]), tokens_T])
    rows_nL = cut_windows(tokens_T, length)[:windows]
    if not len(rows_nL):
        raise DataError(
            f"{text} gives {tokens_T.numel()} tokens, but one window needs {length}: "
            "give more text or a shorter sequence length."
        )
    file = LogitsFile(path, rows_nL, vocab_size(model))
    parts = []
    with (
        writing_logits_file(file) as output,
        evaluating(model),
        torch.no_grad(),
        quick_float32(),
    ):
        for logits_TV, next_T in _predictions(model, file, rows_nL, start, progress):
            output.write(encode_rows(logits_TV).tobytes())
            parts.append(token_statistics(logits_TV, None, next_T))
    statistics = join(parts, lambda values: values.reshape(len(rows_nL), -1).cpu())
    return KlBaseFile(path, file.bytes, summed_up(statistics, length))


def evaluate_kl_base(
    model: str | Path | PreTrainedModel,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    windows: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> KlBaseEvaluation:
    """KL(file ‖ model), top-1 agreement and the ratio of perplexities, over what llama.cpp takes of the same file.

    The tokens are the file's. Standard errors are clustered by window, as `evaluate` has them.

    tokenizer   only asked whether sequences begin with a BOS
    windows     only the first so many
    The rest as `evaluate` has it.

    Raises DataError for a file that is not llama.cpp's, is truncated, or is of another vocabulary.
    """
    _check_windows(windows)
    file = read_logits_file(Path(path).expanduser())
    tokenizer = tokenizer_of(model, tokenizer, trust_remote_code=trust_remote_code)
    model = opened(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if file.vocab_size != vocab_size(model):
        raise DataError(
            f"{path} has logits of {file.vocab_size} tokens and the model a vocabulary of {vocab_size(model)}: "
            "compare with the logits of the model this one was made from."
        )
    length = file.tokens.shape[1]
    limit = positions(model)
    if limit and length > limit:
        raise DataError(
            f"{path} has windows of {length} tokens, which are beyond the {limit} positions of the model: "
            "write it with shorter ones."
        )
    rows_nL = file.tokens[:windows]
    start = _start_token(tokenizer)
    parts: list[TokenStatistics] = []
    base_nll: list[torch.Tensor] = []
    with file.reading() as read, evaluating(model), torch.no_grad(), quick_float32():
        for logits_TV, next_T in _predictions(model, file, rows_nL, start, progress):
            base_TV = decode_rows(read(len(next_T)), file.vocab_size).to(logits_TV.device)
            parts.append(_against_base(logits_TV, base_TV, next_T))
            base_nll.append(_chosen(-base_TV, next_T))
    statistics = join(parts, lambda values: values.reshape(len(rows_nL), -1).cpu())
    base_nT = torch.cat(base_nll).reshape(len(rows_nL), -1).cpu()
    return KlBaseEvaluation(
        summed_up(statistics, length),
        *perplexity_and_error(base_nT),
        *perplexity_and_error(statistics.nll - base_nT),
    )


# --- what both share ---


def _check_windows(windows: int | None) -> None:
    if windows is not None and windows < 1:
        raise DataError(f"The number of windows must be at least 1, not {windows}: ask for more.")


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS, where the tokenizer begins sequences with one: llama.cpp's `add_bos`."""
    start = tokenizer.bos_token_id
    begun = tokenizer("a", verbose=False)["input_ids"]
    return int(start) if start is not None and begun[:1] == [start] else None


def _predictions(
    model: PreTrainedModel,
    file: LogitsFile,
    rows_nL: torch.Tensor,
    start: int | None,
    progress: Progress | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The logits [T, V] of the second half of each window in turn, in slices that fit the cache, and the tokens [T]
    that came. The model sees `start` in place of a window's first token.
    """
    length = rows_nL.shape[1]
    step = max(1, LOGITS_PER_SLICE // file.vocab_size)
    done = 0
    for batch_BL in rows_nL.split(max(1, LOGITS_PER_BATCH // (length * file.vocab_size))):
        ids_BL = batch_BL.clone()
        if start is not None:
            ids_BL[:, 0] = start
        logits_BTV = last_logits(model, ids_BL, length - file.first)[:, :-1]
        for window, logits_TV in enumerate(logits_BTV):
            next_T = batch_BL[window, file.first + 1 :].to(logits_TV.device)
            yield from zip(logits_TV.split(step), next_T.split(step), strict=True)
        done += len(batch_BL)
        if progress is not None:
            progress(done, len(rows_nL))


def _against_base(
    logits_TV: torch.Tensor, base_TV: torch.Tensor, next_T: torch.Tensor
) -> TokenStatistics:
    """As llama.cpp compares: what the file has far below the likeliest is left out, and nothing is normalized again."""
    log_q = torch.log_softmax(at_least_float32(logits_TV), dim=-1)
    terms = torch.where(base_TV > COUNTED_ABOVE, base_TV.exp() * (base_TV - log_q), 0)
    # A row of NaN is above nothing: it would be at no distance.
    terms[base_TV.isnan().any(-1)] = torch.nan
    agree_T = logits_TV.argmax(-1) == base_TV.argmax(-1)
    return TokenStatistics(
        _chosen(-log_q, next_T), terms.sum(-1, dtype=torch.float64), agree_T.double()
    )


def _chosen(values_TV: torch.Tensor, next_T: torch.Tensor) -> torch.Tensor:
    return values_TV.gather(-1, next_T[:, None]).squeeze(-1).double()
