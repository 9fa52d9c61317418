"""The two activation streams, as they stand before a block: X of the original model, X̂ of the quantized one.

Each holds the hidden states of all calibration windows. `probe` is a short stream of both kinds that every method
has, calibrated or not: errors are measured on it, equivalence is checked on it, and at the end it becomes the logits
that `verify` compares an artifact with.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitfold.models.skeleton import Skeleton

__all__ = ["TOKENS_PER_BATCH", "Streams", "advance", "batches", "embedded", "last_hidden"]

TOKENS_PER_BATCH = 2048
PROBE_WINDOWS = 2
PROBE_LENGTH = 64
DATA_FREE_PROBE_LENGTH = 256


@dataclass
class Streams:
    """Hidden states [windows, length, hidden]; the calibration streams are None where they are not needed.

    ahead: `original` one block further, while a block is held against it; None in between.
    """

    probe_original: Tensor
    probe_quantized: Tensor
    original: Tensor | None
    quantized: Tensor | None
    ahead: Tensor | None = None

    @classmethod
    def start(
        cls,
        skeleton: Skeleton,
        outer: Mapping[str, Tensor],
        tokens: Tensor | None,
        probe: Tensor,
        *,
        keep_original: bool,
    ) -> "Streams":
        """The streams before the first block, from token ids [windows, length]."""
        probe_hidden = skeleton.embed(outer, probe.to(skeleton.device)).cpu()
        hidden = None if tokens is None else embedded(skeleton, outer, tokens)
        original = hidden.clone() if hidden is not None and keep_original else None
        return cls(probe_hidden, probe_hidden.clone(), original, hidden)

    def save(self, file: Path) -> None:
        """Store both streams verbatim: recomputing X̂ from written blocks could differ in the last bit, and then
        a resumed run would not give the bytes of an uninterrupted one."""
        save_file({name: value for name, value in vars(self).items() if value is not None}, file)

    @classmethod
    def restore(cls, file: Path) -> "Streams":
        """What `save` stored; copied, because matrix products may depend on how their operands are aligned."""
        named = {name: value.clone() for name, value in load_file(file).items()}
        return cls(
            named["probe_original"],
            named["probe_quantized"],
            named.get("original"),
            named.get("quantized"),
        )


def batches(windows: Tensor) -> Iterator[Tensor]:
    """Slices of [windows, length, …] of about `TOKENS_PER_BATCH` tokens each; writing to one writes to the stream."""
    yield from windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))


def advance(stream: Tensor, run: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """Replace a stream by what a block makes of it, batch by batch, in place."""
    for batch in batches(stream):
        batch.copy_(run(batch.to(device)))


@torch.no_grad()
def last_hidden(
    skeleton: Skeleton, tokens: Tensor, dtype: torch.dtype, *, low: bool = False
) -> Tensor:
    """What the original's last block gives for token ids [windows, length]: [windows, length, hidden] on the CPU.

    low: matrix products in bfloat16.
    """
    outer = skeleton.load_outer(dtype)
    hidden = embedded(skeleton, outer, tokens)
    with torch.autocast(skeleton.device.type, torch.bfloat16, enabled=low):
        for index in range(len(skeleton.blocks)):
            weights = skeleton.load_block(index, dtype)
            advance(hidden, partial(skeleton.run, index, weights), skeleton.device)
    return hidden


def embedded(skeleton: Skeleton, outer: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """What the first block is given for token ids [windows, length], on the CPU."""
    parts = [skeleton.embed(outer, part.to(skeleton.device)).cpu() for part in batches(tokens)]
    return torch.cat(parts)
