"""What a recipe leaves to run: where matrices stand that nothing absorbs, and what they cost."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.errors import RecipeError
from bitfold.export.layout import OnlineEntry
from bitfold.models.family import NormSite
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import blocks_product
from bitfold.recipe import Recipe
from bitfold.transforms import StreamTransform

__all__ = ["OnlineCost", "online_cost", "online_entries", "with_identities"]

_ANY_NORM = NormSite("norm", ())


@dataclass(frozen=True)
class OnlineCost:
    """What the matrices that run cost, beside the linear layers of the blocks.

    multiply_adds, linear_multiply_adds: a token; share: of the latter; bytes: as stored.
    """

    matrices: int
    multiply_adds: int
    linear_multiply_adds: int
    share: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data, with a sentence for people."""
        return asdict(self) | {"folded": False, "note": self.sentence}

    @property
    def sentence(self) -> str:
        """The cost, in words."""
        return (
            f"Not folded: {self.matrices} matrices run behind norms at inference, {self.multiply_adds:,} multiply-adds "
            f"a token more ({self.share:.1%} of the linear layers') and {self.bytes / 1e6:.1f} MB more."
        )


def online_entries(skeleton: Skeleton, recipe: Recipe) -> dict[str, OnlineEntry]:
    """The norms behind which the recipe's transforms leave a matrix, by full name.

    Raises RecipeError where they are to, and the model has no such norm.
    """
    entries = {}
    parts = [part for part in recipe.transforms if not isinstance(part, StreamTransform)]
    norms = [s for s in skeleton.family.sites(skeleton.config) if isinstance(s, NormSite)]
    if not norms and any(part.online_size(_ANY_NORM, 1) for part in parts):
        raise RecipeError(
            f"{recipe.method} leaves a matrix behind norms that runs, and no norm of this {skeleton.family.name} model "
            "stands before linear layers alone: set norms=folded (affine) or none (wush), or choose another --method."
        )
    for site in norms:
        for index, block in enumerate(skeleton.blocks):
            width = block.get_parameter(f"{site.norm}.weight").numel()
            sizes = [part.online_size(site, width) for part in parts]
            if any(sizes):
                size = math.lcm(*(size for size in sizes if size))
                name = f"{skeleton.block_name(index)}.{site.norm}"
                entries[name] = OnlineEntry(width // size, size)
    return entries


def online_cost(
    skeleton: Skeleton, entries: Mapping[str, OnlineEntry], storage: torch.dtype
) -> OnlineCost | None:
    """What they cost; None where nothing runs."""
    if not entries:
        return None
    linear = sum(
        module.weight.numel()
        for block in skeleton.blocks
        for module in block.modules()
        if isinstance(module, nn.Linear)
    )
    added = sum(entry.count * entry.size**2 for entry in entries.values())
    return OnlineCost(len(entries), added, linear, added / linear, added * storage.itemsize)


def with_identities(
    weights: Mapping[str, Tensor], entries: Mapping[str, OnlineEntry]
) -> dict[str, Tensor]:
    """A block's weights with what was planned to run, by relative name: identities where no matrix was found, and
    those found in smaller blocks in the planned ones."""
    like = next(iter(weights.values()))
    planned = {}
    for name, entry in entries.items():
        one = torch.eye(entry.size, dtype=like.dtype, device=like.device).repeat(entry.count, 1, 1)
        found = weights.get(name, one)
        planned[name] = found if found.shape == one.shape else blocks_product(found, one)
    return dict(weights) | planned
