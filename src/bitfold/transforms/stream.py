"""The residual stream of the whole model: a rotation R of everything that is written to it and read from it.

A gain-free RMSNorm commutes with any orthogonal R: norm(xR) = norm(x) R. So every norm's gain is folded into its
readers first; then every writer is turned (W ← Rᵀ W, b ← b R, embeddings E ← E R) and every reader turned back
(W ← W R). A LayerNorm also subtracts the mean, so there R must keep the vector of ones: R 1 = 1 (O(d − 1)).

The head is untied by it: as a writer the embedding becomes E R, as a reader W γ R.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from bitfold.errors import EquivalenceError
from bitfold.models.family import Family, NormSite, Site, Stream

__all__ = ["rotate_stream", "rotation_defect"]


def rotation_defect(rotation: Tensor, stream: Stream) -> float:
    """How far R [d, d] is from the stream's group: ‖R Rᵀ − I‖, and ‖R 1 − 1‖ under LayerNorm (largest entries)."""
    eye = torch.eye(rotation.shape[0], dtype=rotation.dtype, device=rotation.device)
    defect = float((rotation @ rotation.T - eye).abs().max())
    if stream.reads_mean:
        defect = max(defect, float((rotation.sum(dim=1) - 1).abs().max()))
    return defect


def rotate_stream(
    weights: Mapping[str, Tensor],
    family: Family,
    stream: Stream,
    sites: tuple[Site, ...],
    blocks: int,
    rotation: Tensor,
) -> dict[str, Tensor]:
    """All weights of a model by full name, in the basis R; the reader's own weight is there, untied.

    Raises EquivalenceError where R is outside the stream's group.
    """
    defect = rotation_defect(rotation, stream)
    if defect > 1e-4:
        group = "a rotation that keeps the vector of ones" if stream.reads_mean else "a rotation"
        raise EquivalenceError(
            f"The stream takes only {group}: this matrix is {defect:.1e} away from one."
        )
    turned = dict(weights)
    reader = f"{stream.reader}.weight"
    if reader not in turned:  # tied to the embedding
        turned[reader] = turned[f"{stream.embeddings[0]}.weight"]
    for name in stream.embeddings:
        turned[f"{name}.weight"] = weights[f"{name}.weight"] @ rotation
    writers = [
        f"{family.blocks}.{i}.{name}" for i in range(blocks) for name in stream.block_writers
    ]
    for name in (*stream.writers, *writers):
        turned[f"{name}.weight"] = rotation.T @ weights[f"{name}.weight"]
        if f"{name}.bias" in weights:
            turned[f"{name}.bias"] = weights[f"{name}.bias"] @ rotation
    for site in sites:
        if isinstance(site, NormSite):
            for index in range(blocks):
                _turn_readers(turned, f"{family.blocks}.{index}.", site, rotation)
    _turn_head(turned, stream, sites, rotation)
    return turned


def _turn_readers(turned: dict[str, Tensor], prefix: str, site: NormSite, rotation: Tensor) -> None:
    gain = turned[f"{prefix}{site.norm}.weight"] + site.offset
    bias = turned.get(f"{prefix}{site.norm}.bias")
    for name in site.readers:
        key = f"{prefix}{name}"
        weight = turned[f"{key}.weight"]
        if bias is not None:
            turned[f"{key}.bias"] = turned[f"{key}.bias"] + weight @ bias
        turned[f"{key}.weight"] = (weight * gain) @ rotation
    turned[f"{prefix}{site.norm}.weight"] = torch.full_like(gain, 1 - site.offset)
    if bias is not None:
        turned[f"{prefix}{site.norm}.bias"] = torch.zeros_like(bias)


def _turn_head(
    turned: dict[str, Tensor], stream: Stream, sites: tuple[Site, ...], rotation: Tensor
) -> None:
    """The final norm's gain goes into the reader; its bias stays, in the new basis: β' = (β/γ) R."""
    offset = next(site.offset for site in sites if isinstance(site, NormSite))
    gain = turned[f"{stream.final_norm}.weight"] + offset
    turned[f"{stream.reader}.weight"] = (turned[f"{stream.reader}.weight"] * gain) @ rotation
    if f"{stream.final_norm}.bias" in turned:
        turned[f"{stream.final_norm}.bias"] = (
            turned[f"{stream.final_norm}.bias"] / gain
        ) @ rotation
    turned[f"{stream.final_norm}.weight"] = torch.full_like(gain, 1 - offset)
