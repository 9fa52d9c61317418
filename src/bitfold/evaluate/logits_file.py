"""llama.cpp's file of log-probabilities, which `llama-perplexity --kl-divergence-base` writes and reads.

    8 bytes   "_logits_"
    int32     n_ctx, n_vocab, n_chunk
    int32     tokens [n_chunk, n_ctx], as the text was cut; a BOS is not in them, but in place of a chunk's first
    rows      [n_chunk, n_ctx − 1 − n_ctx // 2], for the logits of positions n_ctx // 2 … n_ctx − 2 of each chunk:
              float32 scale, float32 low, uint16 codes [n_vocab, made even];  log p = scale · code + low

All little-endian. A row reaches from its largest logit 16 nats down; what is below has code 0. llama.cpp has the
layout in tools/perplexity/perplexity.cpp.

Shape suffixes: n chunks, L tokens of a chunk, T predicted tokens, V vocabulary.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from bitfold.errors import DataError, OutputError

__all__ = [
    "LogitsFile",
    "check_place",
    "decode_rows",
    "encode_rows",
    "read_logits_file",
    "writing_logits_file",
]

MAGIC = b"_logits_"
HEADER = struct.Struct("<8s3i")
DEPTH = 16.0
"""How far below a row's largest logit codes reach, in nats."""
LARGEST_CODE = 65535
FRONT = 4
"""uint16s in front of a row's codes, which are two float32."""
SHORTEST = 3
"""Tokens of a chunk in which something is predicted after its first half."""


