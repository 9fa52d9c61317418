"""Greedy generation, with the two speeds and the memory a user feels."""

from __future__ import annotations

import inspect
import re
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from bitfold.data.text import check_vocabulary
from bitfold.errors import DataError
from bitfold.evaluate.memory import peak_rss_mb
from bitfold.runtime.kv_cache import PackedCache, cache_memory, quantized_cache, quantizes_cache
from bitfold.runtime.load import load, load_tokenizer
from bitfold.runtime.quick_loading import load_quick
from bitfold.runtime.quicken import QuickLayer, forms_of

__all__ = ["Generation", "generate", "greedy"]


_LISTS = ("tokens", "cache_notes", "form_notes")


@dataclass(frozen=True)
class Generation:
    """What was generated, and how fast.

    text                       the new tokens as text, without the prompt and special tokens
    tokens                     their ids, an end-of-sequence token included
    prefill_seconds            from the prompt to the first new token
    prompt_tokens_per_second   of the prompt, in that time
    decode_tokens_per_second   of the tokens after the first; None if there were none
    peak_rss_mb                MiB the whole process has held so far, loading included
    cache_bytes                of all tensors that the cache of keys and values holds at the end
    cache_bytes_per_token      the same over the tokens it has seen
    cache_bytes_bf16           of an ordinary cache in bfloat16
    cache_notes                what the user should know of the cache
    forms                      how many layers ran in which quick form, `as loaded` those that have none; empty where
                               nothing was made quick
    form_notes                 why layers ran as loaded
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_tokens_per_second: float | None
    peak_rss_mb: float
    cache_bytes: int
    cache_bytes_per_token: float
    cache_bytes_bf16: int
    cache_notes: tuple[str, ...] = ()
    forms: dict[str, int] = field(default_factory=dict)
    form_notes: tuple[str, ...] = ()

    @property
    def prompt_tokens_per_second(self) -> float:
        """Tokens of the prompt over the seconds to the first new one."""
        return self.prompt_tokens / self.prefill_seconds

    def to_json(self) -> dict[str, Any]:
        """All fields under their names."""
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        return asdict(self) | lists | {"prompt_tokens_per_second": self.prompt_tokens_per_second}


def generate(
    model: str | Path | PreTrainedModel,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    kv_bits: int | None = None,
    cache: Cache | None = None,
    exact: bool = False,
) -> Generation:
    """Continue a prompt with the likeliest token each time, until end-of-sequence or the limit.

    The prompt is tokenized with the tokenizer's own special tokens. `model` is a directory, a hub
    name or a loaded model, which then needs a `tokenizer` and stays where and as it is.

    Keys and values are stored in few bits where the model is an artifact whose scheme quantizes them, or where
    `kv_bits` says so (`runtime/kv_cache.py`). `cache`: an empty one of transformers' kind to use instead.

    An artifact that is loaded here, on a CPU, runs in quick forms (`runtime/quick_loading.py`), which round less than
    bfloat16 does, and otherwise than `evaluate` and `verify`: where two tokens are about as likely, the other one may
    come. `exact`: as those run it.

    Raises DataError for a prompt that is empty or does not fit the model's positions together with
    the new tokens, and for a cache that is not empty; RecipeError for bits that the cache cannot have, or that a scheme
    has decided already; CheckpointError for checkpoints.
    """
    if max_new_tokens < 1:
        raise DataError(
            f"The number of new tokens must be at least 1, not {max_new_tokens}: ask for more."
        )
    if not prompt:
        raise DataError("The prompt is empty: give some text to continue.")
    if re.search("[\ud800-\udfff]", prompt):  # what a shell's bytes become that are no UTF-8
        raise DataError("The prompt is not UTF-8: convert it, e.g. with iconv -t utf-8.")
    if tokenizer is None:
        if not isinstance(model, str | Path):
            raise DataError("A loaded model does not carry its tokenizer: pass tokenizer=.")
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    layers: list[QuickLayer] = []
    if isinstance(model, str | Path):
        with_code = trust_remote_code
        if exact:
            model = load(model, device=device, dtype=dtype, trust_remote_code=with_code)
        else:
            model, layers = load_quick(
                model, device=device, dtype=dtype, trust_remote_code=with_code
            )
    prompt_T = torch.tensor(tokenizer(prompt, verbose=False)["input_ids"], dtype=torch.int64)
    check_vocabulary(prompt_T, model.config.get_text_config().vocab_size)
    _check_fits(model, len(prompt_T), max_new_tokens)
    cache = _cache(model, kv_bits, cache)

    training = model.training
    model.eval()
    try:
        tokens, prefill_seconds, decode_seconds = greedy(
            model, prompt_T, max_new_tokens, cache, _end_tokens(model)
        )
    finally:
        model.train(training)
    held = cache_memory(cache)
    return Generation(
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tuple(tokens),
        prompt_tokens=len(prompt_T),
        new_tokens=len(tokens),
        prefill_seconds=prefill_seconds,
        decode_tokens_per_second=(len(tokens) - 1) / decode_seconds if len(tokens) > 1 else None,
        peak_rss_mb=peak_rss_mb(),
        cache_bytes=held.bytes,
        cache_bytes_per_token=held.bytes / held.tokens,
        cache_bytes_bf16=held.bfloat16_bytes,
        cache_notes=cache.notes if isinstance(cache, PackedCache) else (),
        forms=forms_of(layers),
        form_notes=_form_notes(layers),
    )


def _form_notes(layers: Sequence[QuickLayer]) -> tuple[str, ...]:
    """A sentence for each reason that there was."""
    left = Counter(layer.why for layer in layers if layer.form is None)
    first = {layer.why: layer.name for layer in reversed(layers)}
    return tuple(
        f"{count} {'layer runs as it was' if count == 1 else 'layers run as they were'} loaded ({first[why]}): {why}."
        for why, count in left.items()
    )


def _cache(model: PreTrainedModel, kv_bits: int | None, cache: Cache | None) -> Cache:
    """The cache that was given, that of `kv_bits` or the model's scheme, or else an ordinary one."""
    if cache is None:
        if kv_bits is not None or quantizes_cache(model):
            return quantized_cache(model, kv_bits)
        return DynamicCache(config=model.config)
    if kv_bits is not None:
        raise DataError("A cache that is given has bits of its own: leave out kv_bits.")
    if cache.get_seq_length():
        raise DataError(
            f"The cache holds {cache.get_seq_length()} tokens of another text: give an empty one."
        )
    return cache


