"""Gradients of a model's distance to the original, one block at a time.

The batch runs through the blocks; then the gradient goes back from the head, block by block. Where the graphs of all
blocks are too large to be held at once, each block is run once more when its turn comes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bitfold.models.skeleton import Skeleton
from bitfold.pipeline.streams import batches
from bitfold.statistics import widened

__all__ = ["BlockRun", "HeadLoss", "gradient_through", "leaves"]

# So many logits are held at once.
_LOGITS = 2**24
# The graphs of all blocks are kept where they take about so many bytes.
_GRAPHS = 2**30
# Bytes that a block's graph keeps of a token, in hidden states: about, for the choice only.
_STATES = 256


def gradient_through(
    blocks: int,
    given: Tensor,
    run: Callable[[int, Tensor], "BlockRun"],
    forward: Callable[[int, Tensor], Tensor],
    head: Callable[[Tensor], tuple[float, Tensor]],
) -> tuple[float, Tensor]:
    """A loss, and its gradient with respect to what the first block is given [windows, length, hidden].

    run(index, hidden): a block, with its graph; adds to its own gradients when it is taken back. forward(index,
    hidden): the same without a graph. head(hidden): the loss of what the last block gave, and the gradient with respect
    to it.
    """
    hidden = given
    if blocks * given.numel() * _STATES <= _GRAPHS:
        runs: list[BlockRun] = []
        for index in range(blocks):
            runs.append(run(index, hidden))
            hidden = runs[-1].output
        total, backward = head(hidden)
        while runs:
            backward = runs.pop().take_back(backward)
        return total, backward
    states = []
    for index in range(blocks):
        states.append(hidden)
        with torch.no_grad():
            hidden = forward(index, hidden)
    total, backward = head(hidden)
    for index in reversed(range(blocks)):
        backward = run(index, states.pop()).take_back(backward)
    return total, backward


class BlockRun:
    """A block that was run with a graph: pieces of a batch, [windows, length, hidden] each, in and out."""

    def __init__(self, run: Callable[[Tensor], Tensor], given: Tensor, gather: "_Gather") -> None:
        """run: the block on a piece of what it is given, [windows, length, hidden], which it takes to its device."""
        self._gather = gather
        self._parts: list[tuple[Tensor, Tensor]] = []
        with torch.enable_grad():
            for part in batches(given):
                hidden = part.detach().requires_grad_()
                self._parts.append((hidden, run(hidden)))

    @property
    def output(self) -> Tensor:
        """What the block gave, on the CPU."""
        return torch.cat([output.detach().cpu() for _, output in self._parts])

    def take_back(self, backward: Tensor) -> Tensor:
        """Gradient with respect to what the block was given, from that of what it gave; adds to the gradients of what
        its weights were made of."""
        found = [
            self._gather(output, gradient.to(output), hidden).cpu()
            for (hidden, output), gradient in zip(self._parts, batches(backward), strict=True)
        ]
        self._gather.finish()
        return torch.cat(found)


class HeadLoss:
    """KL(original ‖ student), summed over tokens, from what the last blocks of both give."""

    def __init__(
        self,
        skeleton: Skeleton,
        teacher: Mapping[str, Tensor],
        original: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """teacher: the original's weights outside the blocks; original: what its last block gives for every window
        [windows, length, hidden]; dtype: in which heads run."""
        self._skeleton, self._teacher, self._original = skeleton, teacher, original
        self._dtype = dtype

    def value(self, weights: Mapping[str, Tensor], hidden: Tensor, windows: Tensor) -> float:
        """Of a student with these weights outside the blocks, whose last block gave hidden [len(windows), …]."""
        total = 0.0
        for student, teacher in self._pieces(hidden, windows):
            total += float(self._kl(widened(self._skeleton.head(weights, student)), teacher)[0])
        return total

    def gradient(
        self, weights: Mapping[str, Tensor], hidden: Tensor, windows: Tensor
    ) -> tuple[float, Tensor]:
        """The same, and its gradient with respect to hidden; adds to those of what the weights were made of."""
        with torch.enable_grad():
            cut, gather = leaves(weights)
            total, found = 0.0, []
            for student, teacher in self._pieces(hidden, windows):
                student = student.requires_grad_()
                logits = widened(self._skeleton.head(cut, student))
                with torch.no_grad():
                    kl, slope = self._kl(logits, teacher)
                total += float(kl)
                found.append(gather(logits, slope, student).cpu())
            gather.finish()
        rows = torch.cat([piece.flatten(0, 1) for piece in found])
        return total, rows.unflatten(0, (-1, hidden.shape[1]))

    def _pieces(self, hidden: Tensor, windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Both models' last hidden states, [1, tokens, hidden] each, few enough tokens for their logits."""
        device, dtype = self._skeleton.device, self._dtype
        tokens = max(1, _LOGITS // self._skeleton.config.vocab_size)
        for mine, window in zip(hidden, windows.tolist(), strict=True):
            both = mine.split(tokens), self._original[window].split(tokens)
            for student, teacher in zip(*both, strict=True):
                yield (
                    student.unsqueeze(0).to(device, dtype),
                    teacher.unsqueeze(0).to(device, dtype),
                )

    def _kl(self, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """KL(p ‖ q) of the student's logits, and its slope: of softmax q, q − p."""
        log_p = widened(self._skeleton.head(self._teacher, teacher)).log_softmax(dim=-1)
        log_q = logits.log_softmax(dim=-1)
        p = log_p.exp()
        return (p * log_p.sub_(log_q)).sum(), log_q.exp_().sub_(p)


class _Gather:
    """Sums gradients with respect to leaves over pieces of a batch, and hands them on at the end."""

    def __init__(self, sources: Sequence[Tensor], cut: Sequence[Tensor]) -> None:
        self._sources, self._leaves = sources, cut
        self._sums: list[Tensor | None] = [None] * len(cut)

    def __call__(self, output: Tensor, gradient: Tensor, given: Tensor) -> Tensor:
        """Take the gradient of a piece's output back; returns that with respect to what it was given."""
        wanted = [given, *self._leaves]
        first, *others = torch.autograd.grad(output, wanted, gradient, allow_unused=True)
        for place, value in enumerate(others):
            if value is not None:
                before = self._sums[place]
                self._sums[place] = widened(value) if before is None else before.add_(value)
        assert first is not None
        return first

    def finish(self) -> None:
        """Add what was summed to the gradients of what the leaves were made of."""
        pairs = [
            (source, gradient.to(source.dtype))
            for source, gradient in zip(self._sources, self._sums, strict=True)
            if gradient is not None
        ]
        if pairs:
            torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs])


def leaves(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], _Gather]:
    """Weights cut off from what they were made of, and what puts them together again."""
    sources = {name: value for name, value in weights.items() if value.requires_grad}
    cut = {name: value.detach().requires_grad_() for name, value in sources.items()}
    return dict(weights) | cut, _Gather(list(sources.values()), list(cut.values()))
