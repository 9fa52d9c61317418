"""What a run made and what it cost, read from the artifact itself."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfold.errors import CheckpointError, OutputError
from bitfold.evaluate.memory import peak_rss_mb
from bitfold.export.artifact import companion_files
from bitfold.models.headers import read_json
from bitfold.pipeline.job import Job

__all__ = ["Quantization", "read_result", "usage_lines"]


@dataclass(frozen=True)
class Quantization:
    """What a run made and what it cost. `finished_before`: it was there already, nothing was done; online: what the
    matrices cost at inference that the method leaves to run, None where everything is folded; allocation: how the bits
    of each layer were found, None where the recipe gave them; rotation: the KL on held-back windows before and after
    rotations were learned, None where none were; distillation: what it trained, and the same of it."""

    out: Path
    seconds: float
    resumed_blocks: int
    peak_rss_mb: float
    bits_per_weight: float
    size_bytes: int
    original_bytes: int
    method: str
    scheme: str
    format: str
    probe: dict[str, Any]
    online: dict[str, Any] | None
    allocation: dict[str, Any] | None
    rotation: dict[str, Any] | None
    distillation: dict[str, Any] | None
    layers: list[dict[str, Any]]
    notes: tuple[str, ...]
    usage: tuple[str, ...]
    finished_before: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return vars(self) | {
            "out": str(self.out),
            "notes": list(self.notes),
            "usage": list(self.usage),
        }


def read_result(
    job: Job, *, seconds: float, resumed_blocks: int | None, finished_before: bool = False
) -> Quantization:
    """Sum up the artifact at `job.out`; resumed_blocks is None where all of them were there.

    Raises OutputError where it is damaged.
    """
    try:
        report = read_json(job.out / "report.json")
        quantization = read_json(job.out / "config.json")["quantization_config"]
        return Quantization(
            out=job.out,
            seconds=seconds,
            resumed_blocks=len(report["folding_errors"])
            if resumed_blocks is None
            else resumed_blocks,
            peak_rss_mb=peak_rss_mb(),
            bits_per_weight=report["bits_per_weight"],
            size_bytes=sum(file.stat().st_size for file in job.out.iterdir() if file.is_file()),
            original_bytes=_original_bytes(job),
            method=report["method"],
            scheme=report["scheme"],
            format=quantization["quant_method"],
            probe=report["probe"],
            online=report.get("online"),
            allocation=report.get("allocation"),
            rotation=report.get("rotation"),
            distillation=report.get("distillation"),
            layers=report["layers"],
            notes=tuple(report["notes"]),
            usage=usage_lines(str(job.out), quantization),
            finished_before=finished_before,
        )
    except (CheckpointError, KeyError, TypeError) as error:
        raise OutputError(
            f"The artifact at {job.out} is damaged ({error}): add --overwrite to make it again."
        ) from error


def usage_lines(out: str, quantization: Mapping[str, Any]) -> tuple[str, ...]:
    """Lines that show how to use the artifact at `out`, from the `quantization_config` of its config.json."""
    loading = f'AutoModelForCausalLM.from_pretrained("{out}")'
    generating = f'bitfold generate {shlex.quote(out)} --prompt "Once upon a time"'
    if quantization["quant_method"] != "compressed-tensors":
        return (
            f"import bitfold; from transformers import AutoModelForCausalLM; model = {loading}",
            generating,
        )
    lines = (f"from transformers import AutoModelForCausalLM; model = {loading}", generating)
    if not _vllm_has_kernels(quantization):
        return lines
    return (lines[0], f"vllm serve {shlex.quote(out)}", lines[1])


def _vllm_has_kernels(quantization: Mapping[str, Any]) -> bool:
    """Whether vLLM serves the scheme (docs/engines.md).

    4 or 8 bit integer weights alone, or symmetric weights in int8 or fp8 with symmetric inputs of the same kind.
    """
    if quantization.get("kv_cache_scheme"):
        return False
    for group in quantization["config_groups"].values():
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not weights:
            return False
        if inputs is None:
            served = weights["type"] == "int" and weights["num_bits"] in (4, 8)
            served = served and weights["strategy"] in ("channel", "group")
        else:
            served = (
                weights["num_bits"] == inputs["num_bits"] == 8
                and weights["type"] == inputs["type"]
                and weights["symmetric"]
                and inputs["symmetric"]
                and weights["strategy"] in ("channel", "tensor")
                and inputs["strategy"] in ("token", "tensor")
            )
        if not served:
            return False
    return True


def _original_bytes(job: Job) -> int:
    """What the artifact stands for weighs: weights, configuration and tokenizer of the original."""
    files = [
        *job.skeleton.checkpoint.files,
        job.source / "config.json",
        *companion_files(job.source),
    ]
    return sum(file.stat().st_size for file in files)
