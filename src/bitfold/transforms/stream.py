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

__all__ = ["refuse_outsiders", "rotate_stream", "rotation_defect", "turn_block", "turn_outer"]


def rotation_defect(rotation: Tensor, stream: Stream) -> float:
    """How far R [d, d] is from the stream's group: ‖R Rᵀ − I‖, and ‖R 1 − 1‖ under LayerNorm (largest entries)."""
    eye = torch.eye(rotation.shape[0], dtype=rotation.dtype, device=rotation.device)
    rotation = rotation.detach()
    defect = float((rotation @ rotation.T - eye).abs().max())
    if stream.reads_mean:
        defect = max(defect, float((rotation.sum(dim=1) - 1).abs().max()))
    return defect


def refuse_outsiders(rotation: Tensor, stream: Stream) -> None:
    """Raises EquivalenceError where R is outside the stream's group."""
    defect = rotation_defect(rotation, stream)
    if defect > 1e-4:
        group = "a rotation that keeps the vector of ones" if stream.reads_mean else "a rotation"
        raise EquivalenceError(
            f"The stream takes only {group}: this matrix is {defect:.1e} away from one."
        )


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
    refuse_outsiders(rotation, stream)
    start = family.blocks + "."
    outer = {name: value for name, value in weights.items() if not name.startswith(start)}
    # Tied to the embedding: its own from now on.
    outer.setdefault(f"{stream.reader}.weight", weights[f"{stream.embeddings[0]}.weight"])
    turned = turn_outer(outer, stream, sites, rotation)
    for index in range(blocks):
        prefix = f"{start}{index}."
        block = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
        turned |= {prefix + n: v for n, v in turn_block(block, stream, sites, rotation).items()}
    return turned


def turn_block(
    weights: Mapping[str, Tensor], stream: Stream, sites: tuple[Site, ...], rotation: Tensor
) -> dict[str, Tensor]:
    """A block's weights, by name relative to it, in the basis R; its norms' gains are in their readers."""
    turned = dict(weights)
    for name in stream.block_writers:
        _turn_writer(turned, name, rotation)
    for site in sites:
        if isinstance(site, NormSite):
            _turn_readers(turned, site, rotation)
    return turned


def turn_outer(
    weights: Mapping[str, Tensor], stream: Stream, sites: tuple[Site, ...], rotation: Tensor
) -> dict[str, Tensor]:
    """The weights outside the blocks, by full name, in the basis R; those of them that are given.

    The final norm's gain goes into the reader, so the two are given together. Its bias stays, in the new basis:
    β' = (β/γ) R.
    """
    turned = dict(weights)
    for name in stream.embeddings:
        if f"{name}.weight" in turned:
            turned[f"{name}.weight"] = weights[f"{name}.weight"] @ rotation
    for name in stream.writers:
        if f"{name}.weight" in turned:
            _turn_writer(turned, name, rotation)
    norm = f"{stream.final_norm}.weight"
    if norm in turned:
        offset = next(site.offset for site in sites if isinstance(site, NormSite))
        gain = weights[norm] + offset
        reader = f"{stream.reader}.weight"
        turned[reader] = (weights[reader] * gain) @ rotation
        if f"{stream.final_norm}.bias" in turned:
            turned[f"{stream.final_norm}.bias"] = (
                weights[f"{stream.final_norm}.bias"] / gain
            ) @ rotation
        turned[norm] = torch.full_like(gain, 1 - offset)
    return turned


def _turn_writer(turned: dict[str, Tensor], name: str, rotation: Tensor) -> None:
    turned[f"{name}.weight"] = rotation.T @ turned[f"{name}.weight"]
    if f"{name}.bias" in turned:
        turned[f"{name}.bias"] = turned[f"{name}.bias"] @ rotation


def _turn_readers(turned: dict[str, Tensor], site: NormSite, rotation: Tensor) -> None:
    gain = turned[f"{site.norm}.weight"] + site.offset
    bias = turned.get(f"{site.norm}.bias")
    for name in site.readers:
        weight = turned[f"{name}.weight"]
        if bias is not None:
            turned[f"{name}.bias"] = turned[f"{name}.bias"] + weight @ bias
        turned[f"{name}.weight"] = (weight * gain) @ rotation
    turned[f"{site.norm}.weight"] = torch.full_like(gain, 1 - site.offset)
    if bias is not None:
        turned[f"{site.norm}.bias"] = torch.zeros_like(bias)
