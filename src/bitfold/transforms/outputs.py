"""What a transform does to the outputs of the layers that produce a site's input, undone.

Needed where a layer's own output is compared with the original's: y' of a rewritten v_proj is (y − δ) A⁻¹.
"""

import torch
from torch import Tensor

from bitfold.models.family import FcPair, UpDown, ValueOutput
from bitfold.transforms.groups import Diagonal, HeadMatrix, Heads, RotaryScale, Transform

__all__ = ["restored"]


def restored(transform: Transform, name: str, output: Tensor, heads: Heads) -> Tensor:
    """The output [..., out] of the rewritten layer `name` in the basis that it had before the transform.

    Unchanged where the transform does not rewrite the layer's rows, or only what a later norm undoes.
    """
    if isinstance(transform, Diagonal):
        if name != _producer(transform.site):
            return output
        scaled = output * transform.scale.to(output.dtype)
        return scaled if transform.shift is None else scaled + transform.shift.to(output.dtype)
    if isinstance(transform, HeadMatrix):
        return _restored_by_head(transform, name, output, heads)
    if isinstance(transform, RotaryScale):
        return _restored_pairs(transform, name, output, heads)
    return output


def _producer(site: object) -> str | None:
    """The linear layer whose output a diagonal at the site scales; a norm is none."""
    if isinstance(site, ValueOutput):
        return site.value
    if isinstance(site, UpDown):
        return site.up
    return site.fc1 if isinstance(site, FcPair) else None


def _restored_by_head(transform: HeadMatrix, name: str, output: Tensor, heads: Heads) -> Tensor:
    site = transform.site
    if isinstance(site, ValueOutput):
        if name != site.value:
            return output
        blocks, shift = transform.blocks, transform.shift  # v = v' A + δ
    elif name == site.key:
        blocks, shift = transform.blocks_inverse, transform.shift  # k = k' A⁻¹ + δ
    elif name == site.query:
        blocks = transform.blocks.transpose(1, 2).repeat_interleave(heads.shared, dim=0)
        shift = None  # q = q' Aᵀ
    else:
        return output
    by_head = output.unflatten(-1, (blocks.shape[0], heads.size)).unsqueeze(-2)
    back = (by_head @ blocks.to(output.dtype)).squeeze(-2).flatten(-2)
    return back if shift is None else back + shift.to(output.dtype)


def _restored_pairs(transform: RotaryScale, name: str, output: Tensor, heads: Heads) -> Tensor:
    """k = k' / c = k' conj(c) / |c|²; q = q' conj(c)."""
    real, imaginary = transform.real, -transform.imaginary
    if name == transform.site.key:
        power = real.square() + imaginary.square()
        real, imaginary = real / power, imaginary / power
    elif name == transform.site.query:
        real, imaginary = (
            part.repeat_interleave(heads.shared, dim=0) for part in (real, imaginary)
        )
    else:
        return output
    real, imaginary = real.to(output.dtype), imaginary.to(output.dtype)
    first, second = output.unflatten(-1, (real.shape[0], 2, -1)).unbind(-2)
    turned = [real * first - imaginary * second, imaginary * first + real * second]
    return torch.stack(turned, dim=-2).flatten(-3)
