"""Calibration without data: windows that the model writes itself, or random tokens.

Written as LLM-QAT does (Liu et al. 2023, arXiv 2305.17888): the first token is drawn from the whole vocabulary, the
next few are the likeliest, which makes of it the start of something plausible, and all after them are drawn from the
model's own distribution.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitfold.data.calibration import Calibration, check_samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "GENERATE",
    "RANDOM",
    "generated_windows",
    "marks_of",
    "random_windows",
    "resampled_windows",
    "write_windows",
]

GENERATE, RANDOM = "generate", "random"
LIKELIEST = 4
WINDOWS_AT_ONCE = 64
SHARE_DRAWN_ANEW = 0.5


def random_windows(samples: int, length: int, vocab_size: int, seed: int) -> Calibration:
    """Tokens drawn evenly from the vocabulary: what a method makes of no knowledge at all."""
    check_samples(samples)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (samples, length), generator=generator)
    source = f"{samples} windows of {length} random tokens, seed {seed}"
    return Calibration(tokens, source, notes=(), data_free=True)


def generated_windows(
    model: PreTrainedModel,
    samples: int,
    length: int,
    seed: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Text of the model's own, [samples, length] tokens; see `write_windows`."""
    check_samples(samples)
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(model.config.get_text_config().vocab_size)
    allowed[_marks(model)] = 0
    begun = torch.multinomial(allowed, samples, replacement=True, generator=generator).unsqueeze(1)
    tokens = write_windows(model, length, seed, report, begun, likeliest=LIKELIEST)
    source = f"{samples} windows of {length} tokens that the model wrote itself, seed {seed}"
    return Calibration(tokens, source, notes=(), data_free=True)


@torch.no_grad()
def write_windows(
    model: PreTrainedModel,
    length: int,
    seed: int,
    report: Callable[[int, int], None],
    begun: Tensor,
    *,
    likeliest: int = 0,
) -> Tensor:
    """Windows [samples, length] that begin with the tokens `begun` [samples, n]; the rest is the model's.

    likeliest: so many tokens are the likeliest, all after them drawn from the model's distribution; the same on the
    same device for the same seed. Tokens that mark the beginning or end of a text are never drawn, as windows of real
    text hold none. report(done, total): after every batch of windows.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    marks = _marks(model)
    written: list[Tensor] = []
    for part in begun.split(WINDOWS_AT_ONCE):
        written.append(_write(model, part[:, :length], length, generator, marks, likeliest))
        report(sum(map(len, written)), len(begun))
    return torch.cat(written)


def _write(
    model: PreTrainedModel,
    begun: Tensor,
    length: int,
    generator: torch.Generator,
    marks: list[int],
    likeliest: int,
) -> Tensor:
    """Token by token. Draws are made on the CPU, by one generator wherever the model is."""
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"use_cache": True} | ({"logits_to_keep": 1} if last_only else {})
    newest, written, cache = begun, [begun], None
    start = begun.shape[1]
    for position in range(start, length):
        output = model(input_ids=newest.to(model.device), past_key_values=cache, **options)
        cache = output.past_key_values
        logits = output.logits[:, -1].float().cpu()
        logits[:, marks] = -torch.inf
        sure = position < start + likeliest
        newest = logits.argmax(dim=-1, keepdim=True) if sure else _draw(logits, 1, generator)
        written.append(newest)
    return torch.cat(written, dim=1)


@torch.no_grad()
def resampled_windows(
    tokens: Tensor,
    logits: Iterable[Tensor],
    marks: list[int],
    copies: int,
    generator: torch.Generator,
) -> Tensor:
    """So many copies of windows [samples, length], [copies · samples, length], with half of the tokens drawn anew: each
    as the model expects it behind the tokens that stand before it in the original window.

    logits: the model's for each window, [length, vocabulary]. marks: tokens that are never drawn. A draw takes one pass
    for all tokens of a window instead of one each; what comes out is less of a text than what the model writes.
    """
    found = []
    for window, expected in zip(tokens, logits, strict=True):
        chances = expected[:-1].float().cpu().index_fill(1, torch.tensor(marks).long(), -torch.inf)
        drawn = _draw(chances, copies, generator).T
        anew = torch.rand(drawn.shape, generator=generator) < SHARE_DRAWN_ANEW
        copy = window.repeat(copies, 1)
        copy[:, 1:] = torch.where(anew, drawn, copy[:, 1:])
        found.append(copy)
    return torch.stack(found, dim=1).flatten(0, 1)


def _marks(model: PreTrainedModel) -> list[int]:
    config = model.config.get_text_config()
    return marks_of(config.vocab_size, config, model.generation_config)


def _draw(logits: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many tokens for each row of logits [rows, vocabulary], [rows, count], by the inverse of their distribution
    function: a sixth of the time of torch.multinomial."""
    reached = logits.softmax(dim=-1).cumsum(dim=-1)
    wanted = torch.rand(len(logits), count, generator=generator) * reached[:, -1:]
    # Rounding may make `wanted` the whole: then it is the last token that has a chance.
    last = torch.searchsorted(reached, reached[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(reached, wanted, right=True), last)


def marks_of(vocab_size: int, *configs: object) -> list[int]:
    """Ids of the tokens that mark a text's beginning, end or padding, by what any of a model's configs says."""
    found: list[int | None] = []
    for config in configs:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found += value if isinstance(value, list | tuple) else [value]
    return sorted({mark for mark in found if mark is not None and 0 <= mark < vocab_size})
