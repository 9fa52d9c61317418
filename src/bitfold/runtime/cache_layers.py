"""Layers of transformers' cache that keep the keys and values of an attention in few bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from bitfold.runtime.packed_heads import Coding, PackedHeads
from bitfold.runtime.token_groups import KeysSeen, full_tokens

__all__ = ["PackedLayer", "PackedSlidingLayer"]


class PackedLayer(DynamicLayer):
    """The cache of one attention, in few bits; `keys` and `values` are what of it is not packed.

    turn: the map that the attention has queries and keys go through, which keys are cached behind.
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(
        self, key: Coding, value: Coding, turn: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.key_coding, self.value_coding, self.turn = key, value, turn
        self.length = 0
        # Set by an attention that asks for what it saw of keys before they were quantized.
        self.hands_over = False
        self._fresh: tuple[Tensor, range] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = PackedHeads(self.key_coding, key_states)
        self._values = PackedHeads(self.value_coding, value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, heads, tokens, head_dim]; returns those that the pass attends to."""
        if self.turn is not None:
            key_states = self.turn(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._fresh = self._before_they_are_packed(key_states) if self.hands_over else None
        visible = self._visible(key_states.shape[-2])
        self._keys.append(key_states)
        self._values.append(value_states)
        self.length += key_states.shape[-2]
        keys, values = (part.read()[:, :, -visible:] for part in (self._keys, self._values))
        self._forget()
        self._show()
        return keys, values

    def handed_over(self, key: Tensor) -> KeysSeen:
        """What a pass sees of the keys that `update` has just returned; once."""
        fresh, tokens = self._fresh or (None, range(0))
        self._fresh, self.hands_over = None, False
        first = self.length - key.shape[-2]
        if fresh is not None and tokens.start < first:
            fresh = fresh[:, :, first - tokens.start :]
            tokens = range(first, max(first, tokens.stop))
        return KeysSeen(key, fresh if len(tokens) else None, tokens, first, self.key_coding.tokens)

    def get_seq_length(self) -> int:
        """Tokens there have been."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens the next pass attends to, and the place of the first."""
        visible = self._visible(query_length)
        return visible, self.length + query_length - visible

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self._fresh = None
        self.is_initialized, self.length = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, given as a negative number. What is left of a group of tokens that was full stays
        at its quantized values."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the tokens to remove, not {tokens_to_remove}.")
        count = min(-tokens_to_remove, self.length)
        if count and self.is_initialized:
            self._keys.drop_last(count)
            self._values.drop_last(count)
            self.length -= count
            self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose sequences of the batch, as beams do."""
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence of the batch so many times."""
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some sequences of the batch."""
        self._change(lambda part: part[indices, ...])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._change(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to where keys came from."""
        if self.is_initialized:
            self._change(lambda part: part.to(self.device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are held between passes."""
        return self._keys.nbytes + self._values.nbytes if self.is_initialized else 0

    @property
    def bfloat16_bytes(self) -> int:
        """Bytes of an ordinary layer in bfloat16."""
        if not self.is_initialized:
            return 0
        batch, heads = self._keys.rest.shape[:2]
        tokens = self._visible(1) - 1
        return 2 * batch * heads * tokens * (self._keys.size + self._values.size)

    def _visible(self, queries: int) -> int:
        """How many tokens the next pass attends to, its own included."""
        return self.length + queries

    def _forget(self) -> None:
        """Drop what no later pass attends to."""

    def _before_they_are_packed(self, key_states: Tensor) -> tuple[Tensor, range] | None:
        """Keys of the groups that this pass fills after its first token, and their places."""
        size, total = self.key_coding.tokens, self.length + key_states.shape[-2]
        places = range(full_tokens(self.length + 1, size), full_tokens(total, size))
        if size == 1 or not len(places):
            return None
        keys = torch.cat([self._keys.rest, key_states], dim=2)
        start = total - keys.shape[2]
        return keys[:, :, places.start - start : places.stop - start], places

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self._keys.change(how)
            self._values.change(how)
            self._show()

    def _show(self) -> None:
        self.keys, self.values = self._keys.rest, self._values.rest


class PackedSlidingLayer(PackedLayer):
    """The same for an attention that sees a window of tokens; older ones are dropped, group by group."""

    is_sliding = True

    def __init__(
        self,
        key: Coding,
        value: Coding,
        sliding_window: int,
        turn: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(key, value, turn)
        self.sliding_window = sliding_window
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keep everything until `crop` is called."""
        self.record_past = True

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """As in every layer; beyond the window only where the past is recorded, since what was dropped is gone."""
        if tokens_to_remove and not self.record_past and self.length >= self.sliding_window:
            raise RuntimeError(
                "Tokens beyond the sliding window are gone: call activate_past_recording() before, to crop after."
            )
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self._drop_beyond_window()
            self._show()

    def _visible(self, queries: int) -> int:
        return min(super()._visible(queries), self.sliding_window - 1 + queries)

    def _forget(self) -> None:
        if not self.record_past:
            self._drop_beyond_window()

    def _drop_beyond_window(self) -> None:
        for part in (self._keys, self._values):
            part.drop_first(max(0, part.tokens - (self.sliding_window - 1)))
