"""Formats in which an artifact's weights are said, each from the same `Layout` and `QuantizedTensor`s."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.export import compressed_tensors, native
from bitfold.export.layout import Choice, Layout, Refusal, WeightFormat
from bitfold.numerics import QuantizedTensor, TensorScheme

__all__ = ["FORMATS", "Choice", "Format", "Layout", "choose_format"]


class Format(Protocol):
    """A module of this package that says weights on disk."""

    def choose(self, layout: Layout) -> Choice | Refusal: ...

    def config(self, layout: Layout, choice: Choice) -> dict[str, Any]: ...

    def extra_config(self, layout: Layout, model_config: Mapping[str, Any]) -> dict[str, Any]: ...

    def to_tensors(
        self, name: str, tensor: QuantizedTensor, format: WeightFormat
    ) -> dict[str, Tensor]: ...

    def from_tensors(
        self, name: str, tensors: Mapping[str, Tensor], scheme: TensorScheme, format: WeightFormat
    ) -> QuantizedTensor: ...


FORMATS: dict[str, Format] = {"compressed-tensors": compressed_tensors, "bitfold": native}


def choose_format(layout: Layout) -> tuple[Format, Choice, tuple[str, ...]]:
    """The first format that can say a layout exactly, its choice, and a note where it is not compressed-tensors.

    Raises RecipeError where none can.
    """
    reasons: list[str] = []
    for name, format in FORMATS.items():
        choice = format.choose(layout)
        if isinstance(choice, Choice):
            notes = tuple(
                f"compressed-tensors cannot say this scheme because {reason}; the artifact is in bitfold's own "
                f"format and loads after `import {name}`"
                for reason in reasons
            )
            return format, choice, notes
        reasons.append(choice.reason)
    raise RecipeError(f"No format can say this scheme: {'; '.join(reasons)}.")
