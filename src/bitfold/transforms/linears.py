"""What linear layers take: blocks, complex numbers, a scale or another order on what they give or read."""

import torch
from torch import Tensor

from bitfold.models.family import ValueOutput
from bitfold.transforms.norms import Weights, bias_of

__all__ = [
    "complex_blocks",
    "fold_pair",
    "fold_value_output",
    "on_rows",
    "permuted",
    "times_complex",
]


def fold_value_output(
    weights: Weights,
    site: ValueOutput,
    blocks: Tensor,
    inverse: Tensor,
    shift: Tensor | None,
    shared: int,
) -> dict[str, Tensor]:
    """x' = (x − shift) A⁻¹ between v and o, for the KV heads' blocks A [K, H, H], each read by `shared` query heads."""
    folded = dict(weights)
    keys, size, _ = blocks.shape
    on_rows(folded, site.value, inverse.transpose(1, 2), shift)
    output = weights[f"{site.output}.weight"]
    columns = output.view(output.shape[0], keys, shared, size)
    if shift is not None:
        carried = torch.einsum("okqh,kh->o", columns, shift.view(keys, size))
        folded[f"{site.output}.bias"] = bias_of(weights, site.output) + carried
    # W'_h = W_h Aᵀ, once for every query head that shares the KV head.
    read_back = torch.einsum("okqh,kgh->okqg", columns.to(blocks.dtype), blocks)
    folded[f"{site.output}.weight"] = read_back.to(output.dtype).reshape(output.shape)
    return folded


def fold_pair(weights: Weights, first: str, second: str, scale: Tensor) -> dict[str, Tensor]:
    """x' = x / scale [n] between two layers: rows and bias of the first, columns of the second."""
    folded = dict(weights)
    folded[f"{first}.weight"] = weights[f"{first}.weight"] / scale.unsqueeze(-1)
    if f"{first}.bias" in weights:
        folded[f"{first}.bias"] = weights[f"{first}.bias"] / scale
    folded[f"{second}.weight"] = weights[f"{second}.weight"] * scale
    return folded


def on_rows(folded: dict[str, Tensor], name: str, blocks: Tensor, shift: Tensor | None) -> None:
    """y' = (y − shift) Bᵀ for the blocks B [heads, H, H] on a linear layer's output y: rows and bias.

    The products are formed in the precision of the blocks.
    """
    heads, size, _ = blocks.shape
    weight = folded[f"{name}.weight"]
    turned = blocks @ weight.view(heads, size, -1).to(blocks.dtype)
    folded[f"{name}.weight"] = turned.to(weight.dtype).reshape(weight.shape)
    if shift is not None or f"{name}.bias" in folded:
        bias = bias_of(folded, name) if shift is None else bias_of(folded, name) - shift
        turned = blocks @ bias.view(heads, size, 1).to(blocks.dtype)
        folded[f"{name}.bias"] = turned.to(weight.dtype).reshape(-1)


def times_complex(folded: dict[str, Tensor], name: str, real: Tensor, imaginary: Tensor) -> None:
    """Multiply the pairs of a linear layer's output by complex numbers [heads, P]: rows and bias."""
    heads, pairs = real.shape
    for key in (f"{name}.weight", f"{name}.bias"):
        if key not in folded:
            continue
        value = folded[key].reshape(heads, 2, pairs, -1)
        a, b = real.unsqueeze(-1), imaginary.unsqueeze(-1)
        first = a * value[:, 0] - b * value[:, 1]
        second = a * value[:, 1] + b * value[:, 0]
        folded[key] = torch.stack([first, second], dim=1).reshape(folded[key].shape)


def complex_blocks(real: Tensor, imaginary: Tensor) -> Tensor:
    """2×2 real matrices [heads · P, 2, 2] that multiply a pair (as a row) by complex numbers."""
    a, b = real.flatten(), imaginary.flatten()
    return torch.stack([torch.stack([a, b], -1), torch.stack([-b, a], -1)], -2)


def permuted(
    weights: Weights, rows: tuple[str, ...], columns: str | None, order: Tensor
) -> dict[str, Tensor]:
    """Rows and biases of some layers, and columns of one that reads them, in another order."""
    folded = dict(weights)
    for name in rows:
        folded[f"{name}.weight"] = weights[f"{name}.weight"][order]
        if f"{name}.bias" in weights:
            folded[f"{name}.bias"] = weights[f"{name}.bias"][order]
    if columns is not None:
        folded[f"{columns}.weight"] = weights[f"{columns}.weight"][:, order]
    return folded
