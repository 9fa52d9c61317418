"""How the inputs of a block's layers are quantized: what is calibrated of them, from statistics of the stream."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bitfold.models.family import Family
from bitfold.numerics import (
    Scheme,
    TensorScheme,
    channel_clusters,
    fake_quantize_dynamic,
    global_scale,
    scale_and_zero,
)
from bitfold.part import Need
from bitfold.pipeline.hooks import InputQuantizer
from bitfold.ranges import Range
from bitfold.recipe import Recipe
from bitfold.statistics import InputStatistics

__all__ = ["best_share", "calibration_needs", "input_quantizers"]

_SMALLEST_SHARE, _SHARES = 0.5, 26


def calibration_needs(recipe: Recipe) -> frozenset[Need]:
    """What calibrated activations' scales and clusters are found from."""
    return frozenset({"rows", "channels"}) if recipe.calibrates_activations else frozenset()


def input_quantizers(
    schemes: Mapping[str, Scheme],
    family: Family,
    statistics: Mapping[str, InputStatistics],
    weights: Mapping[str, Tensor],
    chosen: Range,
    storage: torch.dtype,
) -> dict[str, InputQuantizer]:
    """The quantizers of a block's layers whose schemes have an activation; those of one input and scheme are one.

    statistics: of the inputs (`calibration_needs`), where an activation is calibrated; weights: the block's; chosen:
    the way of choosing ranges; storage: the dtype in which scales will be stored.
    """
    known: dict[tuple[str, TensorScheme], InputQuantizer] = {}
    found: dict[str, InputQuantizer] = {}
    for name, scheme in schemes.items():
        if scheme.activation is None:
            continue
        given = family.input_of(name)
        key = (given, scheme.activation)
        if key not in known:
            readers = next(shared for shared in family.inputs if name in shared)
            if scheme.activation.clipped:
                stacked = torch.cat([weights[f"{reader}.weight"] for reader in readers])
                share = best_share(statistics[given].rows, scheme.activation, stacked)
                known[key] = InputQuantizer(scheme.activation, share.to(storage))
            else:
                known[key] = _quantizer(scheme.activation, statistics.get(given), chosen, storage)
        found[name] = known[key]
    return found


def best_share(rows: Tensor, activation: TensorScheme, weight: Tensor) -> Tensor:
    """The share [1] of each token's min-max range in which the readers' outputs err least on rows [n, in].

    weight: of all readers, [out, in]. A tie goes to the larger share.
    """
    moment = weight.to(rows.dtype).T @ weight.to(rows.dtype)
    shares = torch.linspace(1.0, _SMALLEST_SHARE, _SHARES, dtype=rows.dtype, device=rows.device)

    def error(share: Tensor) -> float:
        difference = fake_quantize_dynamic(rows, activation, share=share) - rows
        return float(((difference @ moment) * difference).sum())

    return min(shares.split(1), key=error)


def _quantizer(
    activation: TensorScheme,
    statistics: InputStatistics | None,
    chosen: Range,
    storage: torch.dtype,
) -> InputQuantizer:
    if not activation.calibrated:
        return InputQuantizer(activation)
    assert statistics is not None
    if activation.grid == "nvfp4":
        # Never by a range that clips: beyond the global scale whole groups would be.
        largest = torch.cat([statistics.minimum.abs(), statistics.maximum.abs()])
        return InputQuantizer(activation, global_scale(largest))
    clusters = None
    if activation.clusters is not None:
        clusters = channel_clusters(statistics.minimum, statistics.maximum, activation.clusters)
    if not activation.static:
        return InputQuantizer(activation, clusters=clusters)
    minimum, maximum = _static_limits(activation, statistics, clusters, chosen)
    scale, zero = scale_and_zero(minimum, maximum, activation, storage)
    stored_zero = None if zero is None else zero.to(torch.int8)
    return InputQuantizer(activation, scale.to(storage), stored_zero, clusters)


def _static_limits(
    activation: TensorScheme, statistics: InputStatistics, clusters: Tensor | None, chosen: Range
) -> tuple[Tensor, Tensor]:
    """Lower and upper limit of each cluster [count], 0 where it has no channels; without clusters all channels are one.

    The sample decides the range; the extremes of the whole stream are added for ranges that do not clip.
    """
    if clusters is None:
        clusters = torch.zeros_like(statistics.minimum, dtype=torch.uint8)
    minimum = statistics.minimum.new_zeros(activation.clusters or 1)
    maximum = torch.zeros_like(minimum)
    for cluster in clusters.unique().tolist():
        inside = clusters == cluster
        extremes = torch.stack([statistics.minimum[inside].min(), statistics.maximum[inside].max()])
        values = torch.cat([statistics.rows[:, inside].flatten(), extremes]).unsqueeze(0)
        low, high = chosen.limits(values, activation)
        minimum[cluster], maximum[cluster] = low.squeeze(), high.squeeze()
    return minimum, maximum
