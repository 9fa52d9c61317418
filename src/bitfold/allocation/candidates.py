"""Which layers choose together, what they may choose, and the true bits of a choice, from shapes alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bitfold.errors import RecipeError
from bitfold.models.family import Family
from bitfold.numerics import QuantizedTensor, TensorScheme

__all__ = ["Candidate", "LayerGroup", "candidates", "layer_groups", "weight_bits"]

# Finer groups than the scheme's are offered up to this many bits, and down to the size that engines have kernels for.
_FEW_BITS = 4
_FINEST = 32


@dataclass(frozen=True)
class Candidate:
    """What a weight may become; `scheme` is None where it is left alone."""

    scheme: TensorScheme | None

    @property
    def name(self) -> str:
        """A short form, as in tables and reports.

        >>> Candidate(TensorScheme(bits=4, granularity="group", group_size=128)).name
        '4g128'
        """
        if self.scheme is None:
            return "16"
        group = self.scheme.group_size
        return f"{self.scheme.bits}g{group}" if group else str(self.scheme.bits)


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers that share a choice: the index of the block and the name relative to it, of each."""

    name: str
    layers: tuple[tuple[int, str], ...]

    @property
    def first(self) -> int:
        """The first block that it touches."""
        return min(index for index, _ in self.layers)

    def within(self, block: int) -> tuple[str, ...]:
        """Its layers in one block."""
        return tuple(name for index, name in self.layers if index == block)


def candidates(
    template: TensorScheme, bits: Sequence[int], group_sizes: Sequence[int]
) -> tuple[Candidate, ...]:
    """The candidates in order of falling bits and group size; what they do not say is as in the template.

    Without group sizes: the template's, and of at most 4 bits finer ones too. Layers differ less than a whole bit
    costs, so that it takes steps between two widths to beat the same for all.

    Raises RecipeError where the template is no integer grid.
    """
    if template.grid != "int":
        raise RecipeError(
            f"Bits are found for integer grids, and the scheme's weights are {template.grid}: choose a scheme such as "
            "w4a16g128."
        )
    found: list[Candidate] = []
    for width in sorted(set(bits), reverse=True):
        if width == 16:
            found.append(Candidate(None))
            continue
        for size in sorted(set(group_sizes), reverse=True) or _sizes(template.group_size, width):
            where = {"granularity": "group"} if size else {"granularity": template.granularity}
            changed = template.model_dump() | where | {"bits": width, "group_size": size}
            if template.scales == "blocks" and (width, size) != (template.bits, 16):
                changed["scales"] = "half"
            found.append(Candidate(TensorScheme.model_validate(changed)))
    return tuple(found)


def _sizes(own: int | None, width: int) -> list[int | None]:
    """Group sizes for a width: the scheme's own, and of few bits its half and its quarter where engines have them."""
    if own is None or width > _FEW_BITS:
        return [own]
    return [own, *(own // share for share in (2, 4) if own // share >= _FINEST)]


def layer_groups(
    family: Family,
    blocks: int,
    *,
    per: str,
    fuse: bool,
    takes: Callable[[int, str], bool] = lambda index, name: True,
) -> tuple[LayerGroup, ...]:
    """The groups of a model with so many blocks, in the order in which weights are used.

    takes: whether a layer, by the index of its block and its relative name, is to be chosen for at all.
    """
    shared = family.inputs if fuse else [(name,) for name in family.linears]
    if per == "kind":
        everywhere = [
            (_leaves(names), [(index, name) for index in range(blocks) for name in names])
            for names in shared
        ]
    else:
        everywhere = [
            (f"{family.blocks}.{index}: {_leaves(names)}", [(index, name) for name in names])
            for index in range(blocks)
            for names in shared
        ]
    groups = (
        LayerGroup(name, tuple(layer for layer in layers if takes(*layer)))
        for name, layers in everywhere
    )
    return tuple(group for group in groups if group.layers)


def weight_bits(shape: tuple[int, ...], scheme: TensorScheme | None, storage: torch.dtype) -> int:
    """Bits that a weight [out, in] takes, scales (in the dtype of storage, or the grid's own) and zero-points counted;
    of None, those of the dtype of storage."""
    if scheme is None:
        return math.prod(shape) * storage.itemsize * 8
    return QuantizedTensor.empty(shape, scheme, storage, device="meta").bits


def _leaves(names: Sequence[str]) -> str:
    return ", ".join(name.rpartition(".")[2] for name in names)