def _check_fits(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if prompt_tokens < 1:
        raise DataError("The prompt holds no token: give some text to continue.")
    if not positions or prompt_tokens + max_new_tokens <= positions:
        return
    if prompt_tokens >= positions:
        raise DataError(
            f"The prompt's {prompt_tokens} tokens leave none of the model's {positions} positions: "
            "shorten it."
        )
    raise DataError(
        f"The {prompt_tokens} tokens of the prompt and {max_new_tokens} new ones are beyond the model's "
        f"{positions} positions: ask for at most {positions - prompt_tokens} new tokens."
    )


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prompt_T: torch.Tensor,
    max_new_tokens: int,
    cache: Cache,
    ends: Collection[int],
) -> tuple[list[int], float, float]:
    """New token ids, and the seconds of prefill and of decoding, which stops at a token of `ends`."""
    # Only the last position's logits are needed; a long prompt's all would be gigabytes.
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": True, "past_key_values": cache}
    options |= {"logits_to_keep": 1} if last_only else {}

    start = time.perf_counter()
    output = model(input_ids=prompt_T[None].to(model.device), **options)
    tokens = [int(output.logits[0, -1].argmax())]  # int() waits for the device
    prefilled = time.perf_counter()
    while len(tokens) < max_new_tokens and tokens[-1] not in ends:
        newest = torch.tensor([tokens[-1:]], device=model.device)
        output = model(input_ids=newest, **options)
        tokens.append(int(output.logits[0, -1].argmax()))
    return tokens, prefilled - start, time.perf_counter() - prefilled


def _end_tokens(model: PreTrainedModel) -> set[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = model.config.get_text_config().eos_token_id
    if configured is None:
        return set()
    return set(configured) if isinstance(configured, list | tuple) else {int(configured)}
