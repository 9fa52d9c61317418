"""What the diagonal methods share: which sites take a diagonal, and how its entries meet the readers' inputs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bitfold.models.family import FcPair, QueryKey, Site, ValueOutput
from bitfold.transforms.groups import Heads

__all__ = ["on_inputs", "per_entry", "reader_weights", "takes_diagonal"]


def takes_diagonal(site: Site) -> bool:
    """Whether a positive diagonal in front of the site's readers can be folded."""
    if isinstance(site, FcPair):
        return site.homogeneous
    return not isinstance(site, QueryKey)


def on_inputs(scale: Tensor, site: Site, heads: Heads) -> Tensor:
    """A diagonal's entries [n] as factors on the readers' input channels [in].

    They are the same, but at v → o each KV head's entries serve all query heads that share it.
    """
    if not isinstance(site, ValueOutput):
        return scale
    return scale.view(heads.keys, 1, heads.size).expand(-1, heads.shared, -1).reshape(-1)


def per_entry(channels: Tensor, site: Site, heads: Heads, reduce: str = "amax") -> Tensor:
    """Numbers per input channel [in], reduced (`amax` or `mean`) to one per entry of the diagonal [n]."""
    if not isinstance(site, ValueOutput):
        return channels
    grouped = channels.view(heads.keys, heads.shared, heads.size)
    return (grouped.amax(dim=1) if reduce == "amax" else grouped.mean(dim=1)).reshape(-1)


def reader_weights(weights: Mapping[str, Tensor], site: Site) -> Tensor:
    """The readers' weights stacked along their outputs, [Σ out, in]."""
    return torch.cat([weights[f"{reader}.weight"] for reader in site.readers])
