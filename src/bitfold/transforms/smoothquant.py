"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): a diagonal moves the activations' outliers into the weights.

    s_j = max|X_j|^α / max|W_j|^(1−α)

folded at every site that takes a diagonal (the paper: behind the norms only).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bitfold.models.family import NormSite, Site
from bitfold.numerics import Scheme, fake_quantize_dynamic
from bitfold.part import Need
from bitfold.statistics import InputStatistics
from bitfold.transforms.diagonal import on_inputs, per_entry, reader_weights, takes_diagonal
from bitfold.transforms.groups import Diagonal, Heads, Transform
from bitfold.transforms.site_transform import SiteTransform

__all__ = ["SmoothQuant", "smoothing_scale"]


class SmoothQuant(SiteTransform):
    """alpha: the share of the difficulty that moves into the weights, or `search`: per site, of the candidates the
    one of least error on the readers' own output, with weights and activations quantized by the scheme.
    sites: `all` that take a diagonal, or `norms` as in the paper.
    shift: also centre each channel's range where biases can carry it (Outlier Suppression+, arXiv 2304.09145)."""

    needs = frozenset[Need]({"channels", "rows"})
    balances = True

    alpha: float | Literal["search"] = Field(default="search")
    candidates: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    sites: Literal["all", "norms"] = "all"
    shift: bool = False

    def wants(self, site: Site, schemes: Mapping[str, Scheme]) -> bool:
        """See `SiteTransform.wants`."""
        return takes_diagonal(site) and (self.sites == "all" or isinstance(site, NormSite))

    def fit(
        self,
        site: Site,
        weights: Mapping[str, Tensor],
        statistics: InputStatistics,
        schemes: Mapping[str, Scheme],
        heads: Heads,
    ) -> Transform | None:
        """The site's diagonal, or None where it takes none.

        weights: the block's, [out, in] each; statistics: of the readers' input; schemes: of the readers, by name.
        """
        if not self.wants(site, schemes):
            return None
        shift = self._shift(site, weights, statistics)
        centred = statistics.absmax
        if shift is not None:
            centred = (statistics.maximum - statistics.minimum) / 2
        peak = per_entry(centred, site, heads)
        weight_peak = per_entry(reader_weights(weights, site).abs().amax(dim=0), site, heads)
        if self.alpha != "search":
            return Diagonal(site, smoothing_scale(peak, weight_peak, self.alpha), shift)
        rows = statistics.rows if shift is None else statistics.rows - shift
        outputs = {
            reader: rows @ weights[f"{reader}.weight"].T
            for reader in site.readers
            if schemes[reader].activation is not None
        }
        best, best_error = torch.ones_like(peak), torch.inf
        for alpha in (None, *self.candidates):
            scale = (
                torch.ones_like(peak)
                if alpha is None
                else smoothing_scale(peak, weight_peak, alpha)
            )
            error = _output_error(
                on_inputs(scale, site, heads), site, weights, rows, schemes, outputs
            )
            if error < best_error:
                best, best_error = scale, error
        return Diagonal(site, best, shift)

    def _shift(
        self, site: Site, weights: Mapping[str, Tensor], statistics: InputStatistics
    ) -> Tensor | None:
        """The middle of each channel's range [n] behind a norm whose bias, and its readers', can carry it."""
        if not (self.shift and isinstance(site, NormSite)):
            return None
        if not all(f"{name}.bias" in weights for name in (site.norm, *site.readers)):
            return None
        return (statistics.maximum + statistics.minimum) / 2


def smoothing_scale(peak: Tensor, weight_peak: Tensor, alpha: float) -> Tensor:
    """s = peak^α / weight_peak^(1−α) [n], 1 where a channel is dead, of geometric mean 1."""
    dead = (peak <= 0) | (weight_peak <= 0)
    logarithm = (
        alpha * peak.clamp(min=1e-30).log() - (1 - alpha) * weight_peak.clamp(min=1e-30).log()
    )
    logarithm = torch.where(dead, torch.zeros_like(logarithm), logarithm)
    mean = logarithm.sum() / (~dead).sum().clamp(min=1)
    return torch.where(dead, torch.ones_like(logarithm), (logarithm - mean).clamp(-11, 11).exp())


def _output_error(
    scale: Tensor,
    site: Site,
    weights: Mapping[str, Tensor],
    rows: Tensor,
    schemes: Mapping[str, Scheme],
    outputs: Mapping[str, Tensor],
) -> float:
    """Σ over readers of ‖X Wᵀ − Q(X/s) Q(W s)ᵀ‖² for input rows X [n, in].

    outputs: X Wᵀ, of readers whose input is quantized.
    """
    total = 0.0
    for reader in site.readers:
        scheme = schemes[reader]
        smoothed_rows, smoothed = rows / scale, weights[f"{reader}.weight"] * scale
        rounded = smoothed
        if scheme.weight is not None:
            rounded = fake_quantize_dynamic(smoothed, scheme.weight)
        if scheme.activation is None:
            difference = smoothed_rows @ (smoothed - rounded).T
        else:
            quantized = fake_quantize_dynamic(smoothed_rows, scheme.activation)
            difference = outputs[reader] - quantized @ rounded.T
        total += float(difference.square().sum())
    return total
