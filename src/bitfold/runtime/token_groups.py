"""Keys with a scale per channel and group of consecutive tokens, seen as a streaming cache holds them.

Token j is in group j // G. Its key k_j is quantized, by the least and the largest value of each channel in its group,
as soon as the group is full (KIVI, arXiv 2402.02750). So the query of token t sees

    k̂_j  for j < C(t),        k_j  for C(t) ≤ j ≤ t,        C(t) = G · ⌊(t + 1) / G⌋

No query sees anything that depends on later tokens. A pass over a whole window computes just this for all its queries,
and so does a cache that is given the same tokens in any other portions: prefill and decoding agree but for the order of
sums. A pass of several tokens needs both forms of the keys in the groups that become full within it: the second is
appended as further columns, and the mask says which query sees which.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics import TensorScheme

__all__ = ["KeysSeen", "full_tokens", "keys_seen", "quantize_groups", "seen_over_time"]


@dataclass(frozen=True)
class KeysSeen:
    """The keys [batch, heads, tokens, head_dim] of a pass.

    held:  as they stand after the pass, quantized in full groups; the first one is of token `first`.
    fresh: as they were, those of `tokens` in groups that became full after the pass' first token; None if there are
           none.
    """

    held: Tensor
    fresh: Tensor | None
    tokens: range
    first: int
    group_size: int


def full_tokens(tokens: int, group_size: int) -> int:
    """How many of the first tokens are in full groups."""
    return tokens // group_size * group_size


def quantize_groups(
    key: Tensor, scheme: TensorScheme, quantize: Callable[[Tensor, TensorScheme], Tensor]
) -> Tensor:
    """Keys [batch, heads, tokens, head_dim] of full groups, quantized; the first token begins one."""
    along_tokens = scheme.model_copy(update={"granularity": "group"})
    return quantize(key.transpose(-1, -2), along_tokens).transpose(-1, -2)


def keys_seen(
    key: Tensor,
    queries: int,
    scheme: TensorScheme,
    quantize: Callable[[Tensor, TensorScheme], Tensor],
    arguments: Mapping[str, object],
) -> KeysSeen:
    """What the last `queries` tokens see of all keys there have been, none of which is quantized yet.

    arguments: of the attention function. Raises RecipeError where an ordinary cache has dropped the first ones, and
    with them the groups' borders.
    """
    tokens, size = key.shape[-2], scheme.group_size
    assert size is not None
    past, window = tokens - queries, arguments.get("sliding_window")
    if isinstance(window, int) and past >= window - 1 > 0:
        raise RecipeError(
            f"An ordinary cache drops keys beyond the sliding window of {window} tokens, with their groups: pass "
            "past_key_values=bitfold.quantized_cache(model)."
        )
    full, before = full_tokens(tokens, size), full_tokens(past + 1, size)
    held = key
    if full:
        held = torch.cat(
            [quantize_groups(key[..., :full, :], scheme, quantize), key[..., full:, :]], -2
        )
    fresh = key[..., before:full, :] if before < full else None
    return KeysSeen(held, fresh, range(before, full), 0, size)


def seen_over_time(
    seen: KeysSeen, value: Tensor, mask: Tensor | None, queries: int, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of an attention in which the last `queries` tokens see each key as it was at their time.

    mask: boolean (True: attend) or additive, [..., queries, tokens]; without one `causal` decides.
    """
    if seen.fresh is None:
        return seen.held, value, mask
    key, device = seen.held, seen.held.device
    columns = torch.arange(seen.first, seen.first + key.shape[-2], device=device)
    times = columns[-queries:, None]
    again = torch.arange(seen.tokens.start, seen.tokens.stop, device=device)
    places = again - seen.first
    if mask is None:
        mask = columns <= times if causal else torch.ones_like(columns <= times)
    full = (times + 1) // seen.group_size * seen.group_size
    as_held = (columns < full) | (columns >= seen.tokens.stop)
    mask = torch.cat([_only(mask, as_held), _only(mask[..., places], again >= full)], dim=-1)
    key = torch.cat([key, seen.fresh], dim=-2)
    return key, torch.cat([value, value[..., places, :]], dim=-2), mask


def _only(mask: Tensor, where: Tensor) -> Tensor:
    """The mask, closed everywhere else."""
    if mask.dtype == torch.bool:
        return mask & where
    return mask.masked_fill(~where, torch.finfo(mask.dtype).min)
