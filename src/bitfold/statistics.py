"""What is kept of the inputs a layer saw: additive or bounded, so that no solver reads the stream itself."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitfold.part import Need

__all__ = ["InputStatistics", "widened"]

ROWS = 2048


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that: the precision of statistics, and of what is fitted to them."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass
class InputStatistics:
    """Statistics of one input of width d, accumulated batch by batch in float32 (float64 where it comes in that).

    gram: [d, d] second moment E[xxᵀ] (kept as a sum; `gram` divides). cross: [d, d] E[(x₀ − x)xᵀ] with the original
    model's input x₀. channels: per-channel minimum, maximum, mean magnitude [d]. rows: up to `ROWS` input rows [n, d],
    evenly spaced over the stream. heads: second moments of the queries and keys that are made of the input.
    """

    needs: frozenset[Need]
    expected_tokens: int
    count: int = 0
    _gram: Tensor | None = None
    _cross: Tensor | None = None
    _minimum: Tensor | None = None
    _maximum: Tensor | None = None
    _magnitude: Tensor | None = None
    _rows: list[Tensor] = field(default_factory=list)
    _heads: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def update(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add inputs [..., d]; `original`: the original model's on the same tokens, for `cross`."""
        x = widened(x.detach().flatten(0, -2))
        if "cross" in self.needs:
            assert original is not None
            product = (widened(original.detach().flatten(0, -2)) - x).T @ x
            self._cross = product if self._cross is None else self._cross.add_(product)
        start, self.count = self.count, self.count + x.shape[0]
        if "gram" in self.needs:
            product = x.T @ x
            self._gram = product if self._gram is None else self._gram.add_(product)
        if "channels" in self.needs:
            minimum, maximum = torch.aminmax(x, dim=0)
            magnitude = x.abs().sum(dim=0, dtype=torch.float64)
            if self._minimum is None or self._maximum is None or self._magnitude is None:
                self._minimum, self._maximum, self._magnitude = minimum, maximum, magnitude
            else:
                self._minimum = torch.minimum(self._minimum, minimum)
                self._maximum = torch.maximum(self._maximum, maximum)
                self._magnitude += magnitude
        if "rows" in self.needs:
            stride = max(1, -(-self.expected_tokens // ROWS))
            self._rows.append(x[(-start) % stride :: stride].clone())

    def update_heads(self, name: str, x: Tensor) -> None:
        """Add queries or keys [batch, heads, tokens, H], as the attention multiplies them."""
        x = widened(x.detach())
        product = torch.einsum("bnth,bntg->nhg", x, x)
        before, count = self._heads.get(name, (torch.zeros_like(product), 0))
        self._heads[name] = (before + product, count + x.shape[0] * x.shape[2])

    def head_moment(self, name: str, keys: int) -> Tensor:
        """E[qqᵀ] or E[kkᵀ] by KV head [keys, H, H], over the query heads that share it."""
        total, count = self._heads[name]
        return total.unflatten(0, (keys, -1)).mean(dim=1) / count

    @property
    def gram(self) -> Tensor:
        """E[xxᵀ], [d, d]."""
        assert self._gram is not None
        return self._gram / self.count

    @property
    def cross(self) -> Tensor:
        """E[(x₀ − x)xᵀ], [d, d]."""
        assert self._cross is not None
        return self._cross / self.count

    @property
    def minimum(self) -> Tensor:
        """Smallest value per channel [d]."""
        assert self._minimum is not None
        return self._minimum

    @property
    def maximum(self) -> Tensor:
        """Largest value per channel [d]."""
        assert self._maximum is not None
        return self._maximum

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude per channel [d]."""
        return torch.maximum(-self.minimum, self.maximum)

    @property
    def absmean(self) -> Tensor:
        """Mean magnitude per channel [d]."""
        assert self._magnitude is not None
        return (self._magnitude / self.count).to(self.minimum.dtype)

    @property
    def rows(self) -> Tensor:
        """A sample of inputs [n, d]."""
        return torch.cat(self._rows)
