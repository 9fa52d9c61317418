"""Text into windows of token ids: what calibration and evaluation share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bitfold.errors import DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "check_file",
    "check_sequence_length",
    "check_vocabulary",
    "default_sequence_length",
    "read_text",
    "tokenize",
    "windows",
]

LONGEST_DEFAULT = 2048
"""The context the field's tables use; a model may allow far more than a small machine does."""


def default_sequence_length(config: PretrainedConfig) -> int:
    """The window length when none is asked for: 2048 tokens, or the model's positions if fewer.

    >>> from transformers import LlamaConfig
    >>> default_sequence_length(LlamaConfig(max_position_embeddings=512))
    512
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(LONGEST_DEFAULT, positions) if positions else LONGEST_DEFAULT


def check_sequence_length(length: int) -> None:
    """Raise DataError for a window in which nothing can be predicted."""
    if length < 2:
        raise DataError(f"A sequence length of {length} is too short: choose at least 2 tokens.")


def check_file(path: Path) -> None:
    """Raise DataError unless `path` is a file with something in it."""
    if path.is_dir():
        raise DataError(f"{path} is a directory: name a file in it.")
    if not path.is_file():
        raise DataError(f"There is no file {path}: check the path.")
    try:
        empty = path.stat().st_size == 0
        path.open("rb").close()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check its permissions."
        ) from error
    if empty:
        raise DataError(f"{path} is empty: give a file with text in it.")


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file, without a byte-order mark; DataError if it is anything else."""
    check_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv -t utf-8."
        ) from error
    if not text.strip():
        raise DataError(f"{path} holds only white space: give a file with text in it.")
    return text


def tokenize(
    text: str, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None
) -> torch.Tensor:
    """Token ids of a whole text at once, int64 [T], no special tokens added.

    With the model's `vocab_size` an id outside it is a DataError; it would be an index error deep
    inside the model.
    """
    # verbose=False: a text longer than the model's context is the rule here, not worth a warning.
    encoded = tokenizer(
        text, add_special_tokens=False, truncation=False, return_attention_mask=False, verbose=False
    )
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    if vocab_size is not None:
        check_vocabulary(tokens, vocab_size)
    return tokens


def check_vocabulary(tokens: torch.Tensor, vocab_size: int) -> None:
    """Raise DataError if a tokenizer gave an id that the model has no embedding for."""
    largest = int(tokens.max()) if tokens.numel() else 0
    if largest >= vocab_size:
        raise DataError(
            f"The tokenizer gave token id {largest}, but the model's vocabulary ends at {vocab_size - 1}: "
            "use the tokenizer the model was trained with."
        )


def windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Consecutive windows [n, length] of tokens [T]; the last partial one is dropped, n may be 0.

    >>> windows(torch.arange(7), 3)
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    n = tokens.numel() // length
    return tokens[: n * length].reshape(n, length)
