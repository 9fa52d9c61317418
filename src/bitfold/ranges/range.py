"""What a way of choosing a range is."""

from abc import abstractmethod

from torch import Tensor

from bitfold.numerics import TensorScheme
from bitfold.part import Part

__all__ = ["Range"]


class Range(Part):
    """Chooses the limits between which the codes of a group are spread."""

    @abstractmethod
    def limits(
        self, groups: Tensor, scheme: TensorScheme, gram: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper limit [..., 1] of grouped values [..., g].

        gram: [in, in], the second moment of a weight's inputs, where the part's `needs` ask for it.
        """
