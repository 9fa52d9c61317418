"""A text as rows of token ids to train on, and some held back to judge by."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bitfold.data import check_sequence_length, read_text, tokenize, windows
from bitfold.errors import DataError

__all__ = ["held_back", "text_windows"]

_MOST_HELD_BACK = 16


def text_windows(
    file: str | Path, tokenizer: PreTrainedTokenizerBase, length: int, vocab_size: int
) -> Tensor:
    """Consecutive windows [n, length] of a UTF-8 file's tokens, the last partial one dropped.

    Raises DataError for a file that cannot be read, is empty, or does not fill one window.
    """
    check_sequence_length(length)
    tokens = tokenize(read_text(Path(file)), tokenizer, vocab_size=vocab_size)
    rows = windows(tokens, length)
    if not len(rows):
        raise DataError(
            f"{file} gives {tokens.numel()} tokens, but one window needs {length}: give more text or a shorter "
            "sequence length"
        )
    return rows


def held_back(rows: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on, and those held back to judge by: a share of them, at most 16, at least 1 of 2 or more."""
    count = min(_MOST_HELD_BACK, max(1, int(share * len(rows))))
    if share <= 0 or len(rows) < 2:
        return rows, rows[:0]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[count:].sort().values], rows[order[:count].sort().values]