@dataclass(frozen=True)
class LogitsFile:
    """What stands in front of the rows, and where they are. tokens: int64 [n, L]."""

    path: Path
    tokens: torch.Tensor
    vocab_size: int

    @property
    def first(self) -> int:
        """The first position of a chunk whose logits are in the file."""
        return self.tokens.shape[1] // 2

    @property
    def predicted(self) -> int:
        """Rows of a chunk: its last position predicts nothing that is there."""
        return self.tokens.shape[1] - 1 - self.first

    @property
    def row_width(self) -> int:
        """uint16s of a row."""
        return 2 * ((self.vocab_size + 1) // 2) + FRONT

    @property
    def header_bytes(self) -> int:
        """Before the rows."""
        return HEADER.size + 4 * self.tokens.numel()

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        return self.header_bytes + 2 * len(self.tokens) * self.predicted * self.row_width

    @contextmanager
    def reading(self) -> Iterator[Callable[[int], np.ndarray]]:
        """What gives the next so many rows, uint16 [T, row_width]."""
        with self.path.open("rb") as file:
            file.seek(self.header_bytes)

            def read(count: int) -> np.ndarray:
                rows = np.fromfile(file, dtype="<u2", count=count * self.row_width)
                if rows.size < count * self.row_width:
                    raise DataError(f"{self.path} became shorter while it was read: copy it again.")
                return rows.reshape(count, self.row_width)

            yield read


# --- rows ---


def encode_rows(logits_TV: torch.Tensor) -> np.ndarray:
    """Logits [T, V] as the file's rows, uint16 [T, row_width].

    Raises DataError for logits among which is NaN or plus infinity.
    """
    logits_TV = logits_TV.float().cpu()
    top_T = logits_TV.amax(-1)
    if not top_T.isfinite().all():  # the largest of a row with NaN is NaN
        raise DataError(
            "The model's logits are not all finite numbers: the file would be of no use; take another dtype."
        )
    low_T = logits_TV.amin(-1).maximum(top_T - DEPTH)
    log_sum_T = (logits_TV - top_T[:, None]).exp().sum(-1, dtype=torch.float64).log().float()
    scale_T = (top_T - low_T) / LARGEST_CODE
    # Where all logits are one, there is nothing to scale, and every code is 0.
    inverse_T = torch.where(scale_T > 0, 1 / scale_T, 0)
    codes_TV = ((logits_TV - low_T[:, None]) * inverse_T[:, None]).round_()
    codes_TV = codes_TV.clamp_(0, LARGEST_CODE).to(torch.int32)
    count, vocab_size = logits_TV.shape
    rows = np.zeros((count, 2 * ((vocab_size + 1) // 2) + FRONT), dtype="<u2")
    front = torch.stack([scale_T, low_T - top_T - log_sum_T], dim=-1)
    rows[:, :FRONT] = front.numpy().astype("<f4").view("<u2")
    rows[:, FRONT : FRONT + vocab_size] = codes_TV.numpy()
    return rows


def decode_rows(rows: np.ndarray, vocab_size: int) -> torch.Tensor:
    """Log-probabilities [T, V], float32, of the file's rows."""
    front = torch.from_numpy(rows[:, :FRONT].copy().view("<f4").astype(np.float32))
    codes_TV = torch.from_numpy(rows[:, FRONT : FRONT + vocab_size].astype(np.float32))
    return codes_TV.mul_(front[:, :1]).add_(front[:, 1:])


# --- the file ---


def read_logits_file(path: Path) -> LogitsFile:
    """Header and tokens; DataError for a file that is none of llama.cpp's, contradicts itself or is truncated."""
    if path.is_dir():
        raise DataError(f"{path} is a directory: name a file in it.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _read(path, file, size)
    except FileNotFoundError as error:
        raise DataError(
            f"There is no file {path}: check the path, or make it of the original with --text FILE --write."
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check its permissions."
        ) from error


def _read(path: Path, file: IO[bytes], size: int) -> LogitsFile:
    header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise DataError(
            f"{path} is no file of llama-perplexity --kl-divergence-base: it does not begin with {MAGIC.decode()}."
        )
    if len(header) < HEADER.size:
        raise _truncated(path, size, HEADER.size)
    _, length, vocab_size, count = HEADER.unpack(header)
    if length < SHORTEST or vocab_size < 1 or count < 1:
        raise DataError(
            f"{path} promises {count} chunks of {length} tokens out of {vocab_size}, which cannot be: write it again."
        )
    ahead = HEADER.size + 4 * length * count
    if size < ahead:
        raise _truncated(path, size, ahead)
    tokens = np.frombuffer(file.read(4 * length * count), dtype="<i4").astype(np.int64)
    found = LogitsFile(path, torch.from_numpy(tokens.reshape(count, length)), vocab_size)
    if size < found.bytes:
        raise _truncated(path, size, found.bytes)
    if size > found.bytes:
        raise DataError(
            f"{path} has {size:,} bytes, but its header promises {found.bytes:,}: it is of another program or version."
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise DataError(
            f"{path} has a token outside its own vocabulary of {vocab_size}: copy or write it again."
        )
    return found


def _truncated(path: Path, size: int, promised: int) -> DataError:
    return DataError(
        f"{path} is truncated ({size:,} bytes, at least {promised:,} are promised): copy or write it again."
    )


@contextmanager
def writing_logits_file(file: LogitsFile) -> Iterator[Any]:
    """A file for the rows of all chunks in order (`.write`). It gets its name when it is whole, else it is gone.

    Raises OutputError for a place that is taken or cannot be written, or has no room.
    """
    path = file.path
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    check_place(path)
    _check_room(path, file.bytes)
    try:
        with temporary.open("xb") as output:
            length = file.tokens.shape[1]
            output.write(HEADER.pack(MAGIC, length, file.vocab_size, len(file.tokens)))
            output.write(file.tokens.numpy().astype("<i4").tobytes())
            yield output
        temporary.rename(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror}): choose another place."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raise OutputError for a place that is taken or is none."""
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path} is there already: remove it, or choose another name.")
    if not path.parent.is_dir():
        raise OutputError(f"There is no directory {path.parent}: make it, or choose another place.")


def _check_room(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OutputError(
            f"{path} takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} are free: take fewer windows (--limit), "
            "or another place."
        )
