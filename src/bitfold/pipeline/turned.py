"""A checkpoint whose residual stream, and values, are read in other bases: it computes what the original does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.errors import EquivalenceError, RecipeError
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.family import ValueOutput, head_counts
from bitfold.models.skeleton import Skeleton
from bitfold.recipe import Recipe
from bitfold.transforms import Heads, fold
from bitfold.transforms.groups import HeadMatrix
from bitfold.transforms.stream import refuse_outsiders, turn_block, turn_outer

__all__ = ["Bases", "TurnedSkeleton", "settled", "skeleton_for", "turned_block"]

# Largest relative change of the probe's logits by turning alone; what is outside the blocks is rounded to storage.
_LARGEST_CHANGE = 1e-3
_LARGEST_CHANGE_HALF = 5e-2


@dataclass(frozen=True)
class Bases:
    """stream: R [hidden, hidden], orthogonal; heads: of each block an orthogonal matrix for the values of every KV head
    [K, H, H], or none at all."""

    stream: Tensor
    heads: Sequence[Tensor] = ()


def skeleton_for(checkpoint: Checkpoint, recipe: Recipe, device: torch.device) -> Skeleton:
    """The network as the recipe wants to see it."""
    transform = recipe.stream_transform
    plain = Skeleton(checkpoint, device)
    stream = plain.family.stream(plain.config)
    if transform is None or (transform.where_free and (stream is None or plain.ties_head)):
        return plain
    if stream is None and transform.where_possible:
        return plain
    if stream is None:
        raise RecipeError(
            f"The residual stream of {checkpoint.path} takes no rotation, because norms stand behind the halves of "
            "its blocks: leave the rotation out."
        )
    skeleton = TurnedSkeleton(checkpoint, device, untied=True)
    size = skeleton.config.hidden_size
    skeleton.turn(Bases(transform.matrix(size, keeps_ones=stream.reads_mean, seed=recipe.seed)))
    return skeleton


def settled(recipe: Recipe, skeleton: Skeleton) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe as this network can have it, and what the user should read: rotations are not learned where the stream
    takes none."""
    learned = recipe.learned_rotation
    if learned is None or isinstance(skeleton, TurnedSkeleton):
        return recipe, ()
    transforms = (learned.model_copy(update={"steps": 0}), *recipe.transforms[1:])
    note = (
        f"rotations are not learned: the residual stream of this {skeleton.family.name} model takes none, or none that "
        "is free"
    )
    return recipe.model_copy(update={"transforms": transforms}), (note,)


def turned_block(
    weights: Mapping[str, Tensor], index: int, bases: Bases, skeleton: Skeleton
) -> dict[str, Tensor]:
    """The weights of block `index` of a checkpoint in other bases; differentiable in them."""
    config = skeleton.config
    stream, sites = skeleton.family.stream(config), skeleton.family.sites(config)
    assert stream is not None
    turned = turn_block(weights, stream, sites, bases.stream)
    if not bases.heads:
        return turned
    site = next(site for site in sites if isinstance(site, ValueOutput))
    blocks = bases.heads[index]
    return fold(turned, HeadMatrix(site, blocks, blocks.mT), Heads(*head_counts(config)))


class TurnedSkeleton(Skeleton):
    """Hands out its checkpoint's weights in other bases; the head is untied. bases: float64, on its device."""

    bases: Bases

    def turn(self, bases: Bases) -> None:
        """Take bases, float64.

        Raises EquivalenceError where the stream's is outside its group.
        """
        stream = self.family.stream(self.config)
        assert stream is not None
        refuse_outsiders(bases.stream, stream)
        heads = [one.to(self.device) for one in bases.heads]
        self.bases = Bases(bases.stream.to(self.device), heads)

    def load_block(self, index: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """See `Skeleton.load_block`. Turned in float64, and not rounded in between."""
        stored = super().load_block(index)
        exact = {name: value.double() for name, value in stored.items()}
        turned = turned_block(exact, index, self.bases, self)
        return {name: value.to(dtype or stored[name].dtype) for name, value in turned.items()}

    def load_outer(
        self, dtype: torch.dtype | None = None, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """See `Skeleton.load_outer`. Rounded to the dtype of storage, in which it will be stored."""
        stream, sites = self.family.stream(self.config), self.family.sites(self.config)
        assert stream is not None
        together = {f"{stream.final_norm}.{kind}" for kind in ("weight", "bias")}
        together |= {f"{stream.reader}.weight"}
        wanted = names or self.outer_parameters
        # One tensor in float64 at a time: they are the largest of many models.
        groups = [[name] for name in wanted if name not in together]
        if together.intersection(wanted):
            groups.append([name for name in self.outer_parameters if name in together])
        found: dict[str, Tensor] = {}
        for group in groups:
            stored = super().load_outer(names=group)
            exact = {name: value.double() for name, value in stored.items()}
            turned = turn_outer(exact, stream, sites, self.bases.stream)
            rounded = {name: turned[name].to(stored[name].dtype) for name in group}
            found |= {name: value.to(dtype or value.dtype) for name, value in rounded.items()}
        return {name: found[name] for name in wanted}

    def check(self, tokens: Tensor, turned: Tensor, dtype: torch.dtype) -> None:
        """Hold the turned network's logits [windows, length, vocabulary] against those of the checkpoint as it is.

        Raises EquivalenceError where turning changed what the network computes.
        """
        plain = Skeleton(self.checkpoint, self.device)
        outer = plain.load_outer(dtype)
        hidden = plain.embed(outer, tokens.to(self.device))
        for index in range(len(plain.blocks)):
            hidden = plain.run(index, plain.load_block(index, dtype), hidden)
        logits = plain.head(outer, hidden)
        change = float((turned - logits).norm() / logits.norm())
        stored = next(iter(self.checkpoint.tensors.values())).dtype
        half = min(stored.itemsize, dtype.itemsize) < 4
        limit = _LARGEST_CHANGE_HALF if half else _LARGEST_CHANGE
        if not change <= limit:
            raise EquivalenceError(
                f"Turning the residual stream changed the logits by {change:.2e} (relative; at most {limit:g} is "
                "rounding): the rotation is no equivalence there."
            )
