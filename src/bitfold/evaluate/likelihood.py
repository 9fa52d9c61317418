"""How likely a model finds the ways in which a text may go on: the log-likelihoods that lm-eval takes.

Shape suffixes: B rows of a batch, L tokens, C tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitfold.evaluate.models import evaluating, last_logits, positions
from bitfold.evaluate.statistics import at_least_float32
from bitfold.runtime.device import quick_float32

__all__ = ["Continuation", "encode_pair", "log_likelihoods", "longest_input"]

TOKENS_PER_BATCH = 2048
"""Tokens that run at once by default; more are no faster on a CPU."""
NO_LIMIT = 2048
"""lm-eval's, where neither config nor tokenizer say how long an input may be."""


@dataclass(frozen=True)
class Continuation:
    """Tokens of a context, and those of what comes after it."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, after: str) -> Continuation:
    """As lm-eval cuts a pair: white space at the context's end belongs to what comes after, both are encoded together,
    and what goes beyond the context's own tokens is the continuation, which may be empty where tokens merge.
    """
    stripped = context.rstrip()
    after = context[len(stripped) :] + after
    own = _encode(tokenizer, stripped)
    return Continuation(tuple(own), tuple(_encode(tokenizer, stripped + after)[len(own) :]))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """With the tokenizer's special tokens, unless the text begins with the one that it would put there."""
    start = tokenizer.bos_token if tokenizer.bos_token is not None else tokenizer.eos_token
    special = start is None or not text.startswith(str(start))
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens of context and continuation the model is given at most."""
    limit = positions(model) or tokenizer.model_max_length
    return int(limit) if limit and limit < 10**9 else NO_LIMIT  # transformers says 10³⁰ for none


@torch.no_grad()
@quick_float32()
def log_likelihoods(
    model: PreTrainedModel,
    pairs: Sequence[Continuation],
    longest: int,
    *,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Sum of the log-probabilities of each continuation's tokens, in nats.

    pairs      continuations of at least one token and at most `longest`; contexts are cut on the left to fit
    batch      rows that run at once; default: what makes about 2048 tokens
    progress   called with (continuations done, in all)

    Rows of a batch are equally long, so that nothing is padded: what is quantized across tokens sees no padding. Inputs
    that are the same, as those of choices of one token, run once. Computed in float32, or float64 if the logits are.
    """
    sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        # The last token is only predicted: it is no input.
        sharing[(pair.context + pair.tokens)[-(longest + 1) : -1]].append(index)
    found = [0.0] * len(pairs)
    done = 0
    with evaluating(model):
        for rows in _batches(list(sharing), batch):
            count = max(len(pairs[index].tokens) for row in rows for index in sharing[row])
            logits_BCV = last_logits(model, torch.tensor(rows), count)
            for row, logits_CV in zip(rows, logits_BCV, strict=True):
                log_p_CV = torch.log_softmax(at_least_float32(logits_CV), dim=-1)
                for index in sharing[row]:
                    found[index] = _sum(log_p_CV, pairs[index].tokens)
                    done += 1
            if progress is not None:
                progress(done, len(pairs))
    return found


def _batches(rows: list[tuple[int, ...]], batch: int | None) -> Iterator[list[tuple[int, ...]]]:
    """Rows of equal length together, the longest first: what does not fit, shows at once."""
    for length, equal in groupby(sorted(rows, key=len, reverse=True), key=len):
        members = list(equal)
        size = batch or max(1, TOKENS_PER_BATCH // length)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _sum(log_p_CV: torch.Tensor, tokens: tuple[int, ...]) -> float:
    next_C = torch.tensor(tokens, device=log_p_CV.device)
    return float(log_p_CV[-len(tokens) :].gather(-1, next_C[:, None]).sum())
