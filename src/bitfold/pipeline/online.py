"""What a recipe leaves to run: where maps stand that nothing absorbs, and what they cost."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.errors import RecipeError
from bitfold.models.family import ONLINE, NormSite, QueryKey, Site, head_counts
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import MapShape, Scheme, blocks_product
from bitfold.recipe import Recipe
from bitfold.transforms import Heads

__all__ = ["OnlineCost", "online_cost", "online_maps", "stored_maps", "with_identities"]

_ANY_NORM = NormSite("norm", ())


@dataclass(frozen=True)
class OnlineCost:
    """What the maps that run cost, beside the linear layers of the blocks.

    operations: multiply-adds a token (of Hadamard matrices additions); share: of the linear layers'; bytes: as stored.
    """

    maps: int
    operations: int
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
            f"Not folded: {self.maps} maps run at inference, {self.operations:,} operations a token more "
            f"({self.share:.1%} of the linear layers' multiply-adds) and {self.bytes / 1e6:.1f} MB more."
        )


def online_maps(
    skeleton: Skeleton, recipe: Recipe, attention: Mapping[str, Scheme]
) -> dict[str, MapShape]:
    """The maps that the recipe's transforms leave, by the full name of the module at which they run.

    On queries and keys there are some only where `attention`, by its module's name, has either quantized.

    Raises RecipeError where there are to be some behind norms, and the model has no such norm; or two at one place.
    """
    maps: dict[str, MapShape] = {}
    heads = Heads(*head_counts(skeleton.config))
    sites = skeleton.family.sites(skeleton.config)
    wanted = [part.online_map(_ANY_NORM, 1, heads) for part in recipe.transforms]
    behind_norms = any(shape is not None and shape.kind == "blocks" for shape in wanted)
    if behind_norms and not any(isinstance(site, NormSite) for site in sites):
        raise RecipeError(
            f"{recipe.method} leaves a matrix behind norms that runs, and no norm of this {skeleton.family.name} model "
            "stands before linear layers alone: set norms=folded (affine) or none (wush), or choose another --method."
        )
    for site in sites:
        for index, block in enumerate(skeleton.blocks):
            scheme = attention[f"{skeleton.block_name(index)}.{skeleton.family.attention}"]
            if isinstance(site, QueryKey) and scheme.query is None and scheme.key is None:
                continue
            width = _width(site, block, heads)
            shapes = [part.online_map(site, width, heads) for part in recipe.transforms]
            found = _together([shape for shape in shapes if shape is not None], site, recipe)
            if found is not None:
                maps[f"{skeleton.block_name(index)}.{site.runs_at}"] = found
    return maps


def _width(site: Site, block: nn.Module, heads: Heads) -> int:
    """Of what a map at the site takes: of a head at q · k."""
    if isinstance(site, QueryKey):
        return heads.size
    if isinstance(site, NormSite):
        return block.get_parameter(f"{site.norm}.weight").numel()
    return block.get_parameter(f"{site.runs_at}.weight").shape[1]


def _together(shapes: list[MapShape], site: Site, recipe: Recipe) -> MapShape | None:
    """Block-diagonal matrices are multiplied into one."""
    if len(shapes) < 2:
        return shapes[0] if shapes else None
    if shapes[0].kind in ("kronecker", "heads") and all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    if any(shape.kind != "blocks" for shape in shapes):
        raise RecipeError(
            f"{recipe.method} leaves two maps at {site.name} that run, and they are no matrix of one kind: choose one."
        )
    size = math.lcm(*(shape.shape[1] for shape in shapes))
    return MapShape("blocks", (shapes[0].width // size, size))


def online_cost(
    skeleton: Skeleton, maps: Mapping[str, MapShape], storage: torch.dtype
) -> OnlineCost | None:
    """What they cost; None where nothing runs."""
    if not maps:
        return None
    linear = sum(
        module.weight.numel()
        for block in skeleton.blocks
        for module in block.modules()
        if isinstance(module, nn.Linear)
    )
    heads = Heads(*head_counts(skeleton.config))
    attentions = {
        f"{skeleton.block_name(i)}.{skeleton.family.attention}" for i in range(len(skeleton.blocks))
    }
    added = sum(
        shape.operations * (heads.queries + heads.keys if name in attentions else 1)
        for name, shape in maps.items()
    )
    numbers = sum(shape.numbers for shape in maps.values())
    return OnlineCost(len(maps), added, linear, added / linear, numbers * storage.itemsize)


def stored_maps(maps: Mapping[str, MapShape]) -> list[str]:
    """The names of the maps' tensors."""
    return [f"{name}.{ONLINE}.{part}" for name, shape in maps.items() for part in shape.tensors]


def with_identities(
    weights: Mapping[str, Tensor], maps: Mapping[str, MapShape]
) -> dict[str, Tensor]:
    """A block's weights with what was planned to run, by relative name: identities where no map was found, and
    matrices found in smaller blocks in the planned ones."""
    like = next(iter(weights.values()))
    planned: dict[str, Tensor] = {}
    for name, shape in maps.items():
        if any(f"{name}.{ONLINE}.{part}" not in weights for part in shape.tensors):
            planned |= {f"{name}.{ONLINE}.{p}": t for p, t in shape.identity(like).items()}
        elif shape.kind == "blocks":
            tensor = f"{name}.{ONLINE}.weight"
            if weights[tensor].shape[-1] != shape.shape[1]:
                planned[tensor] = blocks_product(weights[tensor], shape.identity(like)["weight"])
    return dict(weights) | planned
