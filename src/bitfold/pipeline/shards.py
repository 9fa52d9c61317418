"""Blocks on disk: a quantized block as a shard's tensors, and a shard's tensors as a block again."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bitfold.errors import VerificationError
from bitfold.export.layout import LayerEntry, input_scale_name, input_tensors
from bitfold.models.family import head_counts
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline.block import QuantizedBlock
from bitfold.pipeline.hooks import InputQuantizer
from bitfold.pipeline.online import stored_maps
from bitfold.pipeline.plan import Plan
from bitfold.runtime.attention import head_tensors

__all__ = ["block_from_tensors", "block_tensors", "check_shard"]

_PARTS = ("codes", "scale", "zero", "codebook", "kept", "columns")


def block_tensors(
    skeleton: Skeleton, index: int, plan: Plan, block: QuantizedBlock
) -> dict[str, Tensor]:
    """All that is stored of a block, by full name."""
    prefix = skeleton.block_name(index)
    tensors = {f"{prefix}.{name}": value for name, value in block.plain.items()}
    for name, tensor in block.tensors.items():
        full = f"{prefix}.{name}"
        tensors |= plan.format.to_tensors(full, tensor, plan.choice.formats[full])
    for name, quantizer in block.inputs.items():
        full = f"{prefix}.{name}"
        width = plan.layout.linears[full].in_features
        entry = LayerEntry(
            plan.schemes[full], width, quantizer.scale, quantizer.zero, quantizer.clusters
        )
        tensors |= input_tensors(full, entry)
    attention = _attention_name(skeleton, index)
    return tensors | {f"{attention}.{name}": value for name, value in block.head_tensors.items()}


def block_from_tensors(
    skeleton: Skeleton, index: int, plan: Plan, tensors: Mapping[str, Tensor]
) -> QuantizedBlock:
    """The block that `block_tensors` stored; its errors are not stored and come back empty."""
    prefix = skeleton.block_name(index)
    schemes = plan.block_schemes(prefix)
    stored = {name: plan.stored_weight(f"{prefix}.{name}") for name in schemes}
    quantized = {
        name: plan.format.from_tensors(
            f"{prefix}.{name}", tensors, scheme, plan.choice.formats[f"{prefix}.{name}"]
        )
        for name, scheme in stored.items()
        if scheme is not None
    }
    inputs = {
        name: InputQuantizer(
            scheme.activation,
            tensors.get(f"{prefix}.{name}.{input_scale_name(scheme.activation)}"),
            tensors.get(f"{prefix}.{name}.input_zero_point"),
            tensors.get(f"{prefix}.{name}.input_clusters"),
        )
        for name, scheme in schemes.items()
        if scheme.activation is not None
    }
    plain = {
        name: tensors[f"{prefix}.{name}"]
        for name in (*skeleton.block_parameters(index), *stored_maps(plan.block_maps(prefix)))
        if name.removesuffix(".weight") not in quantized
    }
    attention = _attention_name(skeleton, index)
    heads = plan.attention[attention]
    calibrated = {
        name: tensors[f"{attention}.{name}"]
        for name in head_tensors(heads, head_counts(skeleton.config), plan.storage)
    }
    return QuantizedBlock(
        quantized, plain, inputs, heads, {}, 0.0, plan.unpacked_in, head_tensors=calibrated
    )


def check_shard(
    file: Path, skeleton: Skeleton, index: int, plan: Plan, block: QuantizedBlock
) -> None:
    """Read a written shard back and hold it against the block in memory, code for code.

    Raises VerificationError naming the layer that differs.
    """
    stored = block_from_tensors(skeleton, index, plan, load_file(file))
    for name, tensor in block.tensors.items():
        other = stored.tensors[name]
        if not all(_equal(getattr(tensor, part), getattr(other, part)) for part in _PARTS):
            raise VerificationError(
                f"{skeleton.block_name(index)}.{name} read back from {file} is not what was written: "
                "the disk or the format is at fault; nothing was published."
            )


def _attention_name(skeleton: Skeleton, index: int) -> str:
    return f"{skeleton.block_name(index)}.{skeleton.family.attention}"


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))
