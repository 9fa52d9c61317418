"""A checkpoint whose residual stream is read in another basis: it computes what the original does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitfold.errors import EquivalenceError, RecipeError
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from bitfold.recipe import Recipe
from bitfold.transforms.stream import refuse_outsiders, turn_block, turn_outer

__all__ = ["TurnedSkeleton", "skeleton_for"]

# Largest relative change of the probe's logits by turning alone; what is outside the blocks is rounded to storage.
_LARGEST_CHANGE = 1e-3
_LARGEST_CHANGE_HALF = 5e-2


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
    skeleton.turn(transform.matrix(size, keeps_ones=stream.reads_mean, seed=recipe.seed))
    return skeleton


class TurnedSkeleton(Skeleton):
    """Hands out its checkpoint's weights in the basis R of the residual stream; the head is untied."""

    def turn(self, rotation: Tensor) -> None:
        """Take a basis [hidden, hidden], float64.

        Raises EquivalenceError where it is outside the stream's group.
        """
        stream = self.family.stream(self.config)
        assert stream is not None
        refuse_outsiders(rotation, stream)
        self._stream, self._sites = stream, self.family.sites(self.config)
        self._rotation = rotation.to(self.device)

    def load_block(self, index: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """See `Skeleton.load_block`. Turned in float64, and not rounded in between."""
        stored = super().load_block(index)
        exact = {name: value.double() for name, value in stored.items()}
        turned = turn_block(exact, self._stream, self._sites, self._rotation)
        return {name: value.to(dtype or stored[name].dtype) for name, value in turned.items()}

    def load_outer(
        self, dtype: torch.dtype | None = None, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """See `Skeleton.load_outer`. Rounded to the dtype of storage, in which it will be stored."""
        together = {f"{self._stream.final_norm}.{kind}" for kind in ("weight", "bias")}
        together |= {f"{self._stream.reader}.weight"}
        wanted = names or self.outer_parameters
        needed = [n for n in self.outer_parameters if n in wanted or n in together]
        stored = super().load_outer(names=needed)
        exact = {name: value.double() for name, value in stored.items()}
        turned = turn_outer(exact, self._stream, self._sites, self._rotation)
        rounded = {name: turned[name].to(stored[name].dtype) for name in wanted}
        return {name: value.to(dtype or value.dtype) for name, value in rounded.items()}

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
        limit = _LARGEST_CHANGE if stored.itemsize >= 4 else _LARGEST_CHANGE_HALF
        if not change <= limit:
            raise EquivalenceError(
                f"Turning the residual stream changed the logits by {change:.2e} (relative; at most {limit:g} is "
                "rounding): the rotation is no equivalence there."
            )
