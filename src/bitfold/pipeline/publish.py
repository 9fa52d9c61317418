"""A run after its last block: what stands beside the weights, and the sum of it all."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitfold.evaluate.memory import peak_rss_mb
from bitfold.export.artifact import (
    copy_companions,
    index_json,
    model_card,
    package_versions,
    shard_name,
    tensor_sums,
)
from bitfold.models.checkpoint import sha256_of, tensor_bytes
from bitfold.pipeline.job import Job
from bitfold.pipeline.probe import PROBE_FILE, Probe
from bitfold.pipeline.workdir import MARKER, Workdir, writing
from bitfold.version import VERSION

__all__ = ["Quantization", "already_finished", "publish"]


@dataclass(frozen=True)
class Quantization:
    """What a run made and what it cost. `finished_before`: it was there already, nothing was done."""

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
    layers: list[dict[str, Any]]
    notes: tuple[str, ...] = ()
    finished_before: bool = False
    usage: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {
            "out": str(self.out),
            "notes": list(self.notes),
            "usage": list(self.usage),
        }


def publish(job: Job, workdir: Workdir, probe: Probe) -> dict[str, Any]:
    """Write what stands beside the weights, give the artifact its name, and sum up."""
    skeleton, plan = job.skeleton, job.plan
    path, blocks = workdir.path, workdir.blocks
    total = len(blocks) + 1
    outer = skeleton.load_outer()
    shards = {shard_name(0, total): list(outer)} | {b["shard"]: list(b["sums"]) for b in blocks}
    weights_bytes = tensor_bytes(outer) + sum(block["bytes"] for block in blocks)
    probe_numbers = json.loads((path / "probe.json").read_text())
    (path / "probe.json").unlink()
    quantized = sum(block["weights"] for block in blocks)
    report = {
        "method": plan.recipe.method,
        "scheme": plan.recipe.scheme.notation,
        "bits_per_weight": sum(block["bits"] for block in blocks) / quantized
        if quantized
        else 16.0,
        "probe": probe_numbers,
        "fits": [block["fits"] for block in blocks if block["fits"]],
        "folding_errors": [block["folding_error"] for block in blocks],
        "layers": [layer for block in blocks for layer in block["layers"]],
        "notes": list(job.notes),
    }
    quantization = plan.format.config(plan.layout, plan.choice)
    config = job.skeleton.checkpoint.config
    config = (
        config
        | plan.format.extra_config(plan.layout, config)
        | {"quantization_config": quantization}
    )
    usage = _usage(job.out, quantization["quant_method"])
    sums = {**tensor_sums(outer), **{n: s for block in blocks for n, s in block["sums"].items()}}
    workdir.write_text("config.json", _json(config))
    workdir.write_text("model.safetensors.index.json", index_json(shards, weights_bytes))
    workdir.write_text("recipe.yaml", plan.recipe.to_yaml())
    workdir.write_text("report.json", _json(report))
    workdir.write_text("checksums.json", _json(sums))
    workdir.write_text("README.md", _card(job, report, usage))
    with writing(path / PROBE_FILE):
        copy_companions(job.source, path)
        probe.save(path / PROBE_FILE)
    workdir.write_text(MARKER, _json(_provenance(job)))
    workdir.publish()
    return _summary(job, report, usage)


def _summary(job: Job, report: dict[str, Any], usage: tuple[str, ...]) -> dict[str, Any]:
    config = json.loads((job.out / "config.json").read_text())
    return {
        "out": job.out,
        "bits_per_weight": report["bits_per_weight"],
        "size_bytes": sum(file.stat().st_size for file in job.out.iterdir() if file.is_file()),
        "original_bytes": sum(
            file.stat().st_size for file in job.source.iterdir() if file.is_file()
        ),
        "method": report["method"],
        "scheme": report["scheme"],
        "format": config["quantization_config"]["quant_method"],
        "probe": report["probe"],
        "layers": report["layers"],
        "usage": usage,
    }


def already_finished(job: Job) -> Quantization:
    report = json.loads((job.out / "report.json").read_text())
    method = json.loads((job.out / "config.json").read_text())["quantization_config"][
        "quant_method"
    ]
    return Quantization(
        **_summary(job, report, _usage(job.out, method)),
        seconds=0.0,
        resumed_blocks=len(report["folding_errors"]),
        peak_rss_mb=peak_rss_mb(),
        notes=job.notes,
        finished_before=True,
    )


def _provenance(job: Job) -> dict[str, Any]:
    """What the artifact was made from. No times and no measurements of the machine: the same request gives the same
    bytes, whether or not the run was interrupted."""
    files = job.skeleton.checkpoint.files
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(sha256_of, files))
    calibration = job.calibration
    return {
        "bitfold": {"version": VERSION, "request": job.request},
        "packages": package_versions(),
        "source": {
            "model": job.model,
            "files": {file.name: digest for file, digest in zip(files, sums, strict=True)},
            "config": hashlib.sha256((job.source / "config.json").read_bytes()).hexdigest(),
        },
        "calibration": None
        if calibration is None
        else {
            "source": calibration.source,
            "sha256": calibration.sha256,
            "samples": calibration.tokens.shape[0],
            "sequence_length": calibration.tokens.shape[1],
        },
        "seed": job.plan.recipe.seed,
        "dtype": str(job.dtype).removeprefix("torch."),
        "device": job.skeleton.device.type,
    }


def _usage(out: Path, quant_method: str) -> tuple[str, ...]:
    """Lines that show how to use the result."""
    loading = f'AutoModelForCausalLM.from_pretrained("{out}")'
    if quant_method == "compressed-tensors":
        return (
            f"from transformers import AutoModelForCausalLM; model = {loading}",
            f"vllm serve {out}",
            f'bitfold generate {out} --prompt "Once upon a time"',
        )
    return (
        f"import bitfold; from transformers import AutoModelForCausalLM; model = {loading}",
        f'bitfold generate {out} --prompt "Once upon a time"',
    )


def _card(job: Job, report: dict[str, Any], usage: tuple[str, ...]) -> str:
    lines = "\n".join(line.replace(str(job.out), ".") for line in usage)
    return model_card(job.model, report["scheme"], report["method"], report, f"```\n{lines}\n```")


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
