"""What engines that go on from a cache have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

__all__ = ["Stepwise"]


class Stepwise(ABC):
    """An engine with a model of one sequence, which remembers the tokens that it was given."""

    @abstractmethod
    def start(self) -> None:
        """Forget all tokens."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Logits [tokens, vocabulary] float32 behind each token, which go on from those before."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [length, vocabulary] float32 behind every token id of one window [length]."""
        self.start()
        return self.decode(tokens.tolist())

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """So many tokens behind a prompt, each the likeliest."""
        self.start()
        found: list[int] = []
        rest = list(prompt)
        for _ in range(count):
            found.append(int(self.decode(rest)[-1].argmax()))
            rest = found[-1:]
        return found
