"""What a run would take: disk from the schemes, time and memory from a trial on the first block."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitfold.evaluate.memory import peak_rss_mb
from bitfold.export.layout import WeightFormat
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import TensorScheme
from bitfold.pipeline.block import quantize_block, run_quantized
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.streams import Streams, advance

__all__ = ["Estimate", "artifact_bytes", "estimate", "working_bytes"]

TRIAL_WINDOWS = (1, 4)


@dataclass(frozen=True)
class Estimate:
    """seconds: the whole run; peak_rss_mb: resident memory; size_bytes: the artifact; disk_bytes: while it grows."""

    seconds: float
    peak_rss_mb: float
    size_bytes: int
    disk_bytes: int
    blocks: int
    quantized_layers: int
    format: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(skeleton: Skeleton, plan: Plan, streams: Streams, dtype: torch.dtype) -> Estimate:
    """Quantize the first block with few windows, twice, and extend the line through both times."""
    blocks = len(skeleton.blocks)
    windows = 0 if streams.quantized is None else streams.quantized.shape[0]
    trials = [min(count, windows) for count in TRIAL_WINDOWS]
    _trial(
        skeleton, plan, streams, dtype, trials[0]
    )  # the first one also pays for what is made once
    seconds = [_trial(skeleton, plan, streams, dtype, count) for count in trials]
    slope = (seconds[1] - seconds[0]) / max(1, trials[1] - trials[0])
    per_block = seconds[0] + max(0.0, slope) * max(0, windows - trials[0])
    size = artifact_bytes(skeleton, plan)
    return Estimate(
        seconds=per_block * blocks + skeleton.checkpoint.nbytes / 1e9,
        peak_rss_mb=peak_rss_mb(),
        size_bytes=size,
        disk_bytes=size + working_bytes(streams),
        blocks=blocks,
        quantized_layers=len(plan.layout.linears),
        format=str(plan.format.config(plan.layout, plan.choice)["quant_method"]),
    )


def working_bytes(streams: Streams) -> int:
    """Disk that the streams take between blocks; twice, since the old is kept until the new is whole."""
    kept = [value for value in vars(streams).values() if value is not None]
    return 2 * sum(value.numel() * value.element_size() for value in kept)


def artifact_bytes(skeleton: Skeleton, plan: Plan) -> int:
    """Bytes of the artifact's tensors."""
    total = 0
    for name, parameter in skeleton.model.named_parameters():
        info = skeleton.checkpoint.tensors[skeleton.sources[name]]
        layer = name.removesuffix(".weight")
        scheme = plan.schemes[layer].weight if layer in plan.schemes else None
        if scheme is None or layer == name:
            total += info.nbytes
        else:
            out, columns = parameter.shape
            total += _weight_bytes(out, columns, scheme, plan.choice.formats[layer], plan.storage)
    return total


def _weight_bytes(
    out: int, columns: int, scheme: TensorScheme, form: WeightFormat, storage: torch.dtype
) -> int:
    groups = out * (columns // scheme.group_size if scheme.group_size else 1)
    packed = form.name not in ("int-quantized", "float-quantized")
    code_bits = scheme.bits if packed else 8
    zero_bytes = 0 if scheme.symmetric else groups
    return out * columns * code_bits // 8 + groups * storage.itemsize + zero_bytes


def _trial(
    skeleton: Skeleton, plan: Plan, streams: Streams, dtype: torch.dtype, windows: int
) -> float:
    few = Streams(
        streams.probe_original,
        streams.probe_quantized.clone(),
        None if streams.original is None else streams.original[:windows].clone(),
        None if streams.quantized is None else streams.quantized[:windows].clone(),
    )
    start = time.perf_counter()
    block = quantize_block(skeleton, 0, plan, few, dtype)
    if few.quantized is not None:
        advance(few.quantized, run_quantized(skeleton, 0, block, dtype), skeleton.device)
    return time.perf_counter() - start
