"""AWQ (Lin et al. 2023, arXiv 2306.00978): a diagonal that protects the weights of channels with large activations.

    s = (mean|X_j|)^r [ / (mean|W_j| / max|W| of its group)^(1−r) ],   r searched

on the readers' own output error ‖X Wᵀ − X s⁻¹ Q(W s)ᵀ‖² = tr(ΔW G ΔWᵀ), ΔW = Q(W s) s⁻¹ − W, with the inputs' second
moment G = E[xxᵀ]: the error is exact, and no pass over the inputs is needed.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from bitfold.models.family import Site
from bitfold.numerics import Scheme, fake_quantize_dynamic, to_groups
from bitfold.part import Need
from bitfold.statistics import InputStatistics
from bitfold.transforms.diagonal import on_inputs, per_entry, reader_weights, takes_diagonal
from bitfold.transforms.groups import Diagonal, Heads, Transform
from bitfold.transforms.site_transform import SiteTransform

__all__ = ["Awq"]

# So many rows of a weight, evenly spread, are enough to compare two trials by.
_ROWS = 1024


class Awq(SiteTransform):
    """steps: values of r tried, from 0 (nothing) to 1. weight_aware: also try each r with the weights' own share."""

    needs = frozenset[Need]({"channels", "gram"})
    balances = True

    steps: int = Field(default=20, ge=2)
    weight_aware: bool = True

    def wants(self, site: Site, schemes: Mapping[str, Scheme]) -> bool:
        """See `SiteTransform.wants`."""
        return takes_diagonal(site) and any(
            schemes[reader].weight is not None for reader in site.readers
        )

    def fit(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: InputStatistics,
        schemes: Mapping[str, Scheme],
        heads: Heads,
    ) -> Transform | None:
        """The site's diagonal, or None where it takes none or nothing is quantized.

        weights: the block's, [out, in] each; statistics: of the readers' input; schemes: of the readers, by name.
        """
        if not self.wants(site, schemes):
            return None
        magnitude = per_entry(statistics.absmean, site, heads, "mean").clamp(min=1e-8)
        share = per_entry(_weight_share(weights, site, schemes), site, heads, "mean").clamp(
            min=1e-8
        )
        gram = statistics.gram
        best, best_error = torch.ones_like(magnitude), torch.inf
        for r in torch.linspace(0, 1, self.steps + 1).tolist():
            candidates = [magnitude**r]
            if self.weight_aware:
                candidates.append(magnitude**r / share ** (1 - r))
            for scale in candidates:
                scale = scale / (scale.max() * scale.min()).sqrt()
                error = _output_error(on_inputs(scale, site, heads), site, weights, gram, schemes)
                if error < best_error:
                    best, best_error = scale, error
        return Diagonal(site, best)


def _weight_share(
    weights: Mapping[str, Tensor], site: Site, schemes: Mapping[str, Scheme]
) -> Tensor:
    """Per input channel [in]: mean over the rows of |w| / the largest |w| of its group."""
    scheme = next(
        s.weight for s in (schemes[reader] for reader in site.readers) if s.weight is not None
    )
    stacked = reader_weights(weights, site).abs()
    groups = to_groups(stacked, scheme)
    relative = groups / groups.amax(dim=-1, keepdim=True).clamp(min=1e-12)
    return relative.reshape(stacked.shape).mean(dim=0)


def _output_error(
    scale: Tensor,
    site: Site,
    weights: Mapping[str, Tensor],
    gram: Tensor,
    schemes: Mapping[str, Scheme],
) -> float:
    """Σ over readers of tr(ΔW G ΔWᵀ) for factors [in] on the input channels; of large readers by some of their rows."""
    total = 0.0
    for reader in site.readers:
        scheme = schemes[reader].weight
        if scheme is None:
            continue
        weight = weights[f"{reader}.weight"]
        # Rows that share no scale have errors of their own: a part of them tells trials apart.
        every = 1 if scheme.granularity == "tensor" else -(-len(weight) // _ROWS)
        weight = weight[::every]
        difference = fake_quantize_dynamic(weight * scale, scheme) / scale - weight
        total += every * float(((difference @ gram) * difference).sum())
    return total
