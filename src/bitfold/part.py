"""A part of a recipe: a frozen set of options and, in the subclass, the pure solver that reads them."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["Need", "Part"]

Need = Literal["gram", "cross", "channels", "rows", "heads", "loss"]
"""What a part may ask of the block loop: the inputs' second moment, what correlates with them of the error that earlier
layers made, per-channel magnitudes, a sample of input rows, the second moments of queries and keys, or the block's loss
as a differentiable function."""


class Part(BaseModel):
    """Base of every part of a recipe; the options are its fields, checked when made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: ClassVar[frozenset[Need]] = frozenset()
