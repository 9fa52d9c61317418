"""Calibration data: windows of token ids from text, JSON lines or NumPy files."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitfold.assets import CALIBRATION_TEXT
from bitfold.data.jsonl import check_characters, json_lines
from bitfold.data.text import check_file, check_sequence_length, read_text, tokenize, windows
from bitfold.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Calibration", "check_samples", "load_calibration"]

SUFFIXES = (".txt", ".jsonl", ".npy")
DOCUMENT_BREAK = "\n\n"


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids, and where they come from.

    tokens   int64 [samples, length]
    source   one line for people
    notes    what a user may not expect: fewer windows than asked for, the embedded text
    data_free   whether no one wrote it: the model did, or chance
    """

    tokens: torch.Tensor
    source: str
    notes: tuple[str, ...]
    data_free: bool = False

    @property
    def sha256(self) -> str:
        """Of the tokens' bytes (little-endian int64), for the artifact's provenance."""
        return hashlib.sha256(self.tokens.numpy().astype("<i8").tobytes()).hexdigest()


def load_calibration(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    vocab_size: int,
) -> Calibration:
    """Read calibration windows from files; with no files, from the embedded text.

    .txt and .jsonl (a `text`, or `messages` for the tokenizer's chat template, on every line) are
    joined by blank lines in the order given, tokenized whole without special tokens, cut in
    consecutive windows of `sequence_length`, and `samples` of them drawn by `seed`, kept in order.
    .npy holds token ids [samples, length]: the first `samples` rows, each cut to `sequence_length`.

    `tokenizer` may be None where all files are .npy.

    Raises DataError naming the file, the line where there is one, and the mend.
    """
    check_samples(samples)
    check_sequence_length(sequence_length)
    paths = [Path(file) for file in files]
    notes = []
    if not paths:
        paths = [CALIBRATION_TEXT]
        notes.append("no calibration file given: used the embedded WikiText-2 excerpt")
    for path in paths:
        _check_suffix(path)
        check_file(path)

    names = ", ".join(path.name for path in paths)
    in_arrays = [path.suffix.lower() == ".npy" for path in paths]
    if all(in_arrays):
        rows = _read_rows(paths, sequence_length, vocab_size)
        chosen = rows[:samples]
        how = f"the first {len(chosen)} of {len(rows)} rows"
        if rows.shape[1] < sequence_length:
            notes.append(
                f"{names}: rows of {rows.shape[1]} tokens, shorter than {sequence_length},"
                " are used as they are"
            )
    elif any(in_arrays):
        raise DataError(
            f"Token ids (.npy) and text cannot be mixed ({names}): give files of one kind."
        )
    else:
        assert tokenizer is not None, "text needs a tokenizer"
        text = DOCUMENT_BREAK.join(_read_documents(path, tokenizer) for path in paths)
        rows = _cut(tokenize(text, tokenizer, vocab_size=vocab_size), sequence_length, names)
        generator = torch.Generator().manual_seed(seed)
        chosen = rows[torch.randperm(len(rows), generator=generator)[:samples].sort().values]
        how = f"{len(chosen)} of {len(rows)} windows drawn with seed {seed}"

    if len(rows) < samples:
        notes.append(f"{names}: {len(rows)} samples where {samples} were asked for: all are used")
    return Calibration(
        tokens=chosen.contiguous(),
        source=f"{names}: {how}, {chosen.shape[1]} tokens each",
        notes=tuple(notes),
    )


def check_samples(samples: int) -> None:
    """Raise DataError for fewer than one calibration window."""
    if samples < 1:
        raise DataError(f"The number of samples must be at least 1, not {samples}: give more.")


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES and not path.is_dir():
        raise DataError(
            f"{path} is an unknown kind of calibration file: give one of {', '.join(SUFFIXES)}."
        )


def _cut(tokens: torch.Tensor, length: int, names: str) -> torch.Tensor:
    rows = windows(tokens, length)
    if not len(rows):
        raise DataError(
            f"{names} gives {tokens.numel()} tokens, but one window needs {length}: "
            "give more text or a shorter sequence length."
        )
    return rows


# --- text and JSON lines ---


def _read_documents(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    if path.suffix.lower() == ".txt":
        return read_text(path)
    return DOCUMENT_BREAK.join(
        _document(record, where, tokenizer) for where, record in json_lines(path)
    )


def _document(record: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not isinstance(record, dict) or not {"text", "messages"} & record.keys():
        raise DataError(f"{where} has neither 'text' nor 'messages': give every line one of them.")
    text = (
        record["text"] if "text" in record else _render_chat(record["messages"], where, tokenizer)
    )
    if not isinstance(text, str):
        raise DataError(f"{where}: 'text' must be a string, not {type(text).__name__}: correct it.")
    check_characters(text, where)
    return text


def _render_chat(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: 'messages' need a chat template, and this model's tokenizer has none: "
            "give 'text' instead."
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (
        Exception
    ) as error:  # a template is a programme of the model's author: it may raise anything
        raise DataError(
            f"{where}: the chat template refuses these messages ({error}): "
            "give a list of {'role': …, 'content': …} in the order the model expects."
        ) from error


# --- arrays of token ids ---


def _read_rows(paths: Sequence[Path], sequence_length: int, vocab_size: int) -> torch.Tensor:
    """Rows of all files, int64 [n, min(length, sequence_length)]."""
    parts = [_read_array(path, vocab_size)[:, :sequence_length] for path in paths]
    if len({part.shape[1] for part in parts}) > 1:
        lengths = zip(paths, (part.shape[1] for part in parts), strict=True)
        each = ", ".join(f"{path.name} {length}" for path, length in lengths)
        raise DataError(f"Rows of different lengths cannot be mixed ({each}): give one length.")
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _read_array(path: Path, vocab_size: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is not a plain NumPy array (pickles are refused): "
            "save integer token ids [samples, length] with numpy.save."
        ) from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is an archive of arrays: save one array with numpy.save.")
    if array.dtype.kind not in "iu":
        raise DataError(
            f"{path} holds {array.dtype} values, but token ids must be integers: save them as such."
        )
    if array.ndim != 2:
        raise DataError(
            f"{path} has shape {array.shape}, but token ids must be [samples, length]: reshape them."
        )
    if array.shape[0] < 1 or array.shape[1] < 2:
        raise DataError(
            f"{path} has shape {array.shape}: give at least 1 row of at least 2 tokens."
        )
    for token in (int(array.min()), int(array.max())):
        if not 0 <= token < vocab_size:
            raise DataError(
                f"{path} holds token id {token}, outside the model's vocabulary of {vocab_size} "
                f"(0 to {vocab_size - 1}): tokenize with this model's tokenizer."
            )
    return array
