"""The models that are measured: opened, asked what they can take, and run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitfold.data.text import check_sequence_length
from bitfold.errors import DataError
from bitfold.runtime.load import load, load_tokenizer

__all__ = [
    "check_positions",
    "evaluating",
    "last_logits",
    "opened",
    "positions",
    "tokenizer_of",
    "vocab_size",
]


def opened(
    model: str | Path | PreTrainedModel,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The model of a directory or hub name; a loaded one stays where and as it is."""
    if not isinstance(model, str | Path):
        return model
    return load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


def tokenizer_of(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    trust_remote_code: bool,
) -> PreTrainedTokenizerBase:
    """The tokenizer that was given, else the checkpoint's own; DataError for a loaded model without one."""
    if tokenizer is not None:
        return tokenizer
    if not isinstance(model, str | Path):
        raise DataError("A loaded model does not carry its tokenizer: pass tokenizer=.")
    return load_tokenizer(model, trust_remote_code=trust_remote_code)


def vocab_size(model: PreTrainedModel) -> int:
    """How many tokens its logits are of."""
    return int(model.config.get_text_config().vocab_size)


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens it takes at once; None where the config does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def check_positions(model: PreTrainedModel, length: int) -> None:
    """Raise DataError for windows that the model cannot take, or in which nothing can be predicted."""
    check_sequence_length(length)
    limit = positions(model)
    if limit and length > limit:
        raise DataError(
            f"A sequence length of {length} is more than the {limit} positions of the model: "
            f"choose at most {limit}."
        )


@contextmanager
def evaluating(model: PreTrainedModel | None) -> Iterator[None]:
    """Without dropout; a model that was training goes on training afterwards."""
    if model is None:
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def last_logits(model: PreTrainedModel, ids_BL: torch.Tensor, count: int) -> torch.Tensor:
    """Logits [B, count, V] of the last `count` positions; where the model can, no others are computed."""
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": count} if keeps else {}
    logits_BLV = model(input_ids=ids_BL.to(model.device), use_cache=False, **options).logits
    return logits_BLV[:, -count:]
