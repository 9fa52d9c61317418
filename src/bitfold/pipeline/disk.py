"""The disk a run takes: known to a few kilobytes before anything is written."""

import json
import shutil

import torch

from bitfold.errors import OutputError
from bitfold.export.artifact import companion_files
from bitfold.export.layout import WeightFormat, input_buffers
from bitfold.models.checkpoint import tensor_bytes
from bitfold.models.family import head_counts
from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.pipeline.job import Job
from bitfold.pipeline.online import stored_maps
from bitfold.pipeline.probe import probe_bytes
from bitfold.pipeline.workdir import Workdir, existing_parent
from bitfold.runtime.attention import head_tensors
from bitfold.transforms import BlockTransform

__all__ = ["TEXT_OF_A_TENSOR", "artifact_bytes", "check_disk", "weight_bytes", "working_bytes"]

# What index, checksums and headers say of a tensor, and the report of a layer; card, recipe and provenance.
TEXT_OF_A_TENSOR = 320
_TEXT = 4_000
# What the report says of a transform's fit to a block (with some ten epochs), and of a distillation.
_TEXT_OF_A_FIT = 1_500
_TEXT_OF_A_DISTILLATION = 800


def artifact_bytes(job: Job) -> int:
    """Bytes of all files of the artifact."""
    weights = 0
    tensors = 0
    # Layers of one shape, scheme and format take the same, and most are.
    known: dict[tuple[tuple[int, ...], TensorScheme, WeightFormat], tuple[int, int]] = {}
    for name, source in job.skeleton.sources.items():
        layer = name.removesuffix(".weight")
        info = job.skeleton.checkpoint.tensors[source]
        scheme = job.plan.stored_weight(layer)
        if scheme is None or layer == name:
            weights, tensors = weights + info.nbytes, tensors + 1
            continue
        form = job.plan.choice.formats[layer]
        key = (info.shape, scheme, form)
        if key not in known:
            known[key] = weight_bytes(job, *key)
        weights, tensors = weights + known[key][0], tensors + known[key][1]
    for entry in job.plan.layout.linears.values():
        inputs = input_buffers(entry.scheme.activation, entry.in_features, job.plan.storage, "meta")
        weights, tensors = weights + tensor_bytes(inputs), tensors + len(inputs)
    if job.plan.online is not None:
        weights, tensors = (
            weights + job.plan.online.bytes,
            tensors + len(stored_maps(job.plan.layout.online)),
        )
    for attention in job.plan.layout.attention.values():
        found = head_tensors(attention.scheme, head_counts(job.skeleton.config), job.plan.storage)
        weights, tensors = weights + sum(one.nbytes for one in found.values()), tensors + len(found)
    companions = sum(file.stat().st_size for file in companion_files(job.source))
    windows, length = job.probe.shape
    probe = probe_bytes(windows, length, job.skeleton.config.vocab_size)
    recipe = job.plan.recipe
    fits = sum(isinstance(part, BlockTransform) for part in recipe.transforms)
    text = tensors * TEXT_OF_A_TENSOR + _TEXT + fits * len(job.skeleton.blocks) * _TEXT_OF_A_FIT
    if recipe.distillation is not None:
        text += _TEXT_OF_A_DISTILLATION
    if job.allocation is not None:
        # Rules for each layer are written out in the recipe, and the search in the report.
        text += len(job.plan.recipe.to_yaml()) + len(json.dumps(job.allocation, indent=4))
    return weights + companions + probe + text


def working_bytes(job: Job) -> int:
    """Bytes of the activation streams between blocks: the old ones are kept until the new ones are whole. Of
    rotations that are learned, and of what distillation learns, with a shard that is written beside the old one."""
    tokens = 2 * job.probe.numel()
    if job.stream_tokens is not None:
        tokens += (2 if job.keeps_original else 1) * job.stream_tokens.numel()
    streams = 2 * tokens * job.skeleton.config.hidden_size * job.dtype.itemsize
    if job.plan.recipe.learned_rotation is not None:
        heads, blocks = job.plan.heads, len(job.skeleton.blocks)
        numbers = job.skeleton.config.hidden_size**2 + blocks * heads.keys * heads.size**2
        streams += numbers * torch.float64.itemsize
    return streams + (0 if job.plan.recipe.distillation is None else _learning_bytes(job))


def _learning_bytes(job: Job) -> int:
    """Scales and what has one dimension, all of it changed, codes where they may be; and the largest shard."""
    skeleton = job.skeleton
    learned, outer, outside = 0, 0, set(skeleton.outer_parameters)
    for name, source in skeleton.sources.items():
        info = skeleton.checkpoint.tensors[source]
        scheme = job.plan.schemes.get(name.removesuffix(".weight"))
        if len(info.shape) == 1:
            learned += info.nbytes
        elif scheme is not None and scheme.weight is not None and not scheme.weight.fp4:
            groups = info.shape[0] * (info.shape[1] // (scheme.weight.group_size or info.shape[1]))
            learned += groups * job.plan.storage.itemsize
        if name in outside:
            outer += info.nbytes
    options = job.plan.recipe.distillation
    if options is not None and options.codes:
        learned = artifact_bytes(job)
    names = len(skeleton.sources) * TEXT_OF_A_TENSOR
    return learned + names + max(outer, artifact_bytes(job) // len(skeleton.blocks))


def check_disk(job: Job) -> None:
    """Raises OutputError where the disk has not enough room, what a killed run has written already included."""
    needed = artifact_bytes(job) + working_bytes(job)
    parent = existing_parent(job.out)
    free = shutil.disk_usage(parent).free
    written = sum(f.stat().st_size for f in Workdir(job.out).root.rglob("*") if f.is_file())
    if free + written < needed:
        raise OutputError(
            f"The run needs {needed / 1e6:.0f} MB of disk at {parent}, and {free / 1e6:.0f} MB are free: "
            "make room, or choose an -o on another disk."
        )


def weight_bytes(
    job: Job, shape: tuple[int, ...], scheme: TensorScheme, form: WeightFormat
) -> tuple[int, int]:
    """Bytes and number of the tensors that the job's format makes of a weight [out, in]."""
    tensor = QuantizedTensor.empty(shape, scheme, job.plan.storage, device="meta")
    stored = job.plan.format.to_tensors("", tensor, form)
    return tensor_bytes(stored), len(stored)
